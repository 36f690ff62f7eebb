"""No latency without correctness: prefill and decode held to the model's parallel form.

The truth is that form in float32, whatever the weights are stored in. A model in 16 bits is some
way from it by rounding alone, and how far depends on the architecture: head norms of retention and
of the delta rule lift small outputs, rounding included. So what runs may be as far from the truth
as the torch forms of the same weights and dtype are, and half as much again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archs.backbone import Model
from archs.backends import NoFormError
from archs.mixer import Shared
from infer.engine import Engine

#: Largest error that is rounding whatever the model: orders of summation differ between forms.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: How many times the error of the torch forms in the model's dtype.
SLACK = 1.5
#: After the prompt: single steps (as written, captured and replayed, with graphs) and a draft.
SHORT_PIECES = (1, 1, 5, 1, 1, 1)
#: Then steps of one sequence alone, whose products have a kernel of their own: as written, captured
#: and replayed, too. The torch forms know no such difference.
ALONE = 4
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
        """Whether a latency is worth printing."""
        return self.error <= self.limit

    @property
    def why_not(self) -> str:
        """The sentence for a row that is withheld."""
        return (
            f"extend differs from forward by {self.error:.1e} (relative, limit {self.limit:.1e}); "
            "latencies withheld"
        )


def agreement(
    model: Model,
    *,
    tokens: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    compiled: bool = False,
) -> Agreement:
    """How well extend (prefill, decode, a short piece) agrees with forward.

    tokens: length of the sequences (None: enough to reach every path that is timed).
    backend, compiled: single tokens go through the step that will be timed, graphs included.
    Raises NoFormError where the backend has no form for the model, or its kernels refuse the shape.
    """
    try:
        return _agreement(model, tokens, seed, backend, compiled)
    except ValueError as why:
        # Kernels refuse a shape before any launch, naming it and the rule; torch forms do not.
        if backend == "torch":
            raise
        raise NoFormError(f"backend '{backend}' refuses the shape: {why}") from why


@torch.inference_mode()
def _agreement(
    model: Model, tokens: int | None, seed: int, backend: str, compiled: bool
) -> Agreement:
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    tokens = tokens or _telling_length(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (2, tokens), generator=generator).to(device)
    alone = 0 if backend == "torch" else ALONE
    first = tokens - sum(SHORT_PIECES) - alone
    model.use("torch")
    truth = exact_logits(model, ids, first - 1)
    limit = FLOOR[dtype]
    if dtype.itemsize < 4:
        rounded = model.logits(model.hidden_states(ids)[:, first - 1 :])
        limit = max(limit, SLACK * _error((rounded, truth)))
        del rounded
    engine = Engine(model, max_sequences=2, max_context=tokens, backend=backend, compiled=compiled)
    slots = [engine.store.add(), engine.store.add()]
    pieces = [engine.prefill(slots, ids[:, :first].tolist())[:, None]]
    for size in SHORT_PIECES:
        piece = ids[:, first : first + size]
        # Cloned: the next replay of a graph writes to the same logits.
        pieces.append(
            engine.extend_last(slots, piece)[:, None].clone()
            if size == 1
            else engine.extend(slots, piece)
        )
        first += size
    both = torch.cat(pieces, 1)
    pairs = [(both, truth[:, : both.shape[1]])]
    for at in range(first, tokens):
        last = engine.extend_last(slots[:1], ids[:1, at : at + 1]).clone()
        pairs.append((last, truth[:1, at - tokens]))
    return Agreement(_error(*pairs), limit)


def exact_logits(model: Model, ids: Tensor, first: int) -> Tensor:
    """Logits of the positions from `first` on, by the torch forms, in float32 or wider.

    ids: int64 [B, T]; returns [B, T - first, V]. One block's weights are widened at a time.
    """
    wide = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    x, residual = model.embedding(ids).to(wide), None
    shared: Shared = {}
    for block in model.layers:
        with _widened(block, wide):
            x, residual = block(x, residual, shared)
    with _widened(model.norm, wide):
        hidden = model.norm.after(x, residual)[0]
    return F.linear(hidden[:, first:], model.embedding.weight.to(wide))


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


def _telling_length(model: Model) -> int:
    """Tokens after which what is timed has been at work. On a GPU: several splits of a context,
    their combination, and windows that have wrapped; elsewhere there is one path for all lengths.
    """
    if model.embedding.weight.device.type != "cuda":
        return 37
    windows = [spec.window or 0 for spec in model.state_specs()]
    return max(LEAST_ON_GPU, *windows) + 64
