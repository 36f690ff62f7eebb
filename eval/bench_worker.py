"""Times the points that another process names: a line of JSON each, answered by one.

A question has the arguments of `decodebench_pytest.DecodeBench`; an answer has `step_s` and `info`
(our measures by their names), or one of `skipped`, `failed` and `error` with the reason.
"""

import json
import os
import sys
from functools import lru_cache
from typing import Any

import torch

from archs.backbone import Model
from archs.backends import NoFormError, resolve_backend
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.agreement import agreement
from eval.cell_rows import load_rows
from eval.decode import build_to_serve, decode_cost, measure_decode
from eval.neighbours import Neighbours
from eval.options import resolve_device

Answer = dict[str, Any]


def answer(
    *, arch: str, batch: int, context: int, scale: str, device: str, backend: str, compiled: bool,
    rounds: int,
) -> Answer:  # fmt: skip
    """One point: correctness, then `rounds` steps from `context` tokens on. Raises UserError."""
    where = resolve_device(device)
    chosen = resolve_backend(backend, where)
    model = _model(arch, scale, str(where))
    try:
        found = agreement(
            model, context=context, batches=(batch,), backend=chosen, compiled=compiled
        )
    except NoFormError as why:
        return {"skipped": str(why)}
    if not found.holds:
        return {"failed": found.why_not}
    with Neighbours() as others:
        [timing] = measure_decode(
            model, batch=batch, contexts=[context], steps=rounds, backend=chosen, compiled=compiled
        )
    cost = decode_cost(model, batch, timing.context)
    info: dict[str, object] = {
        "arch": arch, "scale": scale, "batch": batch, "context": timing.context,
        "kernel_backend": "torch-compile" if compiled else chosen, "device": str(where),
        "state_bytes": timing.state_bytes,
        "tpot_ms": timing.tpot_ms, "tpot_p50_ms": timing.percentile_ms(50),
        "output_tok_per_s": timing.output_tok_per_s,
        "step_bytes": cost.bytes, "step_flops": cost.flops,
        "arith_intensity_pred": cost.intensity_flop_per_byte,
        **{row.measure: row.value for row in load_rows(others.share)},
    }  # fmt: skip
    return {"step_s": [ms / 1e3 for ms in timing.step_ms], "info": info}


@lru_cache(maxsize=2)
def _model(arch: str, scale: str, device: str) -> Model:
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    return build_to_serve(ModelSpec(arch=arch, scale=get_scale(scale)), where, dtype)


def _main() -> None:
    # What libraries print must not stand between the answers.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            said = answer(**json.loads(line))
        except UserError as error:
            said = {"error": str(error)}
        print(json.dumps(said), file=told, flush=True)


if __name__ == "__main__":
    _main()
