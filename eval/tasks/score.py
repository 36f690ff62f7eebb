"""Accuracy of a model on a task."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from archs.backbone import Model
from archs.storage import rounds_values
from eval.results.statistics import Estimate, clustered_share
from eval.tasks.task import Split, Task
from infer.engine import Engine
from kernels.loss.cross_entropy import IGNORED

#: New tokens of a step through a store that rounds none of its values.
PIECE = 64


def read_through_store(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """Hidden states [B, K, D] of tokens [B, T], piece by piece, as the state keeps the past.

    Token by token where values are rounded as they are kept, which happens at the end of a step;
    rows are rounded alike in longer ones.
    """
    engine = Engine(model, max_sequences=len(ids), max_context=ids.shape[1], backend="torch")
    slots = [engine.store.add() for _ in ids]
    for piece in ids.split(1 if rounds_values(model) else PIECE, 1):
        with engine.store.step(slots, piece.shape[1]) as step:
            hidden = model.extend_hidden(piece, step.layers)
        yield hidden


def accuracy(
    model: Model, task: Task, *, split: Split, sequences: int, seed: int, stored: bool = False
) -> Estimate:
    """The share of asked tokens that are right, with its interval (`clustered_share`).

    stored: read through a store, the state as the model keeps it.
    """
    device = model.embedding.weight.device
    right, asked = [], []
    with torch.inference_mode():
        for step in range(max(1, sequences // 128)):
            inputs, targets = task.sequences(128, seed=seed, step=step, split=split)
            at = targets != IGNORED
            ids = inputs.to(device)
            pieces = [*read_through_store(model, ids)] if stored else [model.hidden_states(ids)]
            hidden = torch.cat(pieces, 1)[at.to(device)]
            answers = torch.full_like(targets, IGNORED)
            answers[at] = model.logits(hidden).argmax(-1).cpu()
            right += ((answers == targets) & at).sum(1).tolist()
            asked += at.sum(1).tolist()
    return clustered_share(np.array(right, dtype=float), np.array(asked, dtype=float))
