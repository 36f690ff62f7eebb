"""A made-up run with the shape of a real one: 13 architectures, two scales, some failures.

State bytes are those of the 70m shapes; losses, latencies and the machine are invented, from a
fixed seed.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from math import exp, log
from pathlib import Path

import numpy as np

from eval.results.folder import write_table
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, About, Found, Provenance, Row, Status, records

ARCHS = (
    "mha", "gqa", "mqa", "swa", "mla", "cla", "linear", "gdn", "mamba1", "mamba2",
    "gdn:gqa=3:1", "swa:gqa=3:1", "mamba2:gqa=3:1",
)  # fmt: skip
BANDWIDTH, RATE = 21e9, 260e9
CONTEXTS = (256, 1024, 4096, 16384)
HERE = Provenance(
    hardware="AMD EPYC 7763 64-Core Processor, 2 threads", driver="", torch="2.13.0+cpu",
    triton="3.7.1", commit="0123456789ab", config_hash="c0ffee123456",
    started_at="2026-01-02T03:04:05+00:00",
)  # fmt: skip
#: Bits per byte of each architecture, and its recall.
QUALITY = dict(zip(ARCHS, (
    2.061, 2.066, 2.083, 2.094, 2.064, 2.079, 2.131, 2.040, 2.072, 2.055, 2.031, 2.060, 2.043,
), strict=True))  # fmt: skip
RECALL = dict(zip(ARCHS, (
    0.999, 0.998, 0.993, 0.31, 0.997, 0.991, 0.42, 0.985, 0.58, 0.77, 0.999, 0.996, 0.998,
), strict=True))  # fmt: skip


#: State bytes per token, fixed, and per token of a window of 1024 tokens.
STATE = dict(zip(ARCHS, (
    (65536, 0, 0), (16384, 0, 0), (8192, 0, 0), (0, 0, 65536), (18432, 0, 0), (8192, 0, 0),
    (0, 1.049e6, 0), (0, 1.245e6, 0), (0, 1.245e6, 0), (0, 8.634e6, 0), (4096, 0.934e6, 0),
    (4096, 0, 49152), (4096, 6.476e6, 0),
), strict=True))  # fmt: skip
PARAMS = {"tiny": 1.05e6, "70m": 67.1e6, "micro": 0.45e6, "mini": 2.4e6}
#: Trained at two more sizes.
LADDER = ("gqa", "gdn", "mamba2")


#: Stored in formats of few bits: bits of memory a weight, and by how much the loss grows.
PACKED = ("gqa", "gdn")
FORMATS = {
    "float32": (32.0, 0.0), "int8": (8.1, 1e-4), "int4-g64": (5.0, 1e-3), "int3-g64": (4.1, 4e-3),
    "int3-g64-awq": (4.2, 2.5e-3), "int2-g64": (3.1, 2e-2), "int2-g64-qat": (3.1, 8e-3),
}  # fmt: skip
#: States in few bits, by the kind that an architecture has: bits of memory a number, and nats lost.
KEPT = {
    "gqa": "kv", "mla": "kv", "gdn": "memory", "mamba2": "memory", "gdn:gqa=3:1": "memory",
}  # fmt: skip
KEPT_FORMATS = {
    "kv": {"int8": (9, 1e-5), "int4-g32": (5, 2e-3), "int4-kivi": (5, 1e-3)},
    "memory": {"int8": (12, 2e-4), "int8-ef": (16, 3e-5), "int4": (8, 4e-3)},
}
#: Pruned, and what each way to train on leaves of the loss.
PRUNED = {
    "mlp:0.5": {"none": 0.08, "text": 0.02, "scratch": 0.3, "distil": 0.01},
    "2:4-wanda": {"none": 0.02, "text": 0.012, "distil": 0.006},
}


class Recorded:
    """Points and their rows, to be written as one table."""

    def __init__(self, where: Provenance = HERE) -> None:
        self.where = where
        self.lines: list[dict[str, object]] = []

    def append(self, point: Point, about: About, rows: Iterable[Row]) -> None:
        self.lines += records(point, Found(about=about, rows=tuple(rows)), self.where)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "results.csv", self.lines)
        return folder


def write_run(
    folder: Path, *, seeds: int = 3, archs: tuple[str, ...] = ARCHS, where: Provenance = HERE
) -> Path:
    """Write `results.csv` into a run folder and return the folder."""
    noise, of_formats, of_states = (np.random.default_rng(seed) for seed in range(3))
    results = Recorded(where)
    machine = [
        Row(measure="copy_bytes_per_s", value=BANDWIDTH),
        Row(measure="matrix_flops_per_s", value=RATE),
        Row(measure="ridge_flop_per_byte", value=RATE / BANDWIDTH),
    ]
    results.append(Point(arch="", stage="hardware"), About(), machine)
    for arch in archs:
        for scale in ("tiny", "70m"):
            results.append(Point(arch=arch, stage="cost", scale=scale), *_cost(arch, scale))
        for seed in range(seeds):
            cell = Point(arch=arch, stage="train", scale="tiny", seed=seed)
            results.append(cell, *_train(arch, noise))
            for scale in ("micro", "mini") if arch in LADDER else ():
                cell = Point(arch=arch, stage="train", scale=scale, seed=seed)
                bits = QUALITY[arch] * (PARAMS["tiny"] / PARAMS[scale]) ** 0.05
                row = Row(measure="bits_per_byte", value=bits + noise.normal() * 0.004, context=128)
                about = replace(_about(arch, scale), corpus="sotu", tokens=122880)
                results.append(cell, about, [row])
            cell = Point(arch=arch, stage="task", scale="mqar", seed=seed)
            recall = min(1.0, RECALL[arch] + noise.normal() * 0.01)
            row = Row(measure="accuracy", value=recall, low=recall - 0.02,
                      high=min(1.0, recall + 0.02), n=512, context=32)  # fmt: skip
            results.append(cell, replace(_about(arch, "tiny"), corpus="mqar"), [row])
        for batch in (1, 8, 32):
            cell = Point(arch=arch, stage="decode", scale="70m", batch=batch)
            if (arch, batch) == ("mha", 32):
                note = "32 sequences of 16384 tokens need 34.4 GB, 12.1 GB are free"
                failure = Row(measure=CELL_FAILED, status=Status.OOM, note=note)
                results.append(cell, About(), [failure])
            elif (arch, batch) == ("linear", 8):
                note = "extend differs from forward by 3.1e-02 (relative); latencies withheld"
                failure = Row(measure=CELL_FAILED, status=Status.INCORRECT, note=note)
                results.append(cell, About(), [failure])
            else:
                results.append(cell, *_decode(arch, batch, noise))
        for batch, drafts in product((1, 8), (1, 4)):
            cell = Point(
                arch=arch, stage="speculate", scale="tiny", batch=batch, options={"drafts": drafts}
            )
            results.append(cell, *_speculate(arch, batch, drafts))
        for workload in ("chat", "turns"):
            cell = Point(arch=arch, stage="serve", scale="70m", options={"workload": workload})
            results.append(cell, *_serve(arch, workload))
        for plan, seed in product(PRUNED if arch in PACKED else (), range(seeds)):
            cell = Point(arch=arch, stage="prune", scale="tiny", seed=seed, options={"prune": plan})
            results.append(cell, *_prune(arch, plan, of_states))
        for state, seed in product(KEPT_FORMATS[KEPT[arch]] if arch in KEPT else (), range(seeds)):
            options = {"state": state}
            cell = Point(arch=arch, stage="state", scale="tiny", seed=seed, options=options)
            results.append(cell, *_keep(arch, state, of_states))
            cell = Point(arch=arch, stage="recall", scale="mqar", seed=seed, options=options)
            results.append(cell, *_recall(arch, state))
        for weights, seed in product(("int8", "int4-g64") if arch in KEPT else (), range(seeds)):
            options = {"weights": weights}
            cell = Point(arch=arch, stage="recall", scale="mqar", seed=seed, options=options)
            results.append(cell, *_recall(arch, "", weights))
        for weights, seed in product(FORMATS if arch in PACKED else (), range(seeds)):
            options = {"weights": weights}
            cell = Point(arch=arch, stage="compress", scale="tiny", seed=seed, options=options)
            results.append(cell, *_compress(arch, weights, of_formats))
        for weights in ("int8", "int4-g64") if arch in PACKED else ():
            options = {"weights": weights}
            cell = Point(arch=arch, stage="decode", scale="70m", batch=1, options=options)
            results.append(cell, *_packed(arch, weights))
    results.write(folder)
    return folder


def _speculate(arch: str, batch: int, drafts: int) -> tuple[About, list[Row]]:
    """The better the model, the more is accepted; a batch has less time to give away."""
    gain = (1 + drafts * (2.2 - QUALITY[arch])) / batch**0.2
    at = {"batch": batch, "context": 64}
    rows = [
        Row(measure="speedup", value=gain, n=3, **at),
        Row(measure="speedup_pred", value=1.2 * gain, **at),
        Row(measure="tokens_per_verification", value=1.3 * gain, **at),
        Row(measure="lossless", value=1.0, n=batch, **at),
    ]
    return replace(_about(arch, "tiny"), options=f"draft=context drafts={drafts}"), rows


def _compress(arch: str, weights: str, noise: np.random.Generator) -> tuple[About, list[Row]]:
    bits, lost = FORMATS[weights]
    ratio = 1 + lost * (1 + 0.1 * noise.normal())
    rows = [
        Row(measure="bits_per_weight", value=bits),
        Row(measure="compressed_bits_per_byte", value=QUALITY[arch] * ratio, context=128),
        Row(measure="bits_per_byte_ratio", value=ratio, low=ratio - 4e-4, high=ratio + 4e-4, n=40),
        Row(measure="held_weight_bytes", value=PARAMS["tiny"] * bits / 8, batch=1, context=128),
        Row(measure="tpot_ms", value=0.5 + bits / 100, batch=1, context=128),
    ]
    about = replace(_about(arch, "tiny"), corpus="sotu", tokens=122880)
    return replace(about, weight_format="" if weights == "float32" else weights), rows


def _keep(arch: str, state: str, noise: np.random.Generator) -> tuple[About, list[Row]]:
    """Losses that grow with the position where a state is rounded at every token."""
    bits, lost = KEPT_FORMATS[KEPT[arch]][state]
    ratio = 1 + lost * (1 + 0.1 * noise.normal())
    rows = [
        Row(measure="bits_per_state_number", value=bits, context=128),
        Row(measure="compressed_bits_per_byte", value=QUALITY[arch] * ratio, context=128),
        Row(measure="bits_per_byte_ratio", value=ratio, low=ratio - 4e-4, high=ratio + 4e-4, n=40),
        Row(measure="tpot_ms", value=1.2, batch=1, context=128),
    ]
    for position in (64, 128, 256, 512):
        gap = lost * (1 + position / 128 * (KEPT[arch] == "memory")) + 1e-6 * noise.normal()
        rows.append(Row(measure="loss_gap_at_position", value=gap, low=gap - 1e-5, high=gap + 1e-5,
                        n=40, position=position))  # fmt: skip
    about = replace(_about(arch, "tiny"), corpus="sotu", tokens=122880)
    return replace(about, state_format=f"{KEPT[arch]}:{state}"), rows


def _recall(arch: str, state: str, weights: str = "") -> tuple[About, list[Row]]:
    bits, lost = FORMATS[weights] if weights else KEPT_FORMATS[KEPT[arch]][state]
    rows = [
        Row(measure="bits_per_weight" if weights else "bits_per_state_number", value=bits),
        Row(measure="compressed_accuracy", value=RECALL[arch] - 5 * lost, n=512, context=32),
    ]
    about = replace(_about(arch, "tiny"), corpus="mqar", weight_format=weights)
    return replace(about, state_format="" if weights else f"{KEPT[arch]}:{state}"), rows


def _prune(arch: str, plan: str, noise: np.random.Generator) -> tuple[About, list[Row]]:
    """The parent's word is worth half of what text alone leaves."""
    rows = []
    for way, lost in PRUNED[plan].items():
        ratio = 1 + lost * (1 + 0.05 * noise.normal())
        rows.append(Row(measure="bits_per_byte_ratio", value=ratio, low=ratio - 4e-4,
                        high=ratio + 4e-4, n=40, options=f"prune={plan} train={way}"))  # fmt: skip
    about = replace(_about(arch, "tiny"), corpus="sotu", tokens=122880)
    return replace(about, options=f"prune={plan}"), rows


def _packed(arch: str, weights: str) -> tuple[About, list[Row]]:
    """Time that falls with bytes, less than they do."""
    size = PARAMS["70m"] * FORMATS[weights][0] / 8
    rows = []
    for context in CONTEXTS:
        at = {"batch": 1, "context": context}
        tpot = 1.4 + 1e3 * (size + state_bytes(arch, "70m", context)) / BANDWIDTH
        rows += [
            Row(measure="tpot_ms", value=tpot * 1.02, n=12, **at),
            Row(measure="tpot_p50_ms", value=tpot, n=12, **at),
            Row(measure="held_weight_bytes", value=size, **at),
        ]
    return replace(_about(arch, "70m"), dtype="bfloat16", weight_format=weights), rows


def _serve(arch: str, workload: str) -> tuple[About, list[Row]]:
    """A clock that is some percent fast, the more so for a first token."""
    rate, off = 100 * QUALITY[arch], 1.05 if workload == "chat" else 1.1
    rows = [
        Row(measure="output_tok_per_s", value=rate, n=8),
        Row(measure="output_tok_per_s_sim", value=rate * off, n=8),
        Row(measure="output_tok_per_s_pred", value=rate * off**3, n=8),
        Row(measure="ttft_p50_ms", value=3e4 / rate, n=8),
        Row(measure="ttft_p50_sim_ms", value=3e4 / rate / off**2, n=8),
    ]
    return replace(_about(arch, "70m"), options=f"workload={workload} batching=continuous"), rows


def _about(arch: str, scale: str) -> About:
    return About(pattern=arch, params=int(PARAMS[scale]))


def state_bytes(arch: str, scale: str, context: int) -> float:
    """State of one sequence."""
    slope, fixed, window = STATE[arch]
    whole = slope * context + fixed + window * min(context, 1024)
    return whole / 16 if scale == "tiny" else whole


def _step(arch: str, scale: str, batch: int, context: int) -> tuple[float, float]:
    """Bytes and FLOPs of one decode step."""
    state = batch * state_bytes(arch, scale, context)
    return 4 * PARAMS[scale] + state, 2 * batch * PARAMS[scale] + 1.5 * state


def _cost(arch: str, scale: str) -> tuple[About, list[Row]]:
    size = 1 / 16 if scale == "tiny" else 1
    rows = [
        Row(measure="state_bytes_per_token", value=STATE[arch][0] * size),
        Row(measure="state_bytes_fixed", value=STATE[arch][1] * size),
    ]
    for context in CONTEXTS:
        moved, flops = _step(arch, scale, 1, context)
        at = {"batch": 1, "context": context}
        rows += [
            Row(measure="state_bytes", value=state_bytes(arch, scale, context), **at),
            Row(measure="step_bytes", value=moved, **at),
            Row(measure="step_flops", value=flops, **at),
            Row(measure="weight_bytes", value=4 * PARAMS[scale], **at),
            Row(measure="arith_intensity_pred", value=flops / moved, **at),
            Row(measure="prefill_intensity_pred", value=flops / moved * context / 2, **at),
        ]
    return _about(arch, scale), rows


def _train(arch: str, noise: np.random.Generator) -> tuple[About, list[Row]]:
    bits = QUALITY[arch] + noise.normal() * 0.004
    rows = [
        Row(measure="train_loss", value=bits * 1.9),
        Row(measure="learning_rate", value=4e-3),
        *(Row(measure="sweep_score", value=bits + d, note=f"learning_rate={r:g}")
          for r, d in ((2e-3, 0.03), (4e-3, 0.0), (8e-3, 0.05))),
        Row(measure="bits_per_byte", value=bits, low=bits - 0.02, high=bits + 0.02, n=40,
            context=128),
    ]  # fmt: skip
    for position in (8, 16, 32, 64, 128, 256):
        beyond = 0.35 * log(position / 128) if position > 128 and RECALL[arch] > 0.99 else 0.0
        loss = bits * 1.8 + 1.9 * exp(-position / 14) + 4 / position + beyond
        rows.append(Row(measure="loss_at_position", value=loss, low=loss - 0.03,
                        high=loss + 0.03, n=900, position=position))  # fmt: skip
    return replace(_about(arch, "tiny"), corpus="sotu", tokens=122880), rows


def _decode(arch: str, batch: int, noise: np.random.Generator) -> tuple[About, list[Row]]:
    rows = []
    for context in CONTEXTS:
        moved, flops = _step(arch, "70m", batch, context)
        predicted = max(moved / BANDWIDTH, flops / RATE) * 1e3
        tpot = predicted * (1.1 + abs(noise.normal()) * 0.15) + 1.4
        at = {"batch": batch, "context": context}
        rows += [
            Row(measure="tpot_ms", value=tpot * 1.02, n=12, **at),
            Row(measure="tpot_p50_ms", value=tpot, n=12, **at),
            Row(measure="output_tok_per_s", value=batch * 1e3 / (tpot * 1.02), **at),
            Row(measure="tpot_pred_ms", value=predicted, **at),
            Row(measure="held_weight_bytes", value=4 * PARAMS["70m"], **at),
            Row(measure="mbu", value=moved / (tpot * 1e-3) / BANDWIDTH, **at),
            Row(measure="step_bytes", value=moved, **at),
            Row(measure="step_flops", value=flops, **at),
            Row(measure="arith_intensity_pred", value=flops / moved, **at),
        ]
        if batch == 1:
            again = tpot + context * 0.02 + context**2 * 1e-6
            rows.append(Row(measure="cached_tpot_ms", value=tpot, **at))
            rows.append(Row(measure="nocache_tpot_ms", value=again, **at))
    rows.append(Row(measure="ttft_ms", value=90 + noise.normal(), batch=batch, context=512))
    return _about(arch, "70m"), rows
