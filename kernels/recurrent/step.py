"""What the recurrent step kernels share: slots, the checks of their arguments, and softplus.

A pool [slots, *shape] holds states. A sequence's state before the step lies in the slot `read[b]`;
the state after its token t goes to `write[b, t]`, where that is not -1: after the last valid token
always, after earlier ones with `each`. Only the last valid token's slot may be the one that the
sequence reads, which updates it in place, and nobody writes to a slot that another reads. Slots are
in range; checking it would wait for the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import require_gpu

MAX_TOKENS = 9


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + eˣ), as accurate as float32 allows where eˣ is small, too (step sizes are)."""
    grown = tl.exp(tl.minimum(x, 20.0))
    one = 1.0 + grown
    # log(1 + e) loses e's low bits in the sum; what was lost is divided out again.
    lost = tl.where(one == 1.0, 1.0, one - 1.0)
    return tl.where(x > 20.0, x, tl.where(one == 1.0, grown, tl.log(one) * (grown / lost)))


@triton.jit
def last_slot(write, count, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slot for the state after the last of `count` of K tokens, int32; -1: it is not kept.

    write: the slots of one sequence's tokens.
    """
    at = tl.minimum(count, K) - 1
    return tl.load(write + at, mask=at >= 0, other=-1)


@triton.jit
def keep_state(own, write, slot_stride, s, inside, t, count):  # type: ignore[no-untyped-def]
    """Store the state s after token t of a sequence in the token's slot, where it is kept.

    own: the tile's place in slot 0; write: the slots of the sequence's tokens. The last of its
    `count` tokens is left out: its slot may be the one that was read.
    """
    slot = tl.load(write + t).to(tl.int64)
    kept = inside & (t < count - 1) & (slot >= 0)
    tl.store(own + slot * slot_stride, s.to(own.dtype.element_ty), mask=kept)


def require_dims(name: str, tensor: Tensor, dims: int) -> None:
    """Raise ValueError unless the tensor has that many dimensions."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs {dims} dimensions")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has that shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the others need {shape}")


def require_heads(name: str, heads: int, groups: int) -> None:
    """Raise ValueError unless every head belongs to a group."""
    if groups == 0 or heads % groups:
        raise ValueError(f"{name} has {heads} heads, not divisible by {groups} groups")


def require_like(state: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors are floating, on the state's device, last dim dense."""
    for name, tensor in tensors.items():
        if tensor.device != state.device:
            raise ValueError(f"{name} is on {tensor.device}, the state on {state.device}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; it needs float32, bfloat16, float16"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1")


def require_state(
    kernel: Any, state: Tensor, read: Tensor, write: Tensor | None, new: Tensor | None,
    sizes: tuple[int, ...], name: str = "state",
) -> None:  # fmt: skip
    """Check the state, its slots and what may be None; sizes: (B, K, one sequence's shape)."""
    batch, tokens, *inner = sizes
    require_gpu(name, state, kernel)
    if batch < 1 or not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"B={batch}, K={tokens} new tokens; it needs B >= 1, K 1 to {MAX_TOKENS}")
    if state.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} has dtype {state.dtype}; it needs float32 or bfloat16")
    require_shape(name, state, (state.shape[0], *inner))
    if not state[0].is_contiguous() or state.stride(0) < state[0].numel():
        raise ValueError(f"{name} has strides {state.stride()}; each slot must be contiguous")
    require_slots(state, (batch,), read=read, new=new)
    require_slots(state, (batch, tokens), write=write)


def require_slots(state: Tensor, shape: tuple[int, ...], **slots: Tensor | None) -> None:
    """Raise ValueError unless they are contiguous int32 of that shape on the state's device."""
    for name, tensor in slots.items():
        if tensor is None:
            continue
        require_shape(name, tensor, shape)
        alike = tensor.dtype == torch.int32 and tensor.device == state.device
        if not alike or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; "
                f"it must be contiguous torch.int32 on {state.device}"
            )


def row_stride(name: str, tensor: Tensor) -> int:
    """Elements between consecutive tokens of [B, K, ...]; raises ValueError where they vary."""
    batch, tokens = tensor.shape[:2]
    row = tensor.stride(0) if tokens == 1 else tensor.stride(1)
    evenly = batch == 1 or tokens == 1 or tensor.stride(0) == tokens * row
    if not evenly or not tensor[0, 0].is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; tokens must be "
            "evenly spaced and each token's channels contiguous"
        )
    return row
