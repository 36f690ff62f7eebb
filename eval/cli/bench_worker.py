"""Times the points that another process names: a line of JSON each, answered by one.

A question has the arguments of `decodebench_pytest.DecodeBench`; an answer has `step_s` and `info`
(our measures by their names), or one of `skipped`, `failed` and `error` with the reason.
"""

import json
import os
import sys
from functools import cache
from typing import Any

import torch

from archs.backends import resolve_backend
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.cli.options import resolve_device
from eval.measure.decode_plans import DecodePlan
from eval.measure.plan import decode_point
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.measure.steps import by_context
from eval.results.rows import Status

Answer = dict[str, Any]


def answer(
    *, arch: str, batch: int, context: int, scale: str, device: str, backend: str, compiled: bool,
    rounds: int, weights: str = "", state: str = "", replay: int = 0,
) -> Answer:  # fmt: skip
    """One point: correctness, then `rounds` steps from `context` tokens on. Raises UserError."""
    where = resolve_device(device)
    resolve_backend(backend, where)
    plan = DecodePlan(
        scale=scale, batches=(batch,), contexts=(context,), steps=rounds, compiled=compiled,
        backend=backend, weights=weights, state=state, replay=replay,
    )  # fmt: skip
    spec = ModelSpec(arch=arch, scale=get_scale(scale))
    point = decode_point(spec, plan, batch, where.type)
    found = measure(point, _site(where))
    failure = found.failure
    if failure is not None:
        kind = {Status.UNSUPPORTED: "skipped", Status.INCORRECT: "failed"}
        return {kind.get(failure.status, "error"): failure.note}
    [row], [timed] = by_context(point, found), found.steps
    info = {**row, "device": str(where)}
    return {"step_s": [ms / 1e3 for ms in timed.step_ms], "info": info}


@cache
def _site(device: torch.device) -> Site:
    return Site(None, device)


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
