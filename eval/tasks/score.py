"""Accuracy of a model on a task."""

import numpy as np
import torch

from archs.backbone import Model
from eval.results.statistics import Estimate, clustered_share
from eval.tasks.task import Split, Task
from kernels.loss.cross_entropy import IGNORED


def accuracy(model: Model, task: Task, *, split: Split, sequences: int, seed: int) -> Estimate:
    """The share of asked tokens that are right, with its interval (`clustered_share`)."""
    device = model.embedding.weight.device
    right, asked = [], []
    with torch.inference_mode():
        for step in range(max(1, sequences // 128)):
            inputs, targets = task.sequences(128, seed=seed, step=step, split=split)
            at = targets != IGNORED
            hidden = model.hidden_states(inputs.to(device))[at.to(device)]
            answers = torch.full_like(targets, IGNORED)
            answers[at] = model.logits(hidden).argmax(-1).cpu()
            right += ((answers == targets) & at).sum(1).tolist()
            asked += at.sum(1).tolist()
    return clustered_share(np.array(right, dtype=float), np.array(asked, dtype=float))
