"""The whole decode step on a device: every architecture over batch and context, with mbu.

The cells are ordered so that a short budget leaves a complete small table: all architectures at
one batch and context, then the next pair.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.measure.decode_plans import DecodePlan
from eval.measure.plan import decode_point
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.measure.steps import by_context
from eval.results.point import Point

#: (scale, batch, context), most valuable first.
POINTS: tuple[tuple[str, int, int], ...] = (
    ("1b", 1, 4096), ("1b", 64, 16384), ("8b", 1, 4096), ("1b", 1, 131072), ("1b", 1, 1024),
    ("1b", 1, 32768), ("1b", 8, 4096), ("1b", 256, 1024), ("8b", 16, 16384), ("8b", 64, 4096),
    ("1b", 16, 32768), ("8b", 1, 131072),
)  # fmt: skip
ARCHS: tuple[str, ...] = (*REGISTRY, *HYBRIDS)
COLUMNS = (
    "arch", "scale", "batch", "context", "kernel_backend", "status", "tpot_ms", "tpot_p50_ms",
    "tpot_p99_ms", "output_tok_per_s", "mbu", "mfu", "tpot_pred_ms", "step_bytes", "step_flops",
    "state_bytes", "agreement_error", "agreement_limit", "compile_s", "note",
)  # fmt: skip
KEY = ("arch", "scale", "batch", "context", "kernel_backend")


#: Steps of a cell.
STEPS = 24
#: Columns whose names differ here from their measures'.
NAMES = {"held_bytes": "state_bytes"}


class Place(NamedTuple):
    """One cell of the grid."""

    arch: str
    scale: str
    batch: int
    context: int
    backend: str

    @property
    def key(self) -> dict[str, object]:
        """The columns that identify its row."""
        return dict(zip(KEY, self, strict=True))

    def point(self, device: str, steps: int = STEPS) -> Point:
        """The point to measure."""
        plan = DecodePlan(
            scale=self.scale, batches=(self.batch,), contexts=(self.context,), steps=steps,
            backend=self.backend,
        )  # fmt: skip
        spec = ModelSpec(arch=self.arch, scale=get_scale(self.scale))
        return decode_point(spec, plan, self.batch, device)


def places(
    first: int | None = None, backends: Sequence[str] = ("triton", "sdpa")
) -> Iterator[Place]:
    """The grid in order, or its first pairs of batch and context.

    A model is built once for all these backends.
    """
    for scale, batch, context in POINTS[:first]:
        for arch in ARCHS:
            for backend in backends:
                yield Place(arch, scale, batch, context, backend)


def row_of(place: Place, site: Site, steps: int = STEPS) -> dict[str, object]:
    """The row of one cell. A cell that cannot be measured is a row with its status."""
    point = place.point(site.device.type, steps)
    [found] = by_context(point, measure(point, site))
    named = {NAMES.get(name, name): value for name, value in found.items()}
    return {**{k: v for k, v in named.items() if k in COLUMNS}, **place.key}
