"""Servers simulated: any architecture, part and memory under a workload, on the predicted clock."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product

from archs.checks import require_some
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure.serve_plan import GIB, Served, ServePlan, loads, serve
from eval.measure.workload import Workload, silent_voice
from eval.predict.accelerators import hardware_of
from eval.predict.fit import RESERVE
from eval.predict.roofline import Prediction, calls_on, outline_on, resident_bytes, stored_as
from eval.predict.serving import ClockExecutor, StepTimes
from infer.capacity import Capacity
from infer.memory import DoesNotFitError
from infer.policy import Policy


def simulate(
    archs: Iterable[str], workload: str = "chat", *, requests: int = 0, scale: str = "8b",
    hardware: Sequence[str] = ("h100",), memory_gib: float | None = None,
    max_sequences: int = 256, max_context: int = 0, page_size: int = 64,
    token_budget: int = 2048, batching: Sequence[str] = ("continuous",),
    allocation: str = "paged", prefix_cache: bool = False, checkpoint_every: Sequence[int] = (0,),
    checkpoints: int = 0, rates_per_s: Sequence[float] = (), sweep: bool = False,
    slo_ttft_ms: float = 1000.0, slo_tpot_ms: float = 100.0, host_ms: float = 0.0,
    dtype: str = "bfloat16", launch_us: float | None = None, weights: str = "",
    state: str = "",
) -> list[Prediction]:  # fmt: skip
    """One row per architecture, part, policy, checkpoint interval and arrival rate, with the
    Measures' names.

    memory_gib: of weights and state on one device; None: nine tenths of what the part has.
    host_ms: the host's own work for a step, added to each. Otherwise as `ServePlan`. What does not
    fit is a row with a `note` and no figures. Raises UserError on unknown names, impossible values,
    and where nothing fits.
    """
    archs, hardware = list(archs), list(hardware)
    require_some("archs", archs)
    require_some("hardware", hardware)
    require_some("checkpoint_every", list(checkpoint_every))
    rows: list[Prediction] = []
    batches = [1 << n for n in range(7)]
    stored, dtype = stored_as(weights, dtype)
    for part in (hardware_of(key, dtype, batches, launch_us, stored) for key in hardware):
        memory = part.memory_bytes * (1 - RESERVE) / GIB if memory_gib is None else memory_gib
        plans = [
            ServePlan(
                scale=scale, workload=workload, requests=requests, memory_gib=memory,
                max_sequences=max_sequences, max_context=max_context, page_size=page_size,
                token_budget=token_budget, batching=tuple(batching), allocation=allocation,
                prefix_cache=prefix_cache, checkpoint_every=every, checkpoints=checkpoints,
                rates_per_s=tuple(rates_per_s),
                sweep=sweep, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms,
            )
            for every in checkpoint_every
        ]  # fmt: skip
        plan, given = plans[0], plans[0].load
        for arch in archs:
            spec = ModelSpec(arch=arch, scale=get_scale(scale))
            rated, model = outline_on(part, spec, stored, state)
            about: Prediction = {"arch": arch, "scale": scale, "hardware": part.key}
            try:
                capacity = plan.capacity(model, given, resident_bytes(model))
            except DoesNotFitError as why:
                rows.append({**about, "launches_from": part.launches_from, "note": str(why)})
                continue
            calls = calls_on(part, spec, stored, state)
            times = StepTimes(
                model, rated.roofline, max_context=capacity.max_context, host_ms=host_ms,
                calls=calls.at(capacity.max_context // 2) if calls else None,
            )  # fmt: skip
            for plan, name in product(plans, batching):
                policy = plan.policy(name)
                clocked = partial(_clocked, times, capacity, policy)
                for load, served in loads(plan, given, clocked):
                    rows.append(
                        {
                            **about, "batching": policy.batching,
                            "checkpoint_every": policy.checkpoint_every,
                            "arrival_req_per_s": load.rate_per_s or None,
                            "max_sequences": capacity.max_sequences,
                            **served.log.figures(served.answers, plan.limits),
                            "saturated": served.saturated,
                            "launches_from": part.launches_from, "note": "",
                        }
                    )  # fmt: skip
    if all(row["note"] for row in rows):
        raise UserError(str(rows[0]["note"]))
    return rows


def _clocked(times: StepTimes, capacity: Capacity, policy: Policy, load: Workload) -> Served:
    return serve(ClockExecutor(times), capacity, policy, load, silent_voice)
