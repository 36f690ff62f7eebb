"""Predicted cost of decoding any architecture on any hardware, from declarations alone.

Each operation takes the longer of its bytes at the bandwidth and its FLOPs at the rate, and a
launch; their sum is the step. No weights are made, so any scale, batch and context is answered at
once. On a CPU every operation of torch's is a launch, and states in few bits are copied as numbers
first: launches of a step are counted on a narrow model, and the rates of such copies are measured.
Rates of the table's parts rest on datasheets, and what does not fit in memory takes no time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from archs.backbone import Model
from archs.checks import require_at_least, require_positive, require_some
from archs.cost import Cost, OpCost, Step
from archs.errors import UserError, unknown_name
from archs.ops.matrix import weights_of
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep, store
from archs.weights import WeightFormat
from eval.predict.accelerators import Hardware, hardware_of
from eval.predict.calls import StepCalls
from eval.predict.coding import with_codings
from eval.predict.machine import Roofline

Prediction = dict[str, object]

#: What a row says of every output token.
PER_TOKEN = ("tpot_ms", "output_tok_per_s", "output_tok_per_s_per_user", "usd_per_million_tok")

#: The default hardware, batches and contexts of predictions.
SCALE = "8b"
CONTEXTS = (1024, 16384)


def predict(
    archs: Iterable[str], scale: str = SCALE, hardware: Iterable[str] = ("h100",),
    batches: Iterable[int] = (1,), contexts: Iterable[int] = CONTEXTS, *, dtype: str = "bfloat16",
    launch_us: float | None = None, price_per_hour: Mapping[str, float] | None = None,
    weights: str = "", state: str = "", replay: int = 0, new_tokens: Iterable[int] = (1,),
) -> list[Prediction]:  # fmt: skip
    """One row per architecture, hardware, batch, context and tokens in a step, with the Measures'
    names.

    weights: the format that they are stored in (`archs.weights`), which says the dtype of all
    else, too; "": plain numbers of `dtype`. state: the format that states are kept in, as far as an
    architecture has them (`archs.state_formats`); "": as they are computed. replay: inputs in a
    ring from which recurrent states are computed anew, and written once in so many steps; 0: at
    every step. The cost is the mean over many steps.
    launch_us: fixed overhead of every operation; None: the measured one
    (`launches_from`). price_per_hour: by hardware key.
    `step_calls`: launches where they were counted; None: one for each operation of the cost.
    `fits` says whether weights and states of the batch fit in the part's memory,
    `max_sequences` how many would; a batch that does not fit has no times and no price, and `note`
    says so. Raises UserError on unknown names, and on a ring that holds less than two steps.
    """
    hardware = list(hardware)
    prices = price_per_hour or {}
    require_prices(prices, hardware)
    rows = []
    grid = _grid(
        archs, scale, hardware, batches, contexts, new_tokens, dtype, launch_us, weights, state,
        replay,
    )  # fmt: skip
    for arch, model, part, step, calls in grid:
        cost = model.cost(step, all_logits=True)
        state_bytes = model.state_bytes(step.context, lookback=step.lookback, replay=replay)
        sequences = room(part, resident_bytes(model), state_bytes)
        row: Prediction = {
            "arch": arch, "scale": scale, "hardware": part.key, "batch": step.batch,
            "context": step.context, "new_tokens": step.new_tokens,
            "dtype": str(part.roofline.dtype).removeprefix("torch."),
            "weight_format": model.weight_format, "state_format": model.state_format,
            "replay": replay, "state_bytes": state_bytes, "weight_bytes": cost.weight_bytes,
            "step_bytes": cost.bytes, "step_flops": cost.flops,
            "arith_intensity_pred": cost.intensity_flop_per_byte,
            "ridge_flop_per_byte": part.roofline.ridge_flop_per_byte,
            "product_launch_us": part.roofline.launch_us(step.tokens),
            "call_us": part.roofline.call_us, "launches_from": part.launches_from,
            "step_calls": calls, "bound_by": bound_by(cost, part.roofline, calls=calls),
        }  # fmt: skip
        time_ms = step_ms(cost, part.roofline, calls=calls)
        row |= served(step.batch, time_ms, sequences, prices.get(part.key))
        if step.new_tokens > 1:
            row |= {name: None for name in PER_TOKEN if name in row}
            row["time_ms"] = time_ms if row["fits"] else None
        rows.append(row)
    return rows


def served(
    batch: int, tpot_ms: float, sequences: int | None, price_per_hour: float | None
) -> Prediction:
    """Times, and the cost at a price, of a batch; `sequences` fit in memory (None: any).

    They are None for a batch that does not fit, and `note` says why.
    """
    fits = sequences is None or sequences >= batch
    times: Prediction = {
        "tpot_ms": tpot_ms, "output_tok_per_s": 1e3 * batch / tpot_ms,
        "output_tok_per_s_per_user": 1e3 / tpot_ms,
    }  # fmt: skip
    if price_per_hour is not None:
        times["usd_per_million_tok"] = usd_per_million_tok(price_per_hour, tpot_ms, batch)
    if fits:
        return {**times, "max_sequences": sequences, "fits": True, "note": ""}
    note = f"does not fit; {sequences:,} would" if sequences else "not one sequence fits"
    return {**dict.fromkeys(times), "max_sequences": sequences, "fits": False, "note": note}


def predict_ops(
    archs: Iterable[str], scale: str = SCALE, hardware: Iterable[str] = ("h100",),
    batches: Iterable[int] = (1,), contexts: Iterable[int] = CONTEXTS, *, dtype: str = "bfloat16",
    launch_us: float | None = None, weights: str = "", state: str = "", replay: int = 0,
    new_tokens: Iterable[int] = (1,),
) -> list[Prediction]:  # fmt: skip
    """One row per operation of a step; equal ones of different layers are added up.

    weights, state, replay, new_tokens: as `predict`'s. Launches that were counted beside one for
    each operation are an operation of their own, `other calls`.
    `compute_bound_batch` is the batch from which the operation is bound by compute: the ridge for
    a bare product with weights, none where every sequence brings bytes of its own.
    """
    rows: list[Prediction] = []
    grid = _grid(
        archs, scale, hardware, batches, contexts, new_tokens, dtype, launch_us, weights, state,
        replay,
    )  # fmt: skip
    for arch, model, part, step, calls in grid:
        cost = model.cost(step, all_logits=True)
        ops = Counter(cost.ops)
        if more := other_calls(cost, calls):
            ops[OpCost(name="other calls")] = more
        for op, count in ops.items():
            time_ms = count * op_ms(op, part.roofline)
            rows.append(
                {
                    "arch": arch, "scale": scale, "hardware": part.key, "batch": step.batch,
                    "context": step.context, "new_tokens": step.new_tokens, "op": op.name,
                    "count": count,
                    "step_bytes": count * op.bytes, "step_flops": count * op.flops,
                    "arith_intensity_pred": op.intensity_flop_per_byte,
                    "ridge_flop_per_byte": part.roofline.ridge_flop_per_byte,
                    "launches_from": part.launches_from, "time_ms": time_ms,
                    "bound_by": bound_by(Cost.of(op), part.roofline),
                    "compute_bound_batch": compute_bound_batch(op, step.batch, part.roofline),
                }
            )  # fmt: skip
    return rows


def _grid(
    archs: Iterable[str], scale: str, hardware: Iterable[str], batches: Iterable[int],
    contexts: Iterable[int], new_tokens: Iterable[int], dtype: str, launch_us: float | None,
    weights: str, state: str, replay: int,
) -> Iterator[tuple[str, Model, Hardware, Step, int | None]]:  # fmt: skip
    archs, hardware = list(archs), list(hardware)
    batches, contexts, new_tokens = list(batches), list(contexts), list(new_tokens)
    require_grid(archs=archs, hardware=hardware, batches=batches, contexts=contexts)
    require_some("new_tokens", new_tokens)
    require_at_least("new_tokens", new_tokens, 1)
    stored, dtype = stored_as(weights, dtype)
    steps = [Step(b, k, c, k - 1, replay) for b in batches for c in contexts for k in new_tokens]
    tokens = sorted({step.tokens for step in steps})
    parts = [hardware_of(key, dtype, tokens, launch_us, stored) for key in hardware]
    shape = get_scale(scale)
    for arch in archs:
        for part in parts:
            spec = ModelSpec(arch=arch, scale=shape)
            rated, model = outline_on(part, spec, stored, state)
            counted = calls_on(part, spec, stored, state, replay)
            for step in steps:
                calls = counted.at(step.context, step.new_tokens) if counted else None
                yield arch, model, rated, step, calls


def stored_as(weights: str, dtype: str) -> tuple[WeightFormat | None, str]:
    """The format of that name, None for "", and the dtype of all that it does not store.

    Raises UserError on an unknown format.
    """
    stored = WeightFormat.named(weights) if weights else None
    return stored, dtype if stored is None else str(stored.dtype).removeprefix("torch.")


def outline_on(
    part: Hardware, spec: ModelSpec, stored: WeightFormat | None, state: str = ""
) -> tuple[Hardware, Model]:
    """A model without storage in the dtype of a part's rates, its weights as they are stored, its
    state as it is kept; and the part, where torch codes that state with the rates at which it does.
    """
    model = keep(spec.outline(part.roofline.dtype), StateFormat.named(state))
    if part.as_written:
        rates = with_codings(part.roofline, torch.device("cpu"), model.state_specs())
        part = replace(part, roofline=rates)
    return part, model if stored is None else store(model, stored)


def calls_on(
    part: Hardware, spec: ModelSpec, stored: WeightFormat | None, state: str = "", replay: int = 0,
    *, head: bool = False,
) -> StepCalls | None:  # fmt: skip
    """Launches of its steps, or of its head's, to be counted; None on a part where each operation
    is one.
    """
    return StepCalls(spec, stored, state, replay, head) if part.as_written else None


def require_grid(
    *, batches: Sequence[int], contexts: Sequence[int] = (0,), **names: Sequence[str]
) -> None:
    """Raise UserError unless every list has entries, each once, and counts that can be."""
    for name, values in (*names.items(), ("batches", batches), ("contexts", contexts)):
        require_some(name, values)
    require_at_least("batches", list(batches), 1)
    require_at_least("contexts", list(contexts), 0)


def require_prices(prices: Mapping[str, float], hardware: Iterable[str]) -> None:
    """Raise UserError on prices that are not positive, or of parts that are not asked for."""
    for part, price in prices.items():
        require_positive(f"price of '{part}'", price)
        if part not in hardware:
            raise unknown_name("part with a price", part, hardware)


def op_ms(op: OpCost, roofline: Roofline) -> float:
    """Time of one operation, its launch and what of its state is coded included."""
    worked_ms = roofline.time_ms(op.flops, op.bytes, op.rows, op.storage)
    return worked_ms + roofline.coding_ms(op.coded)


def step_ms(cost: Cost, roofline: Roofline, *, calls: int | None = None) -> float:
    """Time of a step, operations one after the other.

    calls: launches where they were counted; None: each operation of the cost is one.
    """
    more = other_calls(cost, calls)
    return sum(op_ms(op, roofline) for op in cost.ops) + more * roofline.call_us / 1e3


def other_calls(cost: Cost, calls: int | None) -> int:
    """Of the launches that were counted (None: they were not) those beside one an operation."""
    return 0 if calls is None else max(0, calls - len(cost.ops))


def bound_by(cost: Cost, roofline: Roofline, *, calls: int | None = None) -> str:
    """What most of the time goes to: weights, state, compute or launches; calls: as `step_ms`'s."""
    spent = {"weights": 0.0, "state": 0.0, "compute": 0.0}
    spent["launches"] = other_calls(cost, calls) * roofline.call_us / 1e3
    for op in cost.ops:
        launch_ms = roofline.launch_us(op.rows, op.storage) / 1e3
        coding_ms = roofline.coding_ms(op.coded)
        work_ms = op_ms(op, roofline) - launch_ms - coding_ms
        memory_ms = op.bytes / roofline.bytes_per_s(op.rows, op.storage) * 1e3
        spent["launches"] += launch_ms
        spent["state"] += coding_ms
        if work_ms > memory_ms * (1 + 1e-9):
            spent["compute"] += work_ms
        else:
            spent["weights"] += work_ms * op.weight_bytes / max(op.bytes, 1)
            spent["state"] += work_ms * (1 - op.weight_bytes / max(op.bytes, 1))
    return max(spent, key=lambda k: spent[k])


def compute_bound_batch(op: OpCost, batch: int, roofline: Roofline) -> float | None:
    """The batch b with flops(b) = ridge · bytes(b); both grow by what one sequence brings."""
    ridge = roofline.ridge_flop_per_byte
    gain = (op.flops - ridge * (op.bytes - op.weight_bytes)) / batch
    held = max(op.weight_bytes, op.held_bytes)
    return ridge * held / gain if gain > 0 and held else None


def resident_bytes(model: Model, *, beside: Model | None = None) -> int:
    """Bytes of all weights in memory, whether a step reads them or not; beside another model, of
    those that it does not share.
    """
    held = set() if beside is None else set(map(id, weights_of(beside)))
    return sum(w.nbytes for w in weights_of(model) if id(w) not in held)


def room(part: Hardware, weight_bytes: float, state_bytes: float) -> int | None:
    """How many sequences fit beside the weights; None where they all do, having no state."""
    left = part.memory_bytes - weight_bytes
    if left < 0:
        return 0
    return int(left // state_bytes) if state_bytes else None


def usd_per_million_tok(price_per_hour: float, tpot_ms: float, batch: int) -> float:
    """$ per hour over tokens per hour, for a million of them."""
    return price_per_hour / 3.6e6 * tpot_ms / batch * 1e6


def parse_counts(text: str) -> list[int]:
    """`1,8,64`, or `1:512` for powers of two; k and m are 1,024 and 1,048,576."""
    counts: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        low = _count(first)
        high = _count(last) if colon else low
        if high < low:
            raise UserError(f"range '{part}' ends before it begins; write low:high")
        while low <= high:
            counts.append(low)
            low *= 2
    return counts


def _count(text: str) -> int:
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) < 1:
        raise UserError(f"'{text}' is not a positive count; write for example 1, 64, 4k or 1:512")
    return int(digits) * factor
