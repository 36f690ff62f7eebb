"""From which context on one architecture decodes faster than another: predicted and measured.

A step's time grows with the context at the slope of its state, so two architectures cross at most
where slopes and intercepts say so. The prediction searches the roofline's times; the measurement
interpolates between the contexts that were timed and never beyond them.
"""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from archs.checks import require_at_least
from archs.cost import Step
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.accelerators import Hardware, hardware_of
from eval.predict import require_grid, step_ms
from eval.tidy import tidy

Crossover = dict[str, object]

ALWAYS, NEVER = "always", "never"


def crossovers(
    first: str,
    second: str,
    scale: str,
    hardware: Iterable[str],
    batches: Iterable[int],
    *,
    longest: int = 1 << 20,
    dtype: str = "bfloat16",
    launch_us: float = 0.0,
) -> list[Crossover]:
    """The least context from which `first` is faster than `second`, by hardware and batch.

    `context` is that context in tokens; `verdict` is "from", "always" (at any context up to
    `longest`), "never", or "until" (faster below the context, not from it on). Raises UserError
    on unknown names.
    """
    hardware, batches = list(hardware), list(batches)
    require_grid(hardware=hardware, batches=batches)
    require_at_least("longest", longest, 1)
    require_at_least("launch_us", launch_us, 0)
    rows = []
    for part in (hardware_of(key, dtype) for key in hardware):
        for batch in batches:
            times = [_Times(arch, scale, part, batch, launch_us) for arch in (first, second)]

            def ahead(context: int, times: list[_Times] = times) -> bool:
                return times[0].at(context) < times[1].at(context)

            verdict, context = _search(ahead, longest)
            at = context or longest
            rows.append(
                {
                    "first": first, "second": second, "scale": scale, "hardware": part.key,
                    "batch": batch, "verdict": verdict, "context": context,
                    "first_tpot_ms": times[0].at(at), "second_tpot_ms": times[1].at(at),
                }
            )  # fmt: skip
    return rows


class _Times:
    """Predicted time per token of one architecture by context."""

    def __init__(self, arch: str, scale: str, part: Hardware, batch: int, launch_us: float) -> None:
        spec = ModelSpec(arch=arch, scale=get_scale(scale))
        self._model = spec.outline(part.roofline.dtype)
        self._part, self._batch, self._launch_us = part, batch, launch_us
        self._known: dict[int, float] = {}

    def at(self, context: int) -> float:
        """Milliseconds."""
        if context not in self._known:
            cost = self._model.cost(Step(self._batch, 1, context))
            self._known[context] = step_ms(cost, self._part.roofline, self._launch_us)
        return self._known[context]


def _search(ahead: Callable[[int], bool], longest: int) -> tuple[str, int | None]:
    """Verdict and context. Slopes change at most where a window fills, so the sides are compared
    at powers of two first and the switch is then bisected to the token.
    """
    grid = [1]
    while grid[-1] < longest:
        grid.append(min(grid[-1] * 2, longest))
    sides = [ahead(context) for context in grid]
    if all(sides) or not any(sides):
        return (ALWAYS if sides[0] else NEVER), None
    # The last switch decides what holds for long contexts.
    last = max(i for i in range(1, len(sides)) if sides[i] != sides[i - 1])
    low, high = grid[last - 1], grid[last]
    while high - low > 1:
        middle = (low + high) // 2
        if ahead(middle) == sides[last]:
            high = middle
        else:
            low = middle
    return ("from" if sides[last] else "until"), high


def measured_crossovers(results: pd.DataFrame, first: str, second: str) -> list[Crossover]:
    """The same from timed steps, by scale, batch, hardware, dtype, backend and differing run.

    `context` is interpolated between timed contexts; None where the two do not cross there.
    Raises UserError where nothing of the two was timed alike.
    """
    results = tidy(results)
    timed = results[(results["measure"] == "tpot_p50_ms") & results["arch"].isin([first, second])]
    by = ["scale", "hardware", "batch", "dtype", "kernel_backend", "source"]
    rows: list[Crossover] = []
    for key, group in timed.groupby(by, dropna=False):
        table = group.pivot_table(index="context", columns="arch", values="value").dropna()
        if {first, second} - set(table.columns) or len(table) < 2:
            continue
        contexts = [int(c) for c in table.index]
        gaps = (table[first] - table[second]).tolist()
        verdict, context = between(contexts, gaps)
        named = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {
                "first": first, "second": second, **named, "verdict": verdict, "context": context,
                "timed_from": contexts[0], "timed_to": contexts[-1],
            }
        )  # fmt: skip
    if not rows:
        raise UserError(
            f"the results hold no two contexts at which both '{first}' and '{second}' were timed "
            "alike; run bench or a suite with both first"
        )
    return rows


def between(contexts: Sequence[int], gaps: Sequence[float]) -> tuple[str, int | None]:
    """Verdict and interpolated context, from the first's time less the second's by context."""
    ahead = [gap < 0 for gap in gaps]
    if all(ahead) or not any(ahead):
        return (ALWAYS if ahead[0] else NEVER), None
    i = max(i for i in range(1, len(ahead)) if ahead[i] != ahead[i - 1])
    share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
    crossing = contexts[i - 1] + share * (contexts[i] - contexts[i - 1])
    return ("from" if ahead[i] else "until"), round(crossing)
