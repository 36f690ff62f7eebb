"""Held-out quality: bits per byte with an interval, and loss by position.

Bits per byte compares models across tokenizers. Documents are what is drawn independently, tokens
of one document are not, so intervals are Student's over documents. They cover evaluation noise
alone: runs over several seeds give the interval over seeds instead, and models scored on the same
documents are compared by `eval.results.paired`.

Text is read by the parallel form, or token by token through a store, where what the state is kept
in is to be judged.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from archs.backbone import Model
from archs.ops.matrix import dense
from eval.results.statistics import Estimate, weighted_mean
from eval.tasks.score import read_through_store
from kernels.loss.cross_entropy import token_losses
from train.tokens import IGNORED, Part, TokenSet, held_out_batches

#: Tokens of windows that are read at once: by the parallel form, and side by side in a store.
AT_ONCE, STORED = 4096, 65536


def _scored(
    model: Model, tokens: TokenSet, part: Part, seq_len: int, max_tokens: int | None, stored: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Losses in nats [B, T], targets [B, T] (IGNORED: not scored), and documents [B]."""
    device = model.embedding.weight.device
    batch = max(1, (STORED if stored else AT_ONCE) // seq_len)
    with torch.inference_mode():
        head = dense(model.head_weight)
        for rows in held_out_batches(
            tokens, part=part, seq_len=seq_len, batch=batch, max_tokens=max_tokens
        ):
            ids, targets = rows.inputs.to(device), rows.targets.to(device)
            pieces = read_through_store(model, ids) if stored else [model.hidden_states(ids)]
            losses, at = [], 0
            for hidden in pieces:
                wanted = targets[:, at : at + hidden.shape[1]]
                found = token_losses(hidden.flatten(0, 1), head, wanted.flatten())
                losses.append(found.view_as(wanted).cpu())
                at += hidden.shape[1]
            yield torch.cat(losses, 1), rows.targets, rows.document


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """Bits that a model needs for the scored tokens of one document, and their UTF-8 bytes."""

    document: int
    bits: float
    size_bytes: int


def document_scores(
    model: Model, tokens: TokenSet, *, part: Part, seq_len: int, max_tokens: int | None = None,
    stored: bool = False,
) -> list[DocumentScore]:  # fmt: skip
    """The held-out documents, each scored in windows of `seq_len`.

    stored: read through a store, the state as the model keeps it.
    """
    count = len(tokens.offsets) - 1
    nats, size = np.zeros(count), np.zeros(count, dtype=np.int64)
    for losses, targets, document in _scored(model, tokens, part, seq_len, max_tokens, stored):
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


#: By the last position + 1 of an octave: nats of each document, and how many tokens they are of,
#: [2, documents].
PositionNats = dict[int, np.ndarray]


def nats_by_position(
    model: Model, tokens: TokenSet, *, part: Part, reach: int, max_tokens: int | None = None,
    stored: bool = False,
) -> PositionNats:  # fmt: skip
    """What the tokens at positions of each octave cost, in windows of `reach` tokens.

    stored: as `document_scores`'.
    """
    count = len(tokens.offsets) - 1
    sums: PositionNats = {}
    for losses, targets, document in _scored(model, tokens, part, reach, max_tokens, stored):
        valid = targets != IGNORED
        # Of all windows alike: those of a batch may all be shorter than others.
        for first, last in octaves(reach):
            chosen = valid[:, first:last]
            total = (losses[:, first:last] * chosen).sum(1).double().numpy()
            found = sums.setdefault(last, np.zeros((2, count)))
            np.add.at(found[0], document.numpy(), total)
            np.add.at(found[1], document.numpy(), chosen.sum(1).double().numpy())
    return {last: found for last, found in sorted(sums.items()) if found[1].any()}


def loss_by_position(
    model: Model, tokens: TokenSet, *, part: Part, reach: int, max_tokens: int | None = None,
    stored: bool = False,
) -> dict[int, Estimate]:  # fmt: skip
    """Mean loss in nats of the tokens at positions of each octave, by its last position + 1.

    Windows are `reach` long, which may lie beyond the trained length. Intervals are over documents.
    stored: as `document_scores`'.
    """
    sums = nats_by_position(
        model, tokens, part=part, reach=reach, max_tokens=max_tokens, stored=stored
    )
    curve = {}
    for last, (nats, scored) in sums.items():
        found = _mean(nats, scored)
        low = found.low if math.isnan(found.low) else max(0.0, found.low)
        curve[last] = replace(found, low=low)
    return curve


def gap_by_position(before: PositionNats, after: PositionNats) -> dict[int, Estimate]:
    """By how many nats a token costs more after than before, octave by octave.

    Both are of the same windows; intervals are over documents, each held against itself.
    """
    return {last: _mean(after[last][0] - nats, scored) for last, (nats, scored) in before.items()}


def _mean(nats: np.ndarray, scored: np.ndarray) -> Estimate:
    """Of a token, with its interval over documents: NaN where one document alone has tokens."""
    there = scored > 0
    mean, n = float(nats.sum() / scored.sum()), int(there.sum())
    half = math.nan if n < 2 else weighted_mean(nats[there] / scored[there], scored[there]).half
    return Estimate(mean, mean - half, mean + half, n)


def octaves(length: int) -> list[tuple[int, int]]:
    """Position ranges 0:8, 8:16, 16:32, … that cover whole octaves of `length`."""
    edges = [0, 8]
    while edges[-1] * 2 <= length:
        edges.append(edges[-1] * 2)
    return list(pairwise(edges)) if length >= 8 else []
