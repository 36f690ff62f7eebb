"""No latency without correctness: prefill and decode held to the model's parallel form.

The truth is that form in float32, whatever the weights are stored in. A model in 16 bits is some
way from it by rounding alone, and how far depends on the architecture: head norms of retention and
of the delta rule lift small outputs, rounding included. So what runs may be as far from the truth
as the torch forms of the same weights and dtype are, and half as much again; so may what keeps its
state in few bits (`_kept`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archs.backbone import Model
from archs.backends import NoFormError
from archs.mixer import Shared
from archs.ops.matrix import dense, rows_of
from archs.storage import rounds_values
from infer.engine import PAGE_SIZE, Engine

#: Largest error that is rounding whatever the model: orders of summation differ between forms.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: How many times the error of the torch forms in the model's dtype.
SLACK = 1.5
#: What ties between codes may do, of the distance of a rounded state's logits from an exact one's.
TIES = 0.1
#: Pieces after the prompt: single steps (eager, captured and replayed, with graphs) and a draft.
SHORT_PIECES = (1, 1, 5, 1, 1, 1)
#: Then steps of one sequence alone, whose products have a kernel of their own: as written, captured
#: and replayed, too.
ALONE = 4
#: Then steps of all sequences, whose lengths are different ones by now.
RAGGED = 2
#: A batch of three or more takes the same forms and layouts whatever its size.
COMPANY = 3
#: Pages that a sequence takes at least, where what is timed takes as many.
PAGES = 2
LEAST_ON_GPU = 1200


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far prefill and decode are from the truth, and how far they may be.

    error: the worst position's ‖logits - truth‖ / ‖truth‖. NaN never holds.
    """

    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the error is small enough to print a latency."""
        return self.error <= self.limit

    @property
    def why_not(self) -> str:
        """Why a row is withheld, as a sentence."""
        return (
            f"extend differs from forward by {self.error:.1e} (relative, limit {self.limit:.1e}); "
            "latencies withheld"
        )


def agreement(
    model: Model, *, context: int | None = None, batches: Sequence[int] = (2,), seed: int = 0,
    backend: str = "torch", compiled: bool = False, replay: int = 0,
) -> Agreement:  # fmt: skip
    """How well extend (prefill, decode, a short piece) agrees with forward.

    context: the longest that will be timed (None: any). The sequences are shorter, but long enough
    for every path that is timed: windows that have wrapped, several pages, splits on a GPU.
    batches: the sizes that will be timed; each goes through an engine laid out for it, with up to
    `COMPANY` sequences. Where the step serves such batches, lengths that differ are held too.
    backend, compiled, replay: of the step that will be timed; single tokens go through it, graphs
    included.
    Raises NoFormError where the backend has no form for the model, or its kernels refuse the shape.
    """
    try:
        return _agreement(model, context, batches, seed, backend, compiled, replay)
    except ValueError as why:
        # Kernels refuse a shape before any launch, naming it and the rule; torch forms do not.
        if backend == "torch":
            raise
        raise NoFormError(f"backend '{backend}' refuses the shape: {why}") from why


@torch.inference_mode()
def _agreement(
    model: Model, context: int | None, batches: Sequence[int], seed: int, backend: str,
    compiled: bool, replay: int,
) -> Agreement:  # fmt: skip
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    companies = sorted({min(batch, COMPANY) for batch in batches})
    tokens = telling_length(model, context)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (companies[-1], tokens), generator=generator).to(device)
    # A compiled step is timed on plain batches and compiles for each size anew.
    alone, ragged = (0, 0) if compiled else (ALONE, RAGGED)
    first = tokens - sum(SHORT_PIECES) - alone - ragged
    model.use("torch")
    truth = exact_logits(model, ids, first - 1)
    limit = FLOOR[dtype]
    if dtype.itemsize < 4:
        rounded = model.logits(model.hidden_states(ids)[:, first - 1 :])
        limit = max(limit, SLACK * _error((rounded, truth)))
        del rounded
    if model.state_format:
        truth, limit = _kept(model, ids, first, truth, limit)
    errors = []
    for company in companies:
        engine = Engine(
            model, max_sequences=company, max_context=tokens, backend=backend, compiled=compiled,
            replay=replay,
        )  # fmt: skip
        errors.append(_error(*_pairs(engine, ids[:company], truth[:company], first, alone, ragged)))
        del engine
    return Agreement(math.nan if any(map(math.isnan, errors)) else max(errors), limit)


def _kept(
    model: Model, ids: Tensor, first: int, truth: Tensor, limit: float
) -> tuple[Tensor, float]:
    """Truth and limit of a model whose state is kept in a format.

    Rows are rounded alike however a sequence is split into steps, so one step of all tokens is the
    truth; what lies in the middle between two codes may get either, for a part of what the format
    costs. Values are rounded at the end of every step, so what runs may be as far from the truth as
    single steps of the torch forms are, and half as much again.
    """
    engine = Engine(
        model, max_sequences=len(ids), max_context=ids.shape[1], prefill_chunk=None,
        backend="torch",
    )  # fmt: skip
    slots = [engine.store.add() for _ in ids]
    exact = model.norm.weight.dtype.itemsize >= 4
    if exact and not rounds_values(model):
        kept = engine.extend(slots, ids)[:, first - 1 :]
        return kept, max(limit, TIES * _error((kept, truth)))
    logits = [engine.prefill(slots, ids[:, :first].tolist())[:, None]]
    steps = ids[:, first:].split(1, 1)
    logits += [engine.extend_last(slots, token)[:, None] for token in steps]
    return truth, max(limit, SLACK * _error((torch.cat(logits, 1), truth)))


def _pairs(
    engine: Engine, ids: Tensor, truth: Tensor, first: int, alone: int, ragged: int
) -> list[tuple[Tensor, Tensor]]:
    """Logits of the engine and the truth: prompt, pieces, one sequence alone, then all again.

    ids: [B, T]; truth: [B, T - first + 1, V], from position first - 1 on.
    """
    slots = [engine.store.add() for _ in ids]
    pieces = [engine.prefill(slots, ids[:, :first].tolist())[:, None]]
    at = first
    for size in SHORT_PIECES:
        piece = ids[:, at : at + size]
        # Cloned: the next replay of a graph writes to the same logits.
        pieces.append(
            engine.extend_last(slots, piece)[:, None].clone()
            if size == 1
            else engine.extend(slots, piece)
        )
        at += size
    together = torch.cat(pieces, 1)
    pairs = [(together, truth[:, : together.shape[1]])]
    ends = [at] * len(slots)

    def step(rows: slice) -> None:
        here = ends[rows]
        tokens = torch.stack([ids[b, end] for b, end in enumerate(here)])[:, None]
        last = engine.extend_last(slots[rows], tokens).clone()
        pairs.append((last, torch.stack([truth[b, n - first + 1] for b, n in enumerate(here)])))
        ends[rows] = [end + 1 for end in here]

    for _ in range(alone):
        step(slice(1))
    for _ in range(ragged):
        step(slice(None))
    return pairs


def exact_logits(model: Model, ids: Tensor, first: int) -> Tensor:
    """Logits of the positions from `first` on, by the torch forms, in float32 or wider.

    ids: int64 [B, T]; returns [B, T - first, V]. One block's weights are widened at a time.
    """
    wide = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    x, residual = rows_of(model.embedding.weight, ids, wide), None
    shared: Shared = {}
    for block in model.layers:
        with _widened(block, wide):
            x, residual = block(x, residual, shared)
    with _widened(model.norm, wide):
        hidden = model.norm.after(x, residual)[0]
    return F.linear(hidden[:, first:], dense(model.head_weight, wide))


@contextmanager
def _widened(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    held = [(p, p.data) for p in module.parameters()]
    try:
        for parameter, data in held:
            parameter.data = data.to(torch.promote_types(data.dtype, dtype))
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _error(*pairs: tuple[Tensor, Tensor]) -> float:
    """The worst position of all pairs of logits and truth; NaN where any is."""
    away = [((a.to(b.dtype) - b).norm(dim=-1) / b.norm(dim=-1)).flatten() for a, b in pairs]
    return float(torch.cat(away).max())


def telling_length(model: Model, context: int | None) -> int:
    """Tokens after which what is timed at `context` has been at work: several pages, windows
    that have wrapped; on a GPU also several splits of a context and their combination.
    """
    pages = PAGES
    for tensor in (t for spec in model.state_specs() for t in spec.owned):
        if tensor.window is not None:
            # A ring holds the window and the page that is being filled.
            sinks, ring = (-(-rows // PAGE_SIZE) for rows in (tensor.sinks, tensor.window - 1))
            pages = max(pages, tensor.every * (sinks + ring + 1))
    single = sum(SHORT_PIECES) + ALONE + RAGGED
    enough = pages * PAGE_SIZE + 2 * single
    if model.embedding.weight.device.type == "cuda":
        return max(LEAST_ON_GPU + 64, enough)
    return enough if context is None else max(2 * single, min(enough, context))
