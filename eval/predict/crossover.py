"""From which context on one architecture decodes faster than another: predicted and measured.

A step's time grows with the context at the slope of its state, so two architectures cross once in
most cases; windows, choices of rows and what a machine makes of them can turn the order again. The
prediction searches the roofline's times; the measurement interpolates between the contexts that
were timed and never beyond them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import pandas as pd

from archs.backbone import Model
from archs.checks import require_at_least
from archs.cost import Step
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from eval.predict.accelerators import Hardware, hardware_of
from eval.predict.calls import StepCalls
from eval.predict.roofline import (
    SCALE,
    calls_on,
    outline_on,
    require_grid,
    resident_bytes,
    room,
    step_ms,
    stored_as,
)
from eval.results.crossings import ALWAYS, NEVER, Crossing, between, crossing
from eval.results.tidy import tidy

Crossover = dict[str, object]

#: Batches that are predicted where nothing else is said.
BATCHES = (1, 64)


def either(
    first: str, second: str, *, results: pd.DataFrame | None = None, scale: str | None = None,
    hardware: Sequence[str] | None = None, batches: Sequence[int] | None = None,
    dtype: str | None = None, launch_us: float | None = None, weights: str = "", state: str = "",
) -> list[Crossover]:  # fmt: skip
    """Measured crossovers of `results` where there are any, else predicted ones.

    None: all that was timed, or the defaults of `crossovers`. Raises UserError on
    options of a prediction beside results.
    """
    if results is None:
        given: dict[str, Any] = {
            "scale": scale, "hardware": hardware, "batches": batches, "dtype": dtype,
            "launch_us": launch_us,
        }  # fmt: skip
        named = {name: value for name, value in given.items() if value is not None}
        return crossovers(first, second, weights=weights, state=state, **named)
    predicted = {
        "hardware": hardware, "dtype": dtype, "launch_us": launch_us, "weights": weights or None,
        "state": state or None,
    }  # fmt: skip
    for name, value in predicted.items():
        if value is not None:
            raise UserError(
                f"{name} is of predictions, and results were timed on a machine of their own; "
                f"leave out {name} or the results"
            )
    return measured_crossovers(results, first, second, scale=scale, batches=batches)


def crossovers(
    first: str, second: str, scale: str = SCALE, hardware: Iterable[str] = ("h100",),
    batches: Iterable[int] = BATCHES, *, longest: int = 1 << 20, dtype: str = "bfloat16",
    launch_us: float | None = None, weights: str = "", state: str = "",
) -> list[Crossover]:  # fmt: skip
    """The least context from which `first` is faster than `second`, by hardware and batch.

    `context` is that context in tokens; `verdict` is "from", "always" or "never" (at any context
    from `looked_from` to `looked_to`), or "until" (faster below the context, not from it on);
    `earlier`: contexts at which the order turns before, as `Crossing` has them. Times
    are those at `context`, or at `looked_to` without one; None where the batch does not fit there,
    as `note` then says. weights, state: as `predict`'s. Raises UserError on unknown names.
    """
    hardware, batches = list(hardware), list(batches)
    stored, dtype = stored_as(weights, dtype)
    require_grid(hardware=hardware, batches=batches)
    require_at_least("longest", longest, 1)
    rows = []
    for part in (hardware_of(key, dtype, batches, launch_us) for key in hardware):
        for batch in batches:
            specs = [ModelSpec(arch=arch, scale=get_scale(scale)) for arch in (first, second)]
            times = [
                _Times(*outline_on(part, s, stored, state), s.arch, batch,
                       calls_on(part, s, stored, state))
                for s in specs
            ]  # fmt: skip

            def ahead(context: int, times: list[_Times] = times) -> bool:
                return times[0].at(context) < times[1].at(context)

            found = _search(ahead, longest)
            at = found.context or longest
            unfit = [why for one in times if (why := one.why_unfit(at))]
            rows.append(
                {
                    "first": first, "second": second, "scale": scale, "hardware": part.key,
                    "weight_format": weights, "state_format": state,
                    "batch": batch, **found._asdict(), "looked_from": 1, "looked_to": longest,
                    "first_tpot_ms": None if times[0].why_unfit(at) else times[0].at(at),
                    "second_tpot_ms": None if times[1].why_unfit(at) else times[1].at(at),
                    "note": "; ".join(dict.fromkeys(unfit)),
                }
            )  # fmt: skip
    return rows


class _Times:
    """Predicted time per token of one architecture by context."""

    def __init__(
        self, part: Hardware, model: Model, arch: str, batch: int, calls: StepCalls | None
    ) -> None:
        self._model, self._calls = model, calls
        self._arch, self._part, self._batch = arch, part, batch
        self._known: dict[int, float] = {}

    def why_unfit(self, context: int) -> str:
        """Why the batch cannot be served at a context; empty where it can."""
        state_bytes = self._model.state_bytes(context)
        sequences = room(self._part, resident_bytes(self._model), state_bytes)
        if sequences is None or sequences >= self._batch:
            return ""
        return f"{self._arch}: {sequences:,} sequences fit at {context:,} tokens"

    def at(self, context: int) -> float:
        """Milliseconds."""
        if context not in self._known:
            cost = self._model.cost(Step(self._batch, 1, context))
            calls = None if self._calls is None else self._calls.at(context)
            self._known[context] = step_ms(cost, self._part.roofline, calls=calls)
        return self._known[context]


def _search(ahead: Callable[[int], bool], longest: int) -> Crossing:
    """Slopes change at most where a window fills, so the sides are compared at powers of two first
    and each switch is then bisected to the token.
    """
    grid = [1]
    while grid[-1] < longest:
        grid.append(min(grid[-1] * 2, longest))
    sides = [ahead(context) for context in grid]

    def switch(i: int) -> int:
        low, high = grid[i - 1], grid[i]
        while high - low > 1:
            middle = (low + high) // 2
            if ahead(middle) == sides[i]:
                high = middle
            else:
                low = middle
        return high

    return crossing(sides, switch)


def measured_crossovers(
    results: pd.DataFrame, first: str, second: str, *, scale: str | None = None,
    batches: Sequence[int] | None = None,
) -> list[Crossover]:  # fmt: skip
    """The same from timed steps, by scale, batch, hardware, dtype, weights, backend, differing run.

    States that both have are kept alike.

    scale, batches: only these; None: all timed ones.
    `context` is interpolated between the contexts that were timed, from `timed_from` to `timed_to`;
    None where the two do not cross there. Raises UserError where nothing of the two was timed
    alike.
    """
    results = tidy(results)
    timed = results[(results["measure"] == "tpot_p50_ms") & results["arch"].isin([first, second])]
    where = ""
    if scale is not None:
        timed, where = timed[timed["scale"] == scale], f" at scale {scale}"
    if batches is not None:
        require_grid(batches=batches)
        timed = timed[timed["batch"].isin(list(batches))]
        where += f" in batches of {', '.join(map(str, batches))}"
    by = ["scale", "hardware", "batch", "dtype", "weight_format", "kernel_backend", "source"]
    rows: list[Crossover] = []
    for key, group in timed.groupby(by, dropna=False):
        named = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        of = {arch: group[group["arch"] == arch] for arch in (first, second)}
        for one, other in _alike(*(own["state_format"].unique() for own in of.values())):
            formats = {first: one, second: other}
            pair = pd.concat(own[own["state_format"] == formats[a]] for a, own in of.items())
            table = pair.pivot_table(index="context", columns="arch", values="value").dropna()
            if len(table) < 2:
                continue
            contexts = [int(c) for c in table.index]
            gaps = (table[first] - table[second]).tolist()
            rows.append(
                {
                    "first": first, "second": second, **named, "first_state_format": one,
                    "second_state_format": other, **between(contexts, gaps)._asdict(),
                    "timed_from": contexts[0], "timed_to": contexts[-1],
                }
            )  # fmt: skip
    if not rows:
        raise UserError(
            f"the results hold no two contexts at which both '{first}' and '{second}' were timed "
            f"alike{where}; run a suite with both first"
        )
    return rows


def _alike(first: Iterable[str], second: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Formats of two architectures that keep alike what both are known to remember."""
    every = [
        {name: dict(StateFormat.named(name).kept) for name in names} for names in (first, second)
    ]
    kinds = [{kind for kept in formats.values() for kind in kept} for formats in every]
    common = kinds[0] & kinds[1]
    for (one, ours), (other, theirs) in product(*(formats.items() for formats in every)):
        if all(ours.get(kind) == theirs.get(kind) for kind in common):
            yield one, other


def told(row: Crossover) -> Crossover:
    """A row as people read it: the verdict in words with its contexts."""
    timed = "timed_from" in row
    first, last = (row[f"{'timed' if timed else 'looked'}_{end}"] for end in ("from", "to"))
    place = f"{'timed' if timed else 'looked at'} from {first:,} to {last:,} tokens"
    found = Crossing(row["verdict"], row["context"], row["earlier"])  # type: ignore[arg-type]
    spans = found.told(
        "{:,}".format, below="below {} tokens", on="from {} tokens on", to="from {} to {} tokens"
    )
    words = {ALWAYS: "at every context", NEVER: "at no context"}.get(found.verdict, spans)
    ends = (
        "verdict", "context", "earlier", "looked_from", "looked_to", "timed_from", "timed_to",
    )  # fmt: skip
    kept = {name: value for name, value in row.items() if name not in ends}
    note = kept.pop("note", "")
    said = {f"{row['first']} is faster": f"{words} ({place})"}
    return {**kept, **said, **({"note": note} if note else {})}
