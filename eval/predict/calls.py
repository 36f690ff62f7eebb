"""Count the torch operations that a call dispatches, and time one that has no work."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archs.layers import RMSNorm, SwiGLU

#: Width at which a norm and an MLP cost nothing but their calls.
NO_WORK = 16


class CountCalls(TorchDispatchMode):
    """A context in which `calls` counts the operations dispatched to torch."""

    calls = 0

    def __torch_dispatch__(
        self, call: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls += 1
        return call(*args, **(kwargs or {}))


class IdleLayer:
    """Norm, residual and MLP of one token, too narrow for bytes or FLOPs to matter.

    calls: the operations that running it dispatches.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._norm = RMSNorm(NO_WORK).to(dtype=dtype)
        self._mlp = SwiGLU(NO_WORK, NO_WORK).to(dtype=dtype)
        self._x = torch.ones(1, 1, NO_WORK, dtype=dtype)
        with CountCalls() as counted:
            self()
        self.calls = counted.calls

    @torch.inference_mode()
    def __call__(self) -> None:
        """Run it once, as a decode step written in torch does."""
        self._mlp.after(self._norm.before(self._x, self._x))
