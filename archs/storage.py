"""Store a model's weights in another format, in place, matrix by matrix, and keep its state in one.

Matrices and the embedding become `archs.packed.Packed`; rows that give gates and step sizes keep a
format of their own, as one block of a `Stacked` matrix. How codes are chosen is a function of one
matrix: rounding to nearest where nothing else is given.
"""

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from archs.backbone import Block, Model, cast
from archs.backends import NoFormError
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer
from archs.ops.matrix import Matrix, Weight
from archs.packed import Packed, Stacked, nearest, require_group
from archs.spec import FixedSpec
from archs.state_formats import StateFormat
from archs.weights import Number, WeightFormat
from kernels.quant.torch import Rounded

#: Backends whose kernels read states in few bits.
CODED_BACKENDS = ("triton", "sdpa")
#: Codes of one matrix [N, K], and what columns of its input are multiplied by (None: nothing).
Chosen = tuple[Rounded, Tensor | None]
#: Chooses codes: of the projection of this name within what is stored, of its rows [N, K].
Choice = Callable[[str, Tensor, Number], Chosen]


def to_nearest(name: str, weight: Tensor, number: Number) -> Chosen:
    """Every number by its nearest code."""
    return nearest(weight, number), None


def unfactored(name: str, weight: Tensor, number: Number) -> Chosen:
    """As `to_nearest`, with factors of one for the columns of inputs."""
    return nearest(weight, number), torch.ones_like(weight[0])


def store(model: Model, stored: WeightFormat) -> Model:
    """Store all of a model's weights by their nearest codes, in place.

    With tensors for the factors that the format's method has, so that its codes can take their
    place. Raises UserError as `store_projections`.
    """
    if not stored.plain:
        for block in model.layers:
            store_projections(block, stored, unfactored if stored.factors else to_nearest)
        store_ends(model, stored)
        model.weight_format = str(stored)
    return cast(model, stored.dtype)


def store_projections(block: Block, stored: WeightFormat, choose: Choice) -> None:
    """Store the projections of one block.

    Raises MisfitError for a group that is wider than a matrix' rows, and UserError for weights that
    are stored in few bits already.
    """
    for name, projection in _projections(block):
        weight = projection.stored
        if not isinstance(weight, Tensor):
            raise UserError(
                f"the weights are stored as {projection.storage} already; store a model of plain "
                "numbers"
            )
        if not projection.plain:
            made = _matrix(name, projection, weight.detach(), stored, choose)
            if isinstance(made, Matrix):
                projection.store(made)


def store_ends(model: Model, stored: WeightFormat) -> None:
    """Store the embedding and the head."""
    if stored.head.plain:
        return
    embedding = model.embedding
    weight = embedding.weight.detach()
    table = _packed(weight, stored)
    del embedding.weight
    embedding.weight = table  # type: ignore[assignment]
    if model.head is not None:
        model.head.store(_packed(model.head.weight.detach(), stored))


def _packed(weight: Tensor, stored: WeightFormat) -> Packed:
    rounded = nearest(weight.float(), stored.head)
    return Packed(rounded, stored.head, weight.shape[1], stored.dtype)


def _projections(module: nn.Module) -> list[tuple[str, Projection]]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, Projection)]


def _matrix(
    name: str, projection: Projection, weight: Tensor, stored: WeightFormat, choose: Choice
) -> Weight:
    """The rows of a projection in blocks of equal formats."""
    parts: list[Weight] = []
    at = 0
    for gates, sizes in runs(projection):
        rows = weight[at : at + sizes]
        number = stored.gates if gates else stored.matrices
        at += sizes
        if number.plain:
            parts.append(rows.to(stored.dtype))
            continue
        require_group(number, weight.shape)
        rounded, inverse = choose(name, rows.float(), number)
        parts.append(Packed(rounded, number, weight.shape[1], stored.dtype, inverse))
    # A matrix of one part that is plain stays what it is.
    return parts[0] if len(parts) == 1 else Stacked(parts)


def runs(projection: Projection) -> Iterable[tuple[bool, int]]:
    """Whether its next rows give gates, and how many they are."""
    marked = [(n in projection.gates, size) for n, size in enumerate(projection.sizes)]
    for gates, sizes in groupby(marked, lambda pair: pair[0]):
        yield gates, sum(size for _, size in sizes)


def keep(model: Model, state: StateFormat) -> Model:
    """Keep the model's state in a format from now on, in place, as far as there is such a state.

    Raises StateFormatError where it does not fit a tensor.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    found = state.of_kinds(state_kinds(model))
    for mixer in mixers:
        found.stored(mixer.state_spec(), mixer.evictable)
    for mixer in mixers:
        mixer.state_format = found
    return model


def rounds_values(model: Model) -> bool:
    """Whether what a step leaves of a sequence is rounded at its end, wherever that is: recurrent
    states and tails of convolutions in few bits. Rows are rounded once each.
    """
    return any(tensor.is_coded for spec in model.state_specs() for tensor in spec.fixed)


def require_kernels_read(model: Model, backend: str) -> None:
    """Raise NoFormError for a state in a format that the backend's kernels cannot read where it
    lies: they know rows of attention in int8 and fp8, and recurrent states in bfloat16.
    """
    for mixer in (block.mixer for block in model.layers):
        spec = mixer.kept_spec()
        if any(t.keeps for t in spec.fixed):
            raise NoFormError(
                f"no kernel of backend {backend} chooses among the rows of a state that drops some "
                f"({mixer.state_format}); take backend=torch"
            )
        for tensor in (t for t in (*spec.rows, *spec.fixed) if t.is_coded):
            if isinstance(tensor, FixedSpec):
                read = tensor.format == Format.of(torch.bfloat16)
            else:
                one_scale = tensor.format.has_one_scale(tensor.shape[-1])
                read = tensor.name in mixer.coded_rows and one_scale
            if not read or backend not in CODED_BACKENDS:
                raise NoFormError(
                    f"no kernel of backend {backend} reads '{tensor.name}' of "
                    f"{type(mixer).__name__} in {tensor.format}; {' and '.join(CODED_BACKENDS)} "
                    "read keys and values in int8 or fp8, and recurrent states in bfloat16; take "
                    "one of these, or backend=torch"
                )


def state_kinds(model: Model) -> set[str]:
    """The kinds of state that a model has (`archs.state_formats.KINDS`)."""
    specs = [block.mixer.state_spec() for block in model.layers]
    return {tensor.kind for spec in specs for tensor in (*spec.rows, *spec.fixed)}
