"""The whole decode step on a device: every architecture over batch and context, with mbu.

The cells are ordered so that a short budget leaves a complete small table: all architectures at
one batch and context, then the next pair.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from archs.backbone import Model
from archs.backends import NoFormError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.agreement import Agreement, agreement
from eval.decode import build_to_serve, decode_cost, measure_decode
from eval.hardware import Roofline
from eval.predict import step_ms
from eval.results.rows import Status
from infer.memory import DoesNotFitError

#: (scale, batch, context), most valuable first.
POINTS: tuple[tuple[str, int, int], ...] = (
    ("1b", 1, 4096), ("1b", 64, 16384), ("8b", 1, 4096), ("1b", 1, 131072), ("1b", 1, 1024),
    ("1b", 1, 32768), ("1b", 8, 4096), ("1b", 256, 1024), ("8b", 16, 16384), ("8b", 64, 4096),
    ("1b", 16, 32768), ("8b", 1, 131072),
)  # fmt: skip
COLUMNS = (
    "arch", "scale", "batch", "context", "kernel_backend", "status", "tpot_ms", "tpot_p50_ms",
    "tpot_p99_ms", "output_tok_per_s", "mbu", "mfu", "tpot_pred_ms", "step_bytes", "step_flops",
    "state_bytes", "agreement_error", "agreement_limit", "compile_s", "note",
)  # fmt: skip
KEY = ("arch", "scale", "batch", "context", "kernel_backend")


class Point(NamedTuple):
    """One cell of the grid."""

    arch: str
    scale: str
    batch: int
    context: int
    backend: str

    @property
    def key(self) -> dict[str, object]:
        """By which its row is known."""
        return dict(zip(KEY, self, strict=True))


def points(
    first: int | None = None, backends: Sequence[str] = ("triton", "sdpa")
) -> Iterator[Point]:
    """The grid in order, or its first pairs of batch and context.

    A model is built once for all these backends.
    """
    for scale, batch, context in POINTS[:first]:
        for arch in (*REGISTRY, *HYBRIDS):
            for backend in backends:
                yield Point(arch, scale, batch, context, backend)


class Server:
    """Builds the models of the grid, one held at a time, and times them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, roofline: Roofline) -> None:
        self.device = device
        self.dtype = dtype
        self.roofline = roofline
        self._held: tuple[tuple[str, str], Model] | None = None
        self._agreed: dict[tuple[str, str, str], Agreement] = {}

    def measure(self, point: Point, steps: int = 24) -> dict[str, object]:
        """The row of one cell. A cell that cannot be measured is a row with its status."""
        row: dict[str, object] = dict(point.key)
        try:
            return {**row, **self._measure(point, steps)}
        except NoFormError as why:
            return {**row, "status": Status.UNSUPPORTED.value, "note": str(why)}
        except (DoesNotFitError, torch.cuda.OutOfMemoryError) as why:
            self._held = None
            torch.cuda.empty_cache()
            return {**row, "status": Status.OOM.value, "note": str(why).partition("\n")[0]}

    def _measure(self, point: Point, steps: int) -> dict[str, object]:
        model = self._model(point.arch, point.scale)
        known = point.arch, point.scale, point.backend
        if known not in self._agreed:
            self._agreed[known] = agreement(model, backend=point.backend)
        agreed = self._agreed[known]
        found: dict[str, Any] = {
            "agreement_error": agreed.error, "agreement_limit": agreed.limit
        }  # fmt: skip
        if not agreed.holds:
            return found | {"status": Status.INCORRECT.value, "note": agreed.why_not}
        found["status"] = Status.OK.value
        [timing] = measure_decode(
            model, batch=point.batch, contexts=[point.context], steps=steps, warmup=4,
            backend=point.backend,
        )  # fmt: skip
        cost = decode_cost(model, point.batch, timing.context)
        tpot_s = timing.percentile_ms(50) / 1e3
        return found | {
            "tpot_ms": timing.tpot_ms,
            "tpot_p50_ms": timing.percentile_ms(50),
            "tpot_p99_ms": timing.percentile_ms(99),
            "output_tok_per_s": timing.output_tok_per_s,
            "mbu": cost.bytes / tpot_s / self.roofline.peak_bytes_per_s,
            "mfu": cost.flops / tpot_s / self.roofline.matrix_flops_per_s,
            "tpot_pred_ms": step_ms(cost, self.roofline),
            "step_bytes": cost.bytes,
            "step_flops": cost.flops,
            "state_bytes": timing.state_bytes,
            "compile_s": timing.warmup_ms / 1e3,
        }

    def _model(self, arch: str, scale: str) -> Model:
        if self._held is None or self._held[0] != (arch, scale):
            self._held = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            spec = ModelSpec(arch=arch, scale=get_scale(scale))
            self._held = (arch, scale), build_to_serve(spec, self.device, self.dtype)
        return self._held[1]
