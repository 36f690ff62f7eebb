"""Backends are chosen by name, once; what cannot run says why, and nothing falls back."""

from unittest.mock import patch

import pytest
import torch

from archs.backends import BACKENDS, Forms, NoFormError, everywhere, resolve_backend
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import SCALES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_torch_on_a_cpu_and_our_kernels_on_a_gpu() -> None:
    assert resolve_backend("auto", CPU) == "torch"
    with patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        assert resolve_backend("auto", CUDA) == "triton"


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "torch"])
def test_kernels_need_a_gpu(name: str) -> None:
    with pytest.raises(UserError, match=f"backend '{name}' needs a CUDA device.*--backend torch"):
        resolve_backend(name, CPU)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown backend 'tirton'\. Did you mean 'triton'"):
        resolve_backend("tirton", CPU)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_an_old_gpu_is_refused_and_not_replaced(name: str) -> None:
    with (
        patch("torch.cuda.get_device_capability", return_value=(7, 5)),
        patch("torch.cuda.get_device_name", return_value="Tesla T4"),
        pytest.raises(UserError, match=r"Tesla T4 has compute capability 7\.5.*need 8\.0"),
    ):
        resolve_backend(name, CUDA)


def test_a_missing_form_is_named_with_those_there_are() -> None:
    with pytest.raises(NoFormError, match="scan has no form for backend 'fla'; it has torch, tri"):
        Forms("scan", {"torch": 1, "triton": 2})["fla"]
    assert everywhere("glue", "ours", "kernel") == {
        name: "ours" if name == "torch" else "kernel" for name in BACKENDS
    }


def test_a_model_is_put_on_a_backend_whole() -> None:
    model = ModelSpec(arch="gdn:gqa=3:1", scale=SCALES["tiny"]).outline()
    assert model.backend == "torch"
    model.use("triton")
    held = [m.backend for m in model.modules() if hasattr(m, "backend")]
    assert len(held) > 12 and set(held) == {"triton"}
    with pytest.raises(UserError, match="Unknown backend 'cuda'"):
        model.use("cuda")
