"""Which code runs an operation: `torch`, our own `triton` kernels, or a library as a baseline.

A backend is chosen once, by name, and stands in every row that it produced. An operation is a
table of forms by backend (`archs.ops`); a missing form raises, nothing falls back unseen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from archs.errors import UserError, unknown_name

if TYPE_CHECKING:
    import torch

#: Every backend and what it is. The libraries are baselines only.
BACKENDS: dict[str, str] = {
    "torch": "plain torch, anywhere; the reference",
    "triton": "this project's kernels, on a GPU",
    "sdpa": "ours, but attention by torch's scaled_dot_product_attention over gathered rows",
    "flash-attn": "ours, but attention by the flash-attn library",
    "mamba-ssm": "ours, but Mamba's state updates by the mamba-ssm library",
    "fla": "ours, but linear attention and delta rule by the fla library",
}
AUTO = "auto"
#: The oldest GPU that the kernels are compiled for.
OLDEST_CAPABILITY = (8, 0)

Form = TypeVar("Form")


class NoFormError(UserError):
    """An operation has no form for the backend that was asked for."""


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend's name; `auto` is triton on CUDA and torch elsewhere.

    Raises UserError on an unknown name and on a backend that this device cannot run.
    """
    if name == AUTO:
        name = "triton" if device.type == "cuda" else "torch"
    if name not in BACKENDS:
        raise unknown_name("backend", name, (AUTO, *BACKENDS))
    if name != "torch" and device.type != "cuda":
        raise UserError(
            f"backend '{name}' needs a CUDA device, this one is {device}; use --backend torch"
        )
    reason = why_unusable(device) if name != "torch" else None
    if reason is not None:
        raise UserError(f"backend '{name}' is not usable: {reason}; use --backend torch")
    return name


def why_unusable(device: torch.device) -> str | None:
    """Why our kernels cannot run on a CUDA device; None where they can."""
    # The command lists backends before it knows whether it needs torch, which takes seconds.
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        have = ".".join(map(str, found))
        return f"{name} has compute capability {have}, the kernels need {wanted}"
    return None


class Forms(dict[str, Form]):
    """The forms of one operation by backend. Raises NoFormError for a backend that has none."""

    def __init__(self, operation: str, forms: Mapping[str, Form]) -> None:
        super().__init__(forms)
        self.operation = operation

    def __missing__(self, backend: str) -> Form:
        raise NoFormError(
            f"{self.operation} has no form for backend '{backend}'; it has {', '.join(self)}"
        )


def everywhere(operation: str, torch_form: Form, triton_form: Form) -> Forms[Form]:
    """The forms of an operation that is glue: libraries' backends take ours."""
    return Forms(operation, {b: torch_form if b == "torch" else triton_form for b in BACKENDS})
