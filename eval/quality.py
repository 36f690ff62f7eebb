"""Held-out quality: bits per byte with an interval, loss by position, and recall.

Bits per byte compares models across tokenizers. Documents are what is drawn independently, tokens
of one document are not, so intervals are Student's over documents (of recall: Wilson's over
sequences). They cover evaluation noise alone: runs over several seeds give the interval over seeds
instead, and models scored on the same documents are compared by `eval.paired`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from archs.backbone import Model
from eval.results.statistics import weighted_mean
from kernels.cross_entropy import token_losses
from train.mqar import MqarSpec, mqar_batch
from train.tokens import IGNORED, Part, TokenSet, held_out_batches


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval over `n` units."""

    value: float
    low: float
    high: float
    n: int


def _scored(
    model: Model, tokens: TokenSet, part: Part, seq_len: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Losses in nats [B, T], targets [B, T] (IGNORED: not scored), and documents [B]."""
    device = model.embedding.weight.device
    batch = max(1, 4096 // seq_len)
    with torch.inference_mode():
        for rows in held_out_batches(
            tokens, part=part, seq_len=seq_len, batch=batch, max_tokens=max_tokens
        ):
            hidden = model.hidden_states(rows.inputs.to(device))
            targets = rows.targets.to(device)
            losses = token_losses(hidden.flatten(0, 1), model.head_weight, targets.flatten())
            yield losses.view_as(targets).cpu(), rows.targets, rows.document


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """Bits that a model needs for the scored tokens of one document, and their UTF-8 bytes."""

    document: int
    bits: float
    size_bytes: int


def document_scores(
    model: Model, tokens: TokenSet, *, part: Part, seq_len: int, max_tokens: int | None = None
) -> list[DocumentScore]:
    """The held-out documents, each scored in windows of `seq_len`."""
    count = len(tokens.offsets) - 1
    nats, size = np.zeros(count), np.zeros(count, dtype=np.int64)
    for losses, targets, document in _scored(model, tokens, part, seq_len, max_tokens):
        valid = targets != IGNORED
        total = (losses * valid).sum(1).double().numpy()
        np.add.at(nats, document.numpy(), total)
        bytes_of = tokens.token_bytes[targets.where(valid, tokens.eot_id).numpy()]
        np.add.at(size, document.numpy(), (bytes_of * valid.numpy()).sum(1))
    return [
        DocumentScore(int(d), float(nats[d]) / math.log(2), int(size[d]))
        for d in np.flatnonzero(size)
    ]


def over_documents(scores: Sequence[DocumentScore]) -> Estimate:
    """Bits per byte of all documents together, interval over documents.

    A single document has no interval: its ends are NaN.
    """
    bits = np.array([score.bits for score in scores])
    size = np.array([score.size_bytes for score in scores])
    count = len(scores)
    value = float(bits.sum() / size.sum())
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    half = weighted_mean(bits / size, size).half
    return Estimate(value, max(0.0, value - half), value + half, count)


def bits_per_byte(
    model: Model, tokens: TokenSet, *, part: Part, seq_len: int, max_tokens: int | None = None
) -> Estimate:
    """Bits per byte of held-out text in windows of `seq_len`, interval over documents."""
    scores = document_scores(model, tokens, part=part, seq_len=seq_len, max_tokens=max_tokens)
    return over_documents(scores)


def loss_by_position(
    model: Model, tokens: TokenSet, *, part: Part, reach: int, max_tokens: int | None = None
) -> dict[int, Estimate]:
    """Mean loss in nats of the tokens at positions of each octave, by its last position + 1.

    Windows are `reach` long, which may lie beyond the trained length. Intervals are over documents.
    """
    count = len(tokens.offsets) - 1
    sums: dict[int, np.ndarray] = {}
    for losses, targets, document in _scored(model, tokens, part, reach, max_tokens):
        valid = targets != IGNORED
        for first, last in octaves(losses.shape[1]):
            chosen = valid[:, first:last]
            total = (losses[:, first:last] * chosen).sum(1).double().numpy()
            found = sums.setdefault(last, np.zeros((2, count)))
            np.add.at(found[0], document.numpy(), total)
            np.add.at(found[1], document.numpy(), chosen.sum(1).double().numpy())
    curve = {}
    for last, (nats, scored) in sorted(sums.items()):
        there = scored > 0
        if not there.any():
            continue
        mean, n = float(nats.sum() / scored.sum()), int(there.sum())
        half = math.nan if n < 2 else weighted_mean(nats[there] / scored[there], scored[there]).half
        low = mean - half
        curve[last] = Estimate(mean, low if math.isnan(low) else max(0.0, low), mean + half, n)
    return curve


def octaves(length: int) -> list[tuple[int, int]]:
    """Position ranges 0:8, 8:16, 16:32, … that cover whole octaves of `length`."""
    edges = [0, 8]
    while edges[-1] * 2 <= length:
        edges.append(edges[-1] * 2)
    return list(pairwise(edges)) if length >= 8 else []


def mqar_accuracy(
    model: Model, spec: MqarSpec, *, part: Part, sequences: int, seed: int
) -> Estimate:
    """Share of queries answered, 95 % interval over sequences (`clustered_share`)."""
    device = model.embedding.weight.device
    right, asked = [], []
    with torch.inference_mode():
        for step in range(max(1, sequences // 128)):
            inputs, targets = mqar_batch(spec, 128, seed=seed, step=step, split=part)
            at = targets != IGNORED
            hidden = model.hidden_states(inputs.to(device))[at.to(device)]
            answers = torch.full_like(targets, IGNORED)
            answers[at] = model.logits(hidden).argmax(-1).cpu()
            right += ((answers == targets) & at).sum(1).tolist()
            asked += at.sum(1).tolist()
    return clustered_share(np.array(right, dtype=float), np.array(asked, dtype=float))


def clustered_share(right: np.ndarray, asked: np.ndarray) -> Estimate:
    """A proportion of what was asked in clusters, by cluster, with its Wilson interval.

    The queries of one cluster may succeed and fail together: they count as fewer by the design
    effect, their mean's variance over that of independent queries.
    """
    total = float(asked.sum())
    p = float(right.sum()) / total
    effect = 1.0
    if 0 < p < 1 and len(asked) > 1:
        error = weighted_mean(right / asked, asked).error
        effect = max(1.0, error**2 * total / (p * (1 - p)))
    return replace(wilson(p * total / effect, total / effect), n=int(total))


def wilson(right: float, asked: float) -> Estimate:
    """A proportion of independent trials with its Wilson score interval (95 %)."""
    z = 1.959964
    p = right / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), int(asked))
