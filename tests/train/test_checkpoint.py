"""Checkpoints: a killed run ends with the same weights, and bad files give one clear line."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from archs.backbone import Model, lay_out
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from tests.train.test_loop import RECIPE, SPEC, Counting
from train.checkpoint import (
    Identity,
    Progress,
    load_model,
    read_metadata,
    resume,
    save_checkpoint,
)
from train.loop import CHECKPOINT_NAME, train
from train.metrics import read_metrics
from train.optim import Optimizer
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
IDENTITY = Identity(spec=SPEC, recipe=RECIPE, data="tokens-1234")

#: Trains as `test_loop` does, but waits in the middle, to be killed there.
VICTIM = """
import sys, time
from pathlib import Path
import torch
from dataclasses import replace
from tests.train.test_loop import RECIPE, SPEC, Counting
from train.loop import train
torch.set_num_threads(1)

class Waiting(Counting):
    def batch_at(self, step):
        if step == 9:
            print("waiting", flush=True)
            time.sleep(60)
        return super().batch_at(step)

recipe = replace(RECIPE, checkpoint_every=4, log_every=1, optimizer="muon")
train(SPEC.build(), Waiting(), recipe, Path(sys.argv[1]), spec=SPEC)
"""


def small_run(path: Path, recipe: Recipe = RECIPE, spec: ModelSpec = SPEC) -> Model:
    model = spec.build()
    train(model, Counting(), recipe, path, spec=spec)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    small_run(tmp_path)
    yield tmp_path / CHECKPOINT_NAME


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    # A muon run holds both kinds of state: it gives vectors and the embedding to AdamW.
    recipe = replace(RECIPE, checkpoint_every=4, log_every=1, optimizer="muon")
    straight = small_run(tmp_path / "straight", recipe)
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "cut")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "waiting\n"
        os.kill(victim.pid, signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert read_metadata(tmp_path / "cut" / CHECKPOINT_NAME).progress.step == 8
    resumed = small_run(tmp_path / "cut", recipe)
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    # The log too is that of one run: the lines past the checkpoint were written again.
    logs = [
        [
            (e["step"], e["train_loss_nats"])
            for e in read_metrics(tmp_path / name / "metrics.jsonl")
            if e["event"] == "step"
        ]
        for name in ("straight", "cut")
    ]
    assert logs[0] == logs[1]


def test_a_model_is_rebuilt_from_the_file_alone(tmp_path: Path) -> None:
    scale = SPEC.scale.with_options({"n_layers": 2})
    spec = ModelSpec(
        arch="mqa:gqa=1:1",
        scale=scale,
        overrides={"gqa": {"kv_heads": 1, "rope_theta": 500.0}},
        hidden=24,
        short_conv=3,
    )
    trained = small_run(tmp_path, spec=spec)
    path = tmp_path / CHECKPOINT_NAME
    tokens = torch.randint(SPEC.scale.vocab_size, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(tokens), trained(tokens), atol=0, rtol=0)
    assert read_metadata(path).identity.spec == spec
    assert read_metadata(path).identity.recipe == RECIPE
    half = load_model(path, dtype=torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["{file}", "{file}:gqa=1:1"], ids=["file", "pattern"])
def test_a_checkpoint_makes_no_code_run_that_nobody_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / "lr=3" / "mine.py"
    file.parent.mkdir()
    file.write_text((ROOT / "tests" / "data" / "decayed_sum.py").read_text())
    scale = SPEC.scale.with_options({"n_layers": 2})
    spec = replace(SPEC, arch=name.format(file=file), scale=scale)
    trained = small_run(tmp_path, spec=spec)
    path = tmp_path / CHECKPOINT_NAME
    with pytest.raises(UserError, match="code is only loaded from a file you name"):
        load_model(path)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(load_model(path, arch=spec.arch)(tokens), trained(tokens))


def test_the_width_in_use_is_kept_and_the_hash_follows_what_matters() -> None:
    ruled = ModelSpec(arch="gqa", scale=get_scale("tiny"))
    explicit = replace(ruled, hidden=ruled.mlp_hidden())
    base = replace(IDENTITY, spec=ruled)
    assert base.to_dict()["spec"]["hidden"] == ruled.mlp_hidden()
    assert base.config_hash == replace(IDENTITY, spec=explicit).config_hash
    assert base.config_hash == replace(base, recipe=replace(RECIPE, log_every=77)).config_hash
    others = [
        replace(base, recipe=replace(RECIPE, seed=1)),
        replace(base, spec=replace(ruled, overrides={"gqa": {"rope_theta": 5.0}})),
        replace(base, data="other"),
    ]
    assert len({base.config_hash, *(o.config_hash for o in others)}) == 4


def test_random_generators_are_restored(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    model = SPEC.build()
    save_checkpoint(
        path, model, Optimizer(model, RECIPE), IDENTITY, Progress(step=3, average=1 / 3)
    )
    expected = torch.rand(3)
    torch.manual_seed(99)
    progress = resume(path, model, Optimizer(model, RECIPE), IDENTITY)
    assert torch.equal(torch.rand(3), expected)
    assert progress == Progress(step=3, average=1 / 3)


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "5-bytes", "header", "last-byte"])
def test_truncated_file(keep: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged.*train again"):
        load_model(saved)


def test_absent_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load_model(foreign)
    altered = tmp_path / "altered.safetensors"
    metadata = {"format": "decodebench-checkpoint-1", "checkpoint": '{"spec": {}}'}
    save_file({"weight": torch.zeros(2)}, altered, metadata)
    with pytest.raises(UserError, match="metadata that cannot be read"):
        load_model(altered)


def places(values: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested mappings, and the whole."""
    yield path
    if isinstance(values, dict):
        for key, inner in values.items():
            yield from places(inner, (*path, key))


def test_metadata_of_other_types_is_refused(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    true = json.loads(metadata["checkpoint"])
    refused = 0
    for path in places(true):
        for wrong in (None, True, [], {}, {"a": 1}, "x", -1, float("nan")):
            held = json.loads(metadata["checkpoint"])
            inner = held
            for key in path[:-1]:
                inner = inner[key]
            if path:
                inner[path[-1]] = wrong
            text = json.dumps(held if path else wrong)
            save_file({"weight": torch.zeros(2)}, saved, {**metadata, "checkpoint": text})
            try:
                read_metadata(saved)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 4 * len(list(places(true)))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rng.cpu", None),
        ("rng.cpu", torch.zeros(3)),
        ("optimizer.embedding.weight.exp_avg", None),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    saved: Path, name: str, wrong: torch.Tensor | None
) -> None:
    with safe_open(saved, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys if key != name}
    save_file(tensors if wrong is None else {**tensors, name: wrong}, saved, metadata)
    model = SPEC.build()
    with pytest.raises(UserError, match="checkpoint"):
        resume(saved, model, Optimizer(model, RECIPE), replace(IDENTITY, data=""))


def test_another_run_in_the_folder_names_both_and_the_difference(saved: Path) -> None:
    other = replace(SPEC, arch="mqa")
    with pytest.raises(UserError) as caught:
        small_run(saved.parent, spec=other)
    message = str(caught.value)
    ours = replace(IDENTITY, spec=other, data="").config_hash
    theirs = replace(IDENTITY, data="").config_hash
    assert f"mha at tiny ({theirs})" in message and f"mqa at tiny ({ours})" in message
    assert "spec.arch is 'mha' there, 'mqa' here" in message
    with pytest.raises(UserError, match=r"recipe\.learning_rate is 0\.01 there, 0\.02 here"):
        small_run(saved.parent, replace(RECIPE, learning_rate=0.02))


def test_what_does_not_change_weights_may_change_on_resume(saved: Path) -> None:
    small_run(saved.parent, replace(RECIPE, log_every=3, learning_rates=(1e-3,)))


def test_weights_that_do_not_fit_are_named(saved: Path) -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.mixer\.qkv\.weight is \(96, 32\) there"):
        load_model(saved, arch="mqa")


def test_a_checkpoint_makes_no_code_run(tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    marker = tmp_path / "ran"
    source.write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from archs.gqa import Attention\n"
        "class Own(Attention):\n    pass\n"
    )
    spec = replace(SPEC, arch=str(source))
    trained = small_run(tmp_path / "run", spec=spec)
    from archs import registry

    registry._FILES.clear()
    marker.unlink()
    path = tmp_path / "run" / CHECKPOINT_NAME
    with pytest.raises(UserError, match=r"own\.py.*pass it as arch"):
        load_model(path)
    assert not marker.exists()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert torch.equal(load_model(path, arch=str(source))(tokens), trained(tokens))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_earlier_checkpoint(
    failing: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    model = SPEC.build(seed=5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free some"):
        save_checkpoint(saved, model, Optimizer(model, RECIPE), IDENTITY, Progress(step=1))
    assert saved.read_bytes() == before
    assert {p.name for p in saved.parent.iterdir()} == {CHECKPOINT_NAME, "metrics.jsonl"}


def test_a_model_whose_matrices_are_column_major_is_saved_whole(tmp_path: Path) -> None:
    model = lay_out(SPEC.build(seed=0), 1)
    assert not model.embedding.weight.is_contiguous()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(
        path, model, Optimizer(model, RECIPE), IDENTITY, Progress(step=3, average=1 / 3)
    )
    assert torch.equal(load_model(path).embedding.weight, model.embedding.weight)
