"""One operation at one shape, checked and timed on a device, ours beside the baselines."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.results.rows import Status

Run = Callable[[], object]

#: Library that must be importable for a baseline.
LIBRARIES = {
    "sdpa": "torch", "flex": "torch", "cublas": "torch", "torch": "torch",
    "flash-attn": "flash_attn", "flashinfer": "flashinfer",
    "mamba-ssm": "mamba_ssm", "fla": "fla",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One correctness case of an operation.

    run: takes the device, returns pairs of what the kernel gave and what its float64 oracle gave.
    limit: largest ‖got − expected‖ / ‖expected‖ that is still rounding.
    """

    name: str
    run: Callable[[torch.device], Sequence[tuple[Tensor, Tensor]]]
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape to time.

    order: cases with a lower one run first, whatever their operation.
    moved_bytes: bytes that must cross device memory once: inputs read, outputs written.
    flops: multiply-adds count as two; 0 where only bytes matter.
    build: makes operands on the device and returns our kernel and the baselines by name, each a
      call without arguments. All return the same values in the same shape, so that they can be
      compared; a gradient that a baseline does not have in common has another shape, or is
      missing. Called once per copy, so that no copy finds its data in the cache.
    late: baselines that take long to compile or to launch, timed after all else.
    """

    name: str
    order: int
    moved_bytes: int
    flops: int
    build: Callable[[torch.device], Mapping[str, Run]]
    late: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """An operation's checks and cases."""

    name: str
    checks: Sequence[Check]
    cases: Sequence[Case] = field(default_factory=tuple)


def installed(baseline: str) -> bool:
    """Whether the library behind a baseline is here."""
    return importlib.util.find_spec(LIBRARIES[baseline]) is not None


def lazily(make: Callable[[], Run]) -> Run:
    """A call that is made at its first use: a library that fails takes nothing else with it."""
    made: list[Run] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; infinite where anything is not finite.

    Raises ValueError where the shapes differ.
    """
    return _distance(got.detach().cpu().double(), expected.detach().cpu().double())


def difference(got: object, expected: object) -> float:
    """Largest relative error, in float32 on the device, of the tensors that both runs returned.

    Raises ValueError where they have none of the same shape.
    """
    pairs = [
        (a, b)
        for a, b in zip(_tensors(got), _tensors(expected), strict=False)
        if a is not None and b is not None and a.shape == b.shape
    ]
    if not pairs:
        raise ValueError("nothing that both returned has the same shape")
    return max(_distance(a.detach().float(), b.detach().float()) for a, b in pairs)


def verdict(check: Check, device: torch.device) -> dict[str, object]:
    """Status, error and note of a check; whatever it raises is its verdict."""

    def judged() -> dict[str, object]:
        torch.manual_seed(0)
        error = max(relative_error(*pair) for pair in check.run(device))
        status = Status.OK if error <= check.limit else Status.INCORRECT
        return {"status": status.value, "error": error, "note": ""}

    return guarded(judged)


def guarded(run: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A row, or the row that says why there is none.

    A kernel or a library may fail in any way on a new device or compiler; the proof goes on.
    """
    try:
        return run()
    except torch.cuda.OutOfMemoryError as error:
        return {"status": Status.OOM.value, "note": why(error)}
    except Exception as error:
        return {"status": Status.ERROR.value, "note": why(error)}


def why(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def lost(device: torch.device) -> bool:
    """Whether a fault has made the device useless to this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _tensors(returned: object) -> Sequence[Tensor | None]:
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)  # type: ignore[arg-type]


def _distance(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"shape {list(got.shape)}, expected {list(expected.shape)}")
    if not (torch.isfinite(got).all() and torch.isfinite(expected).all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))
