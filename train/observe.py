"""What a model's activations are on calibration text: sums over tokens, in float64.

Pruning reads from them how much each unit does. Text goes through the parallel form, so nothing
but the model is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archs.backbone import Model
from archs.errors import UserError
from archs.layers import Projection, RMSNorm
from archs.ops.dense import Unnormed
from archs.packed import Plain

#: Tokens of calibration text that go through a model at once.
PIECE = 4096


@dataclass(slots=True)
class Sums:
    """Over `rows` rows of C channels: of squares and of magnitudes, float64 [C] each."""

    squares: Tensor
    magnitudes: Tensor
    rows: int = 0

    @classmethod
    def none(cls, channels: int, device: torch.device) -> "Sums":
        """Of no rows yet."""
        zero = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zero, zero.clone())

    def add(self, x: Tensor) -> None:
        """Count rows [..., C] in."""
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        self.squares += flat.square().sum(0)
        self.magnitudes += flat.abs().sum(0)
        self.rows += len(flat)

    @property
    def mean_square(self) -> Tensor:
        """[C]."""
        return self.squares / max(1, self.rows)


class _Watched(Plain):
    """A plain matrix that counts what it reads and makes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        rows, columns = weight.shape
        self.read = Sums.none(columns, weight.device)
        self.made = Sums.none(rows, weight.device)

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """As `Matrix.product`."""
        y = super().product(x, backend=backend)
        self.read.add(x)
        self.made.add(y)
        return y


@contextmanager
def watched(module: nn.Module) -> Iterator[Mapping[str, tuple[Sums, Sums]]]:
    """Within it a module's projections count their inputs and outputs, by name."""
    held: list[tuple[Projection, nn.Parameter]] = []
    seen: dict[str, tuple[Sums, Sums]] = {}
    try:
        for name, projection in list(module.named_modules()):
            if isinstance(projection, Projection) and isinstance(projection.weight, nn.Parameter):
                matrix = _Watched(projection.weight)
                held.append((projection, projection.weight))
                projection.store(matrix)
                seen[name] = matrix.read, matrix.made
        yield seen
    finally:
        for projection, weight in held:
            projection.store(weight)


class _WatchedNorm(RMSNorm):
    """A norm that tells what it reads."""

    def __init__(self, norm: RMSNorm, tell: Callable[[Tensor], None]) -> None:
        super().__init__(len(norm.weight), norm.eps)
        self.weight, self.backend, self._tell = norm.weight, norm.backend, tell

    def before(self, x: Tensor, residual: Tensor | None) -> Unnormed:
        """As `RMSNorm.before`."""
        self._tell(x if residual is None else x + residual)
        return super().before(x, residual)

    def after(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.after`."""
        y, total = super().after(x, residual)
        self._tell(total)
        return y, total


@dataclass(slots=True)
class Observed:
    """A model on calibration text.

    projections: inputs and outputs of each, by full name. streams, normed: the residual stream
    that each of the backbone's norms reads, and what it gives, by the norm's name. influence: of
    each layer, see `observe`.
    """

    projections: Mapping[str, tuple[Sums, Sums]]
    streams: dict[str, Sums] = field(default_factory=dict)
    normed: dict[str, Sums] = field(default_factory=dict)
    influence: Tensor = field(default_factory=lambda: torch.zeros(0))


@torch.no_grad()
def observe(model: Model, ids: Tensor) -> Observed:
    """Run text through a model, int64 [B, T], and count.

    A layer's influence is 1 - the mean over tokens of the cosine between the residual stream
    before and after it (block influence, ShortGPT, arXiv 2403.03853), float64 [L].
    Raises UserError on ids that are no sequences of the model's tokens.
    """
    require_text(model, ids)
    layers = len(model.layers)
    away = torch.zeros(layers, dtype=torch.float64, device=model.embedding.weight.device)
    stream: list[Tensor] = []
    with watched(model) as projections, ExitStack() as stack:
        seen = Observed(projections)

        def watch(owner: nn.Module, attribute: str, name: str, depth: int | None) -> None:
            norm = getattr(owner, attribute)
            seen.streams[name], seen.normed[name] = (
                Sums.none(len(norm.weight), norm.weight.device) for _ in range(2)
            )

            def tell(total: Tensor) -> None:
                seen.streams[name].add(total)
                seen.normed[name].add(norm(total))
                if depth is None:
                    return
                if depth:
                    cosine = F.cosine_similarity(stream.pop().double(), total.double(), dim=-1)
                    away[depth - 1] += (1 - cosine).sum()
                if depth < layers:
                    stream.append(total)

            setattr(owner, attribute, _WatchedNorm(norm, tell))
            stack.callback(setattr, owner, attribute, norm)

        for depth, block in enumerate(model.layers):
            watch(block, "norm_mixer", f"blocks.{depth}.norm_mixer", depth)
            if block.norm_mlp is not None:
                watch(block, "norm_mlp", f"blocks.{depth}.norm_mlp", None)
        watch(model, "norm", "norm", layers)
        for part in pieces(ids):
            model.hidden_states(part.to(model.embedding.weight.device))
    seen.influence = away / ids.numel()
    return seen


def pieces(ids: Tensor) -> tuple[Tensor, ...]:
    """Calibration text [B, T] in parts of whole sequences."""
    return ids.split(max(1, PIECE // ids.shape[1]))


def require_text(model: Model, ids: Tensor) -> None:
    """Raise UserError on ids that are no sequences [B, T] of the model's tokens."""
    if ids.dim() != 2 or not ids.numel():
        raise UserError(
            f"calibration text is {list(ids.shape)}; give token ids [B, T], at least one of them"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab_size:
        raise UserError(
            f"calibration text holds tokens {int(ids.min())} to {int(ids.max())}, the model's "
            f"vocab_size is {model.vocab_size}; take text of its tokenizer"
        )
