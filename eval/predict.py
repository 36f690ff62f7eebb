"""What any architecture would cost to decode on any hardware, from declarations alone.

Each operation takes the longer of its bytes at the bandwidth and its FLOPs at the rate, and a
launch; their sum is the step. No weights are made, so any scale, batch and context is answered at
once. Figures of the table's parts rest on datasheets: they are the least a step can take.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from archs.backbone import Model
from archs.checks import require_at_least, require_positive, require_some
from archs.cost import Cost, OpCost, Step
from archs.errors import UserError, unknown_name
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.accelerators import Hardware, hardware_of
from eval.hardware import Roofline

Prediction = dict[str, object]


def predict(
    archs: Iterable[str],
    scale: str,
    hardware: Iterable[str],
    batches: Iterable[int],
    contexts: Iterable[int],
    *,
    dtype: str = "bfloat16",
    launch_us: float = 0.0,
    price_per_hour: Mapping[str, float] | None = None,
) -> list[Prediction]:
    """One row per architecture, hardware, batch and context, with the Measures' names.

    launch_us: what every operation costs beside its work, on top of what was measured of this
    machine. price_per_hour: by hardware key.
    `fits` says whether weights and states of the batch fit in the part's memory,
    `max_sequences` how many would; a batch that does not fit has no price. Raises UserError on
    unknown names.
    """
    hardware = list(hardware)
    prices = price_per_hour or {}
    require_prices(prices, hardware)
    require_at_least("launch_us", launch_us, 0)
    rows = []
    for arch, model, part, step in _grid(archs, scale, hardware, batches, contexts, dtype):
        cost = model.cost(step)
        tpot_ms = step_ms(cost, part.roofline, launch_us)
        state_bytes = model.state_bytes(step.context)
        sequences = room(part, resident_bytes(model), state_bytes)
        fits = sequences is None or sequences >= step.batch
        row: Prediction = {
            "arch": arch, "scale": scale, "hardware": part.key, "batch": step.batch,
            "context": step.context, "dtype": str(part.roofline.dtype).removeprefix("torch."),
            "state_bytes": state_bytes, "weight_bytes": cost.weight_bytes,
            "step_bytes": cost.bytes, "step_flops": cost.flops,
            "arith_intensity_pred": cost.intensity_flop_per_byte,
            "ridge_flop_per_byte": part.roofline.ridge_flop_per_byte, "tpot_ms": tpot_ms,
            "output_tok_per_s": 1e3 * step.batch / tpot_ms,
            "output_tok_per_s_per_user": 1e3 / tpot_ms,
            "bound_by": bound_by(cost, part.roofline, launch_us),
            "max_sequences": sequences, "fits": fits,
        }  # fmt: skip
        if part.key in prices:
            usd = usd_per_million_tok(prices[part.key], tpot_ms, step.batch)
            row["usd_per_million_tok"] = usd if fits else None
        rows.append(row)
    return rows


def predict_ops(
    archs: Iterable[str],
    scale: str,
    hardware: Iterable[str],
    batches: Iterable[int],
    contexts: Iterable[int],
    *,
    dtype: str = "bfloat16",
    launch_us: float = 0.0,
) -> list[Prediction]:
    """One row per operation of a step, equal ones of different layers together.

    `compute_bound_batch` is the batch from which the operation is bound by compute: the ridge for
    a bare product with weights, none where every sequence brings bytes of its own.
    """
    require_at_least("launch_us", launch_us, 0)
    rows: list[Prediction] = []
    for arch, model, part, step in _grid(archs, scale, hardware, batches, contexts, dtype):
        ops = Counter(model.cost(step).ops)
        for op, count in ops.items():
            time_ms = count * op_ms(op, part.roofline, launch_us)
            rows.append(
                {
                    "arch": arch, "scale": scale, "hardware": part.key, "batch": step.batch,
                    "context": step.context, "op": op.name, "count": count,
                    "step_bytes": count * op.bytes, "step_flops": count * op.flops,
                    "arith_intensity_pred": op.intensity_flop_per_byte,
                    "ridge_flop_per_byte": part.roofline.ridge_flop_per_byte,
                    "time_ms": time_ms,
                    "bound_by": bound_by(Cost.of(op), part.roofline, launch_us),
                    "compute_bound_batch": compute_bound_batch(op, step.batch, part.roofline),
                }
            )  # fmt: skip
    return rows


def _grid(
    archs: Iterable[str],
    scale: str,
    hardware: Iterable[str],
    batches: Iterable[int],
    contexts: Iterable[int],
    dtype: str,
) -> Iterator[tuple[str, Model, Hardware, Step]]:
    archs, hardware = list(archs), list(hardware)
    batches, contexts = list(batches), list(contexts)
    require_grid(archs=archs, hardware=hardware, batches=batches, contexts=contexts)
    parts = [hardware_of(key, dtype, batches) for key in hardware]
    steps = [Step(b, 1, c) for b in batches for c in contexts]
    shape = get_scale(scale)
    for arch in archs:
        for part in parts:
            model = ModelSpec(arch=arch, scale=shape).outline(part.roofline.dtype)
            for step in steps:
                yield arch, model, part, step


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


def op_ms(op: OpCost, roofline: Roofline, launch_us: float = 0.0) -> float:
    """Time of one operation; launch_us comes on top of what the roofline knows of launches."""
    return roofline.time_ms(op.flops, op.bytes, op.rows) + launch_us / 1e3


def step_ms(
    cost: Cost, roofline: Roofline, launch_us: float = 0.0, *, calls: int | None = None
) -> float:
    """Time of a step, operations one after the other.

    calls: launches where they were counted; None: each operation of the cost is one.
    """
    more = 0 if calls is None else max(0, calls - len(cost.ops))
    return sum(op_ms(op, roofline, launch_us) for op in cost.ops) + more * roofline.call_us / 1e3


def bound_by(cost: Cost, roofline: Roofline, launch_us: float = 0.0) -> str:
    """What most of the time goes to: weights, state, compute or launches."""
    spent = {"weights": 0.0, "state": 0.0, "compute": 0.0, "launches": 0.0}
    for op in cost.ops:
        launch_ms = (roofline.launch_us(op.rows) + launch_us) / 1e3
        work_ms = op_ms(op, roofline, launch_us) - launch_ms
        memory_ms = op.bytes / roofline.bytes_per_s(op.rows) * 1e3
        spent["launches"] += launch_ms
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
    return ridge * op.weight_bytes / gain if gain > 0 and op.weight_bytes else None


def resident_bytes(model: Model) -> int:
    """Bytes of all weights in memory, whether a step reads them or not."""
    return sum(p.nbytes for p in model.parameters())


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
