"""Every registered task: batches are a function of their seed, and options say what is asked."""

import pytest
import torch

from archs.errors import UserError
from eval.tasks import TASKS, task_named
from eval.tasks.task import TaskBatches
from kernels.loss.cross_entropy import IGNORED

NAMES = pytest.mark.parametrize("name", TASKS)


@NAMES
def test_batches_repeat_and_splits_differ(name: str) -> None:
    task = TASKS[name]()
    a = task.sequences(4, seed=1, step=2)[0]
    assert torch.equal(a, task.sequences(4, seed=1, step=2)[0])
    stream = TaskBatches(task, 1).batch_at(2)[0]
    assert stream.shape == (task.batch, task.seq_len)
    assert torch.equal(stream, task.sequences(task.batch, seed=1, step=2)[0])
    others = [task.sequences(4, seed=1, step=2, split=split)[0] for split in ("dev", "test")]
    others += [task.sequences(4, seed=1, step=3)[0], task.sequences(4, seed=2, step=2)[0]]
    for i, one in enumerate([a, *others]):
        assert all(not torch.equal(one, other) for other in others[i:])
    with pytest.raises(UserError, match="Unknown split 'valid'"):
        task.sequences(1, seed=0, step=0, split="valid")  # type: ignore[arg-type]


@NAMES
def test_tokens_lie_in_the_vocabulary_and_something_is_asked_of_each(name: str) -> None:
    task = TASKS[name]()
    inputs, targets = task.sequences(64, seed=0, step=0)
    at = targets != IGNORED
    for tokens in (inputs, targets[at]):
        assert tokens.dtype == torch.int64
        assert tokens.min() >= 0 and tokens.max() < task.vocab
    assert at.any(1).all() and not at.all(1).any()


@NAMES
def test_a_model_of_the_task_has_its_name_and_its_options_name_what_is_asked(name: str) -> None:
    task = TASKS[name]()
    assert name == task.NAME and task_named(name) is TASKS[name]
    spec = task.model("gdn:gqa=3:1", {"gqa": {"kv_heads": 1}, "mla": {}})
    assert (spec.scale.name, spec.scale.n_layers, spec.hidden) == (name, 4, 0)
    assert spec.overrides == {"gqa": {"kv_heads": 1}}
    assert f"vocab={task.vocab}" in task.asked.split()
    assert not any(word.startswith(("steps", "seeds", "seq_len")) for word in task.asked.split())
    assert task.of_one(3).seeds == (3,)
