"""The way to a GPU, on a stand-in: captures, memory, launches, and kernels compiled ahead."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY
from archs.sizes import get_scale
from eval.gpu.cache import INDEX, prepare, stand_in, use

LAYERS = get_scale("70m").n_layers
#: Captures of a point: those of the gate's engine, of two sequences and of one, and the timed one.
CAPTURES = 3
#: Launches of one layer beside products, norms of the block and SwiGLU: its own mixer's kernels.
#: One or two, as designed, and three where a context is split.
MIXERS: dict[str, dict[str, int]] = {
    "mha": {"rope_append": 1, "attention_decode": 1, "split_combine": 1},
    "gqa": {"rope_append": 1, "attention_decode": 1, "split_combine": 1},
    "mqa": {"rope_append": 1, "attention_decode": 1, "split_combine": 1},
    "swa": {"rope_append": 1, "attention_decode": 1, "split_combine": 1},
    "linear": {"linear_step": 1},
    "gdn": {"conv_step": 1, "gdn_step": 1},
    "mamba1": {"conv_step": 1, "selective_step": 1},
    "mamba2": {"conv_step": 1, "ssm_step": 1},
    "mla": {"latent_append": 1, "mla_decode": 1, "split_combine": 1},
}
BESIDE = ("gemv", "norm", "swiglu")


def launches_per_layer(cell: dict[str, Any]) -> dict[str, float]:
    per = {k.removesuffix("_fwd_kernel"): n for k, n in cell["captured"].items()}
    return {k: n / (CAPTURES * LAYERS) for k, n in per.items()}


def require_sound(report: dict[str, Any], archs: set[str]) -> None:
    """No fault in any capture; memory returns to the weights, its peak is what was asked for."""
    assert report["faults"] == []
    assert report["not_ok"] == {"checks": [], "kernels": [], "decode": []}
    assert {c["arch"] for c in report["cells"]} == archs
    for cell in report["cells"]:
        assert cell["status"] == "ok" and cell["faults"] == []
        # What stays is the held model's, and the tables of angles that calls share.
        assert 0 <= cell["left_bytes"] - cell["weight_bytes"] < 8 << 20, cell
        held = cell["weight_bytes"] + cell["batch"] * cell["state_bytes"]
        assert held <= cell["peak_bytes"] <= 1.1 * held + (192 << 20), cell
    assert report["left_bytes"] < 8 << 20


def require_launches(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if cell["arch"] not in MIXERS:
            continue
        found = Counter(launches_per_layer(cell))
        mixer = {k: n for k, n in found.items() if k not in BESIDE}
        expected = dict(MIXERS[cell["arch"]])
        norms = expected.pop("norm", 0)
        assert mixer == expected, cell["arch"]
        # Two of the block's, and one for all layers.
        assert norms + 2 <= found["norm"] <= norms + 2 + 1 / LAYERS
        assert found["swiglu"] == 1


def test_prepared_kernels_are_all_that_the_proof_launches(tmp_path: Path) -> None:
    more = ("--archs", "gqa,gdn", "--points", "70m:1:256")
    ops = ["page_write", "gemv"]
    folder = tmp_path / "prepared"
    first = prepare(folder, ops, more=more)
    assert first["misses"] == len(first["kernels"]) > 10
    require_sound(first, {"gqa", "gdn"})
    require_launches(first["cells"])
    assert use(folder, tmp_path / "scratch" / "cache") == len(first["kernels"])
    again = stand_in(tmp_path / "scratch", ops, more)
    assert again["misses"] == 0 and again["kernels"].keys() == first["kernels"].keys()
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        prepare(folder, ops, more=more)
    index = folder / INDEX
    index.write_text(index.read_text().replace('"triton": "', '"triton": "0.'))
    with pytest.raises(UserError, match=r"prepared with triton 0\..*prepare it again"):
        use(folder, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_proof_runs_on_the_stand_in(tmp_path: Path) -> None:
    """Every check and case with its baselines, every architecture on two points."""
    points = ("--points", "70m:1:4096,70m:64:1024", "--baselines")
    report = stand_in(tmp_path, (), points)
    names = {*REGISTRY, *HYBRIDS}
    ours = [c for c in report["cells"] if c["kernel_backend"] == "triton"]
    theirs = ("sdpa", "flex", "cublas", "torch", "unsupported")
    report["not_ok"] = {
        table: [line for line in lines if not any(name in line for name in theirs)]
        for table, lines in report["not_ok"].items()
    }
    require_sound({**report, "cells": ours}, names)
    require_launches([c for c in ours if c["batch"] == 1])
    # A machine with sixteen cores compiles on eight: what is prepared or not must fit a lease.
    assert report["compile_s"] / 8 < 120
