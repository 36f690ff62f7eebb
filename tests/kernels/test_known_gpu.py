"""What kernels know of a device."""

import pytest
import torch

from kernels.device import gpu


def test_it_follows_what_torch_is_built_for_whoever_asked_before() -> None:
    cpu = torch.device("cpu")
    for hip in (None, "6", None, "6"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.version, "hip", hip)
            assert gpu(cpu).amd is (hip is not None)
