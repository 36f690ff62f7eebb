"""The way to a GPU, on a stand-in: captures, memory, launches, and kernels compiled ahead."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import SystemRandom
from typing import Any

import pytest

from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY
from archs.sizes import get_scale
from eval.proof.gpu.cache import INDEX, prepare, stand_in, use
from eval.proof.gpu.ops import OPS

LAYERS = get_scale("70m").n_layers
#: Captures of a point by its batch: those of the gate's engine, of all sequences and of one alone,
#: and the timed one. How many are of one sequence, whose norms stand within its products, and how
#: many of two.
CAPTURES = {1: (2, 0), 2: (1, 2)}
ATTENTION = {"attention_decode": 1, "split_combine": 1}
POOLED = {"pooled_append": 1, "pooled_decode": 1, "split_combine": 1}
PICKED = {**POOLED, "pooled_append": 2, "index_scan": 1, "rank_topk": 1}
#: Launches of one layer's mixer beside products and norms, with one sequence and with two: one or
#: two, as designed, and three where a context is split.
MIXERS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    **dict.fromkeys(
        (
            "mha",
            "gqa",
            "mqa",
            "swa",
            "gqa(learned_sinks=true)",
            "swa(window=64,learned_sinks=true)",
        ),
        ({"project_append": 1, **ATTENTION}, {"rope_append": 1, **ATTENTION}),
    ),
    "linear": ({"linear_step": 1},) * 2,
    **dict.fromkeys(
        ("gdn", "gdn(beta_max=2,products=2)", "kda(channel_gates=true)"),
        ({"conv_step": 1, "gdn_step": 1},) * 2,
    ),
    "mamba1": ({"conv_step": 1, "selective_step": 1},) * 2,
    "shortconv": ({"conv_step": 1},) * 2,
    "mamba2": ({"conv_step": 1, "ssm_step": 1},) * 2,
    "mamba3": ({"trapezoid_step": 1},) * 2,
    # The outputs of a single token go through products of their own, a group of heads each.
    "hca": ({**POOLED, "head_gemv": 1}, POOLED),
    "csa": ({**PICKED, "head_gemv": 1}, PICKED),
    "rwkv7": ({"token_shift": 1, "wkv_step": 1},) * 2,
    "mla": (
        {"latent_append": 1, "mla_decode": 1, "split_combine": 1, "head_gemv": 2},
        {"latent_append": 1, "mla_decode": 1, "split_combine": 1},
    ),
    # Each of two groups has products of its own.
    "grouped_latent": (
        {"latent_append": 1, "mla_decode": 1, "split_combine": 1, "head_gemv": 4},
        {"latent_append": 1, "mla_decode": 1, "split_combine": 1},
    ),
    "gta": ({"latent_append": 1, "mla_decode": 1, "split_combine": 1},) * 2,
}
#: Mixers whose normed input several operations read, so that no product norms it, and norms within
#: a mixer.
READ_OFTEN = ("rwkv7", "csa")
WITHIN = {"hca": 1, "csa": 1}
#: Bytes that a prefill may take beside weights and state where they are not 192 MiB: queries of
#: pooled rows are four times as wide as others, and their long steps are torch's.
WORK_BYTES = dict.fromkeys(("hca", "csa"), 256 << 20)
BESIDE = ("few_rows", "gemv", "norm")
#: Architectures of the large proof: all, with all ops, take a quarter of an hour.
FEW = 5


def launches_per_layer(cell: dict[str, Any]) -> dict[str, float]:
    """Of all captures of a point together."""
    per = {k.removesuffix("_fwd_kernel"): n for k, n in cell["captured"].items()}
    return {k: n / LAYERS for k, n in per.items()}


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
        assert held <= cell["peak_bytes"] <= 1.1 * held + WORK_BYTES.get(cell["arch"], 192 << 20), (
            cell
        )
    assert report["left_bytes"] < 8 << 20


def require_launches(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if cell["arch"] not in MIXERS:
            continue
        found = Counter(launches_per_layer(cell))
        (alone, together), (one, two) = MIXERS[cell["arch"]], CAPTURES[cell["batch"]]
        expected = Counter({name: one * n for name, n in alone.items()})
        expected += Counter({name: two * n for name, n in together.items()})
        assert {k: n for k, n in found.items() if k not in BESIDE} == expected, cell["arch"]
        # Two sequences have two norms a layer, one has none but what is read often; all have the
        # last norm and those within a mixer. A gate is in the product before it.
        alone = one * (cell["arch"] in READ_OFTEN)
        own = (one + two) * WITHIN.get(cell["arch"], 0)
        assert found["norm"] == 2 * two + alone + own + (one + two) / LAYERS
        assert found["few_rows"] >= 2 * two and "swiglu" not in found


@pytest.mark.slow
def test_prepared_kernels_are_all_that_the_proof_launches(tmp_path: Path) -> None:
    archs = {
        "gqa(learned_sinks=true)", "rwkv7", "gdn(beta_max=2,products=2)", "kda(channel_gates=true)",
    }  # fmt: skip
    more = ("--archs", ",".join(sorted(archs)), "--points", "70m:1:256,70m:2:256")
    ops = ["page_write", "gemv"]
    folder = tmp_path / "prepared"
    first = prepare(folder, ops, more=more)
    assert first["misses"] == len(first["kernels"]) > 10
    require_sound(first, archs)
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


def test_a_server_waits_for_one_event_a_step_when_the_next_is_launched() -> None:
    """And for nothing else: no copy, list or index makes the host wait for the device."""
    words = [sys.executable, "-m", "tests.gpu_standin.serving"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    turns = found["turns"]
    assert found["ahead"]
    assert {turn["got"] for turn in turns} >= {1, 4}
    assert max(turn["groups"] for turn in turns) == 3
    # Two events a step, before and behind its work; the first call launches two.
    groups = [turn["groups"] for turn in turns]
    step = {n: ["event", *["step"] * n, "event"] for n in (0, *groups)}
    for turn, now, later in zip(turns, groups, [*groups[1:], 0], strict=True):
        launched = step[later] if later else []
        if turn is turns[0]:
            launched = step[now] + launched
        assert turn["told"] == [*launched, "wait for an event"]
    # The stand-in's events lie a millisecond apart.
    assert found["model_s"] == pytest.approx(1e-3 * len(turns))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_large_part_of_the_proof_runs_on_the_stand_in(tmp_path: Path) -> None:
    """Checks and cases of a third of the ops with their baselines, and a few architectures on two
    points: others each time.
    """
    chosen = SystemRandom()
    names = set(chosen.sample(sorted({*REGISTRY, *HYBRIDS}), FEW))
    every = sorted({op.name for op in OPS})
    ops = sorted(chosen.sample(every, len(every) // 3))
    points = ("--archs", ",".join(sorted(names)), "--points", "70m:1:4096,70m:64:1024")
    report = stand_in(tmp_path, ops, (*points, "--baselines"))
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
