"""What a wrapper launches, written down instead of run: the configurations that are compiled ahead.

An operation names calls of its own wrapper, on operands without memory (`meta`), and what the code
of each of its kernels must be like. Every call is made once for each target, as a launcher there
would see it: types, constants, what is divisible by 16.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.aot.ahead import TARGETS, Variant
from kernels.device import Gpu, recorded_for

Call = Callable[[], object]
NamedCall = tuple[str, Call]
#: Targets in the order they are asked in: what differs between them is named after the first.
_FIRST = sorted(TARGETS, key=lambda target: target != "sm_90")
#: Bytes of an element, by the type of a pointer to it.
ITEM_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
#: What the launcher adds by the target, and `ahead` does so again.
_BY_TARGET = ("OVERLAP", "launch_pdl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What the code of a kernel must be like: as `Variant` says, or a function of the launch."""

    wide_loads: int | Callable[[Variant], int] = 1
    narrow_in_loops: frozenset[int] | Callable[[Variant], frozenset[int]] = frozenset()
    matrix: bool | Callable[[Variant], bool] = False
    spills: int | Callable[[Variant], int] = 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An operand without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def both_ways(name: str, op: Callable[..., Any], *inputs: Tensor | None) -> NamedCall:
    """A call forward and backward, to the gradients of all inputs that have one."""

    def run() -> None:
        given = [
            t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs
        ]
        made = op(*given)
        made = made if isinstance(made, tuple) else (made,)
        wanted = [t for t in given if t is not None and t.requires_grad]
        torch.autograd.grad(made, wanted, [torch.empty_like(t) for t in made])

    return name.replace("torch.", ""), run


def tile_loads(pointer: str, *blocks: str, least: int = 0) -> Callable[[Variant], int]:
    """Loads of 16 bytes a lane makes of a tile of what `pointer` points to; blocks: its sides.

    Of 64 lanes a warp, the most that there are.
    """

    def count(v: Variant) -> int:
        elements = math.prod(v.constexprs[block] for block in blocks)
        return max(least, elements * ITEM_BYTES[v.signature[pointer]] // (16 * 64 * v.num_warps))

    return count


def variants_of(
    calls: Iterable[NamedCall], expected: Mapping[JITFunction[Any], Expected]
) -> list[Variant]:
    """One variant for each launch that differs, on all targets where it is made.

    calls: where one raises ValueError, the wrapper refuses that target. expected: by kernel, in
    whose order they come; launches of others are another operation's. Raises ValueError where a
    call launches nothing.
    """
    found: dict[str, Variant] = {}
    for name, call in calls:
        refused: list[ValueError] = []
        made = [(t, v) for t in _FIRST for v in _launched(name, call, t, refused)]
        mine = [(target, v) for target, v in made if v.kernel in expected]
        if not mine:
            whys = "; ".join(map(str, refused)) or "none of the expected kernels"
            raise ValueError(f"the call '{name}' launches nothing: {whys}")
        several = len({v.kernel for _, v in mine}) > 1
        for target, v in mine:
            named = replace(v, name=f"{name} {_short(v.kernel)}") if several else v
            key = repr(replace(named, name="", kernel=None)) + v.kernel.__name__
            held = found.setdefault(key, named)
            if target not in held.targets:
                found[key] = replace(held, targets=(*held.targets, target))
    order = list(expected)
    demanding = [_demanding(v, expected[v.kernel]) for v in _told_apart(found.values())]
    return sorted(demanding, key=lambda v: order.index(v.kernel))


def _short(kernel: JITFunction[Any]) -> str:
    return str(kernel.__name__.removesuffix("_kernel"))


def _told_apart(found: Any) -> Iterator[Variant]:
    """Launches of one call and kernel that differ are numbered."""
    seen: dict[str, int] = {}
    for v in found:
        seen[v.name] = seen.get(v.name, 0) + 1
        yield v if seen[v.name] == 1 else replace(v, name=f"{v.name} {seen[v.name]}")


def _demanding(v: Variant, wanted: Expected) -> Variant:
    asked = {f.name: getattr(wanted, f.name) for f in fields(wanted)}
    return replace(v, **{k: ask(v) if callable(ask) else ask for k, ask in asked.items()})


def _launched(
    name: str, call: Call, target: str, refused: list[ValueError],
) -> Sequence[Variant]:  # fmt: skip
    """Every launch of a call on a target; none where the wrapper refuses it there."""
    kind = TARGETS[target]
    amd = kind.backend == "hip"
    where = Gpu(amd=True) if amd else Gpu(capability=divmod(int(kind.arch), 10))
    made: list[Variant] = []

    def note(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(_variant(name, kernel, args, options))

    with recorded_for(where), _replaced(note):
        try:
            call()
        except ValueError as refusal:
            refused.append(refusal)
            return ()
    return made


@contextmanager
def _replaced(run: Callable[..., None]) -> Iterator[None]:
    real = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


#: Binds arguments as a launcher does; targets do not differ in it.
_BACKEND = make_backend(TARGETS["sm_90"])


def _variant(name: str, kernel: JITFunction[Any], args: Any, options: dict[str, Any]) -> Variant:
    bind = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
    given = {k: value for k, value in options.items() if k not in _BY_TARGET}
    given |= {"OVERLAP": False} if "OVERLAP" in kernel.arg_names else {}
    bound, specialized, launch = bind(*args, **given)
    kinds = dict(zip(kernel.arg_names, specialized, strict=True))
    return Variant(
        name=name,
        kernel=kernel,
        signature={arg: kind for arg, (kind, _) in kinds.items() if kind != "constexpr"},
        constexprs={
            arg: bound[arg]
            for arg, (kind, _) in kinds.items()
            if kind == "constexpr" and arg not in _BY_TARGET
        },
        divisible=frozenset(arg for arg, (_, how) in kinds.items() if how == "D"),
        num_warps=launch.get("num_warps", 4),
        num_stages=launch.get("num_stages"),
        targets=(),
    )
