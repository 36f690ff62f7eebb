"""Which architecture under a latency limit: the largest batch that fits and is fast enough.

For each architecture, part and context: the batch, on how many GPUs of one machine, that gives most
tokens per second and GPU while the predicted time per token stays under the limit and weights and
state fit in memory, of which a share is kept for everything else. More machines serve more requests
at the same latency, and the same tokens per second and GPU.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt

from archs.checks import require_at_least, require_positive
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import Scale, get_scale
from eval.predict.accelerators import Hardware, hardware_of
from eval.predict.roofline import (
    CONTEXTS,
    SCALE,
    Prediction,
    calls_on,
    outline_on,
    require_grid,
    require_prices,
    room,
    stored_as,
    usd_per_million_tok,
)
from eval.predict.split import Split

#: GPUs that a link joins in one machine.
MOST_GPUS = 8
#: Share of memory for activations, workspaces, the runtime and pages that are not full.
RESERVE = 0.1
#: Larger batches are not looked at.
MOST_SEQUENCES = 1 << 20
#: Rows of GEMMs that are measured when this machine is one of the parts.
MEASURED_ROWS = (1, 8, 64)


def fit(
    archs: Iterable[str] = (*REGISTRY, *HYBRIDS), *, tpot_ms: float, scale: str = SCALE,
    hardware: Iterable[str] = ("h100",), contexts: Iterable[int] = CONTEXTS,
    memory_bytes: float | None = None, gpus: int = MOST_GPUS, reserve: float = RESERVE,
    dtype: str = "bfloat16", launch_us: float | None = None,
    price_per_hour: Mapping[str, float] | None = None, weights: str = "", state: str = "",
    replay: int = 0,
) -> list[Prediction]:  # fmt: skip
    """One row per architecture, part and context, the best of each context first.

    tpot_ms: the limit. memory_bytes: of each GPU at most this much is used; None: all there is.
    gpus: most of them that one model is split over. reserve: share of memory that is kept free.
    price_per_hour: of one GPU, by hardware key. weights, state, replay: as `predict`'s.

    `rank` is by tokens per second and GPU, or by $ where every part has a price. `least_gpus` is
    the fewest GPUs that keep the limit at all. `limited_by` says what keeps the batch from being
    larger: time or memory. Where nothing keeps the limit the row has no batch and no rank, and
    `over` and `note` say by how much which of the two is exceeded. Raises UserError on unknown
    names and impossible values.
    """
    archs, hardware, contexts = list(archs), list(hardware), list(contexts)
    require_grid(archs=archs, hardware=hardware, batches=(1,), contexts=contexts)
    prices = price_per_hour or {}
    require_prices(prices, hardware)
    require_positive("tpot_ms", tpot_ms)
    require_at_least("gpus", gpus, 1)
    if gpus > MOST_GPUS:
        raise UserError(
            f"gpus={gpus} is more than the {MOST_GPUS} that a machine joins; ask for at most that"
        )
    if not 0 <= reserve < 1:
        raise UserError(f"reserve={reserve} must be a share from 0 to below 1; 0.1 keeps 10 % free")
    if memory_bytes is not None:
        require_positive("memory_bytes", memory_bytes)
    shape = get_scale(scale)
    rows: list[Prediction] = []
    stored, dtype = stored_as(weights, dtype)
    for part in (hardware_of(key, dtype, MEASURED_ROWS, launch_us, stored) for key in hardware):
        held = min(part.memory_bytes, memory_bytes or part.memory_bytes)
        part = replace(part, memory_bytes=int(held * (1 - reserve)))
        for arch in archs:
            spec = ModelSpec(arch=arch, scale=shape)
            rated, model = outline_on(part, spec, stored, state)
            calls = calls_on(part, spec, stored, state, replay)
            about: Prediction = {"arch": arch, "scale": scale, "hardware": part.key}
            for context in contexts:
                options = [
                    Option.of(Split(model, rated, count, replay, calls), context, tpot_ms)
                    for count in _counts(part, shape, gpus)
                ]
                row = {**about, "context": context, "tpot_limit_ms": tpot_ms}
                row |= _answer(options, tpot_ms)
                if part.key in prices:
                    row["usd_per_million_tok"] = _usd(row, prices[part.key])
                reserved = {"reserve_bytes_per_gpu": int(held) - part.memory_bytes}
                link = "" if part.link is None else part.link.source
                sources = {"launches_from": part.launches_from, "link_from": link}
                rows.append(row | reserved | sources)
    by_price = all(key in prices for key in hardware)
    return [row for context in contexts for row in _ranked(rows, context, by_price)]


def _counts(part: Hardware, shape: Scale, gpus: int) -> list[int]:
    """Powers of two: what heads and widths divide by. Without a known link, one GPU."""
    most = 1 if part.link is None else min(gpus, shape.n_heads)
    return [1 << n for n in range(most.bit_length())]


@dataclass(frozen=True, slots=True)
class Option:
    """A split model at a context: its batch (0: none), and what keeps it from being larger.

    sequences: how many memory holds, as far as they are looked at.
    """

    split: Split
    context: int
    sequences: int
    batch: int
    limited_by: str

    @classmethod
    def of(cls, split: Split, context: int, limit_ms: float) -> "Option":
        """With the largest batch that memory holds and that keeps the limit."""
        found = room(split.part, split.weight_bytes, split.state_bytes(context))
        most = MOST_SEQUENCES if found is None else min(found, MOST_SEQUENCES)
        batch = largest(
            lambda batch: split.tpot_ms(batch, context) <= limit_ms, most, rate_edges(split.part)
        )
        beyond = "search" if most == MOST_SEQUENCES else "memory"
        return cls(split, context, most, batch, beyond if batch == most else "time")

    @property
    def tok_per_s_per_gpu(self) -> float:
        """Of all sequences, over the GPUs."""
        return 1e3 * self.batch / self.split.tpot_ms(self.batch, self.context) / self.split.gpus

    def used_bytes(self, batch: int) -> int:
        """Weights and state in the memory of each GPU."""
        return self.split.weight_bytes + batch * self.split.state_bytes(self.context)


def largest(holds: Callable[[int], bool], most: int, edges: Iterable[int] = ()) -> int:
    """The largest batch up to `most` that holds, 0 where none does.

    Between two `edges` a batch holds where a larger one does; across an edge it need not, as other
    rates apply to batches beyond it.
    """
    starts = [1, *(edge + 1 for edge in sorted(edges) if edge < most)]
    ends = [*(start - 1 for start in starts[1:]), most]
    for low, high in reversed(list(zip(starts, ends, strict=True))):
        if high < low or not holds(low):
            continue
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
        return low
    return 0


def rate_edges(part: Hardware) -> list[int]:
    """The largest batches whose products still take the rate of fewer rows."""
    products = part.roofline.products
    edges = set()
    for storage in {rate.storage for rate in products}:
        rates = sorted((p for p in products if p.storage == storage), key=lambda rate: rate.rows)
        for fewer, more in pairwise(rates):
            edge = isqrt(fewer.rows * more.rows)
            edges.add(edge if part.roofline.product(edge, storage) == fewer else edge - 1)
    return sorted(edges)


def _usd(row: Prediction, price_per_hour: float) -> float | None:
    """$ for a million tokens of a row that has a batch."""
    if not row["meets"]:
        return None
    gpus, tpot_ms, batch = (float(str(row[name])) for name in ("gpus", "tpot_ms", "batch"))
    return usd_per_million_tok(price_per_hour * gpus, tpot_ms, int(batch))


def _answer(options: Sequence[Option], limit_ms: float) -> Prediction:
    kept = [option for option in options if option.batch]
    if not kept:
        return _why_none(options, limit_ms)
    best = max(kept, key=lambda option: option.tok_per_s_per_gpu)
    split, batch = best.split, best.batch
    tpot_ms = split.tpot_ms(batch, best.context)
    return {
        "meets": True, "gpus": split.gpus, "least_gpus": min(o.split.gpus for o in kept),
        "batch": batch, "tpot_ms": tpot_ms, "link_ms": split.link_ms(batch),
        "output_tok_per_s": 1e3 * batch / tpot_ms,
        "output_tok_per_s_per_gpu": best.tok_per_s_per_gpu,
        "limited_by": best.limited_by, "over": None,
        "weight_bytes_per_gpu": split.weight_bytes,
        "used_bytes_per_gpu": best.used_bytes(batch), "note": "",
    }  # fmt: skip


def _why_none(options: Sequence[Option], limit_ms: float) -> Prediction:
    """The bound that comes nearest to being kept, and by how much it is exceeded."""
    if any(option.sequences for option in options):
        bound, times = "time", {o: o.split.tpot_ms(1, o.context) for o in options if o.sequences}
        nearest = min(times, key=lambda option: times[option])
        gpus, over = nearest.split.gpus, times[nearest] / limit_ms
        note = f"{times[nearest]:,.4g} ms per token at batch 1 on {_gpus(gpus)}"
    else:
        bound, nearest = "memory", min(options, key=lambda option: option.used_bytes(1))
        gpus, needed = nearest.split.gpus, nearest.used_bytes(1)
        there = nearest.split.part.memory_bytes
        over = needed / there if there else float("inf")
        note = (
            f"weights and one sequence take {needed / 1e9:,.4g} GB of each on {_gpus(gpus)}, and "
            f"{there / 1e9:,.4g} GB are there"
        )
    return {
        "meets": False, "gpus": gpus, "least_gpus": None, "batch": None, "tpot_ms": None,
        "link_ms": None, "output_tok_per_s": None, "output_tok_per_s_per_gpu": None,
        "limited_by": bound, "over": over, "weight_bytes_per_gpu": nearest.split.weight_bytes,
        "used_bytes_per_gpu": None, "note": f"{note}: {over:,.3g} times the limit",
    }  # fmt: skip


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _ranked(rows: Sequence[Prediction], context: int, by_price: bool) -> list[Prediction]:
    """The rows of a context, best first; then those over the limit, nearest first."""

    def worth(row: Prediction) -> tuple[bool, float]:
        if not row["meets"]:
            return True, float(str(row["over"]))
        if by_price:
            return False, float(str(row["usd_per_million_tok"]))
        return False, -float(str(row["output_tok_per_s_per_gpu"]))

    found = sorted((row for row in rows if row["context"] == context), key=worth)
    return [{"rank": n if row["meets"] else None, **row} for n, row in enumerate(found, 1)]
