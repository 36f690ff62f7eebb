"""The proof on the stand-in, in a process of its own; writes what happened as JSON.

`python -m eval.proof.gpu.standin.run REPORT --out DIR --cache DIR [--ops a,b] [--archs gqa,gdn]
[--points 1b:1:4096,...] [--baselines]`. With --ops only those are checked and timed, and no steps
unless --points names some. Statuses are of what ran; errors of 0 and times of 1 ms mean nothing.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.proof.gpu.standin.load import load


def main(words: Sequence[str]) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="eval.proof.gpu.standin.run")
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--ops", default=None)
    parser.add_argument("--archs", default=None)
    parser.add_argument("--points", default=None)
    parser.add_argument("--baselines", action="store_true")
    given = parser.parse_args(words)
    load()
    report = _run(given)
    given.report.write_text(json.dumps(report), encoding="utf-8")
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from triton import knobs

    from archs.names import names_in
    from eval.measure.progress import Progress
    from eval.proof.gpu import decode_grid, proof
    from eval.proof.gpu.ops import OPS
    from eval.proof.gpu.standin import device, driver

    torch.set_num_threads(1)
    record = device.Record()
    device.install(record)
    made = driver.install(record)
    knobs.cache.dir = str(given.cache)
    cells: list[dict[str, Any]] = []
    _stub(record, given.baselines)
    _watch(record, cells)
    names = given.ops.split(",") if given.ops else []
    if given.points:
        decode_grid.POINTS = tuple(
            (scale, int(batch), int(context))
            for scale, batch, context in (p.split(":") for p in given.points.split(","))
        )
    if given.archs:
        decode_grid.ARCHS = tuple(names_in(given.archs))
    with device.Mode(record):
        made_proof = proof.Proof(
            list(proof.chosen(OPS, names)), given.out, device.GPU, budget_s=None,
            progress=Progress(Console(stderr=True)), workers=0,
        )  # fmt: skip
        made_proof.check()
        made_proof.bench()
        if given.baselines:
            made_proof.bench_late()
        if given.points or not names:
            for backend in (proof.OURS, "sdpa")[: 1 + given.baselines]:
                made_proof.decode_grid(backends=(backend,))
        statuses = {
            name: [f"{' '.join(r[k] for k in table.key)}: {r['status']} {r['note']}".strip()
                   for r in table.rows if r["status"] != "ok"]
            for name, table in (("checks", made_proof.checks), ("kernels", made_proof.timings),
                                ("decode", made_proof.decode))
        }  # fmt: skip
    gc.collect()
    return {
        "not_ok": statuses, "cells": cells, "kernels": made.kernels, "launchers": made.launchers,
        "compile_s": made.compile_s, "misses": made.misses, "faults": record.faults,
        "launches": dict(record.launches), "left_bytes": record.live_bytes,
    }  # fmt: skip


def _stub(record: Any, baselines: bool) -> None:
    """What needs values, or would spend time on them."""
    import torch
    from torch import Tensor, nn

    import archs.registry
    import eval.measure.agreement
    from archs.backbone import Model
    from eval.predict import cold
    from eval.proof.gpu import case, proof
    from eval.proof.gpu.ops import attention
    from eval.proof.gpu.standin.device import GPU
    from kernels.sampling import sample

    def distance(got: Tensor, expected: Tensor) -> float:
        if got.shape != expected.shape:
            raise ValueError(f"shape {list(got.shape)}, expected {list(expected.shape)}")
        return 0.0

    def build(self: archs.registry.ModelSpec, *, seed: int = 0, device: str = "cpu",
              dtype: torch.dtype = torch.float32) -> Model:  # fmt: skip
        model = self.outline(dtype)
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    made = torch.empty(p.shape, dtype=p.dtype, device=GPU)
                    module._parameters[name] = nn.Parameter(made, p.requires_grad)
        return model

    def truth(model: Model, ids: Tensor, first: int) -> Tensor:
        return model.embedding.weight.new_empty(
            ids.shape[0], ids.shape[1] - first, model.vocab_size
        )

    def hidden(model: Model, tokens: Tensor) -> Tensor:
        return model.embedding.weight.new_empty(*tokens.shape, model.embedding.weight.shape[1])

    def tokens(logits: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros(len(logits), dtype=torch.int64)

    def attended(q: Tensor, k: Tensor, v: Tensor | None, *_: Tensor, **__: object) -> Tensor:
        # Latent queries are as wide as values; their pool stands third. Keys may be the values.
        width = q.shape[-1] if v is None or k.dim() == 4 else v.shape[-1]
        return torch.zeros(*q.shape[:3], width, dtype=torch.float64)

    replaced: list[tuple[Any, str, object]] = [
        *((attention, f"{op}_ref", attended)
          for op in ("attention_decode", "attention_prefill", "mla_decode")),
        (sample, "greedy_ref", tokens), (sample, "top_p_ref", tokens),
        (case, "_distance", distance), (cold, "WARM_UP_S", 0.0),
        (attention, "_compiled_flex", lambda: lambda q, k, v, **_: torch.empty_like(q)),
        (archs.registry.ModelSpec, "build", build),
        (Model, "hidden_states", hidden), (eval.measure.agreement, "exact_logits", truth),
        (eval.measure.agreement, "_error", lambda *_: 0.0),
    ]  # fmt: skip
    if not baselines:
        whole: Callable[..., Mapping[str, Any]] = proof._build
        replaced.append((proof, "_build", lambda c, d: {proof.OURS: whole(c, d)[proof.OURS]}))
    for owner, name, stub in replaced:
        setattr(owner, name, stub)


def _watch(record: Any, cells: list[dict[str, Any]]) -> None:
    """Note of each decode point what it launched in its capture and what memory it took."""
    from collections import Counter

    from eval.measure.site import Site
    from eval.proof.gpu import proof
    from eval.proof.gpu.decode_grid import Place

    real = vars(proof)["row_of"]

    def row_of(place: Place, site: Site) -> dict[str, object]:
        captured, faults = Counter(record.captured), len(record.faults)
        record.peak_bytes = record.live_bytes
        row = real(place, site)
        weights = sum(p.nbytes for p in site._served[1].parameters()) if site._served else 0
        cells.append({
            **place.key, "status": row["status"], "weight_bytes": weights,
            "left_bytes": record.live_bytes, "peak_bytes": record.peak_bytes,
            "state_bytes": row.get("state_bytes", 0), "faults": record.faults[faults:],
            "captured": dict(record.captured - captured),
        })  # fmt: skip
        return row

    vars(proof)["row_of"] = row_of


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
