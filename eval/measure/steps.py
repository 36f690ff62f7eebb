"""A point's rows as a table: of decode one row per context, of a server one per run."""

from eval.predict.neighbours import word
from eval.results.point import Point
from eval.results.rows import Found, Status

#: Measures of the point as a whole, which every row of its table repeats.
WHOLE = ("ttft_ms", "other_load", "agreement_error", "agreement_limit")


def by_context(point: Point, found: Found) -> list[dict[str, object]]:
    """One row per context of `found`, columns by our measures' names; one row for a failure.

    status, note: how the step ended, and why, or who else was busy. counters_note: why a figure of
    the counters is missing.
    """
    label: dict[str, object] = {
        "arch": point.arch, "scale": point.scale, "batch": point.batch,
        "weight_format": found.about.weight_format or found.about.dtype,
        "state_format": found.about.state_format,
        "kernel_backend": found.about.kernel_backend,
    }  # fmt: skip
    failure = found.failure
    if failure is not None:
        figures = {row.measure: row.value for row in found.withheld}
        return [{**label, "status": failure.status.value, "note": failure.note, **figures}]
    whole = {row.measure: row.value for row in found.rows if row.measure in WHOLE}
    busy = word(whole.get("other_load"))
    table: dict[int, dict[str, object]] = {}
    for row in found.rows:
        if row.measure == "tpot_ms" and row.context is not None:
            ended = {"status": row.status.value, "note": row.note or busy}
            table[row.context] = {**label, "context": row.context, **ended}
            if row.status == Status.OK:
                table[row.context] |= whole
    for row in found.rows:
        step = table.get(row.context or 0)
        if step is None or row.measure in WHOLE:
            continue
        if row.value is not None or row.status == Status.OK:
            step[row.measure] = row.value
        elif row.measure != "tpot_ms":
            step[row.measure] = None
            notes = (str(step.get("counters_note", "")), row.note)
            step["counters_note"] = "; ".join(dict.fromkeys(filter(None, notes)))
    return [table[context] for context in sorted(table)]


def by_options(point: Point, found: Found) -> list[dict[str, object]]:
    """One row per run of a server, columns by our measures' names; one row for a failure."""
    label: dict[str, object] = {
        "arch": point.arch, "scale": point.scale, "kernel_backend": found.about.kernel_backend,
    }  # fmt: skip
    failure = found.failure
    if failure is not None:
        return [{**label, "status": failure.status.value, "note": failure.note}]
    busy = word({row.measure: row.value for row in found.rows}.get("other_load"))
    table: dict[str, dict[str, object]] = {}
    for row in found.rows:
        if row.options is not None:
            start = {**label, "options": row.options, "status": row.status.value, "note": busy}
            table.setdefault(row.options, start)[row.measure] = row.value
    whole = {row.measure: row.value for row in found.rows if row.options is None}
    return [{**run, **whole} for run in table.values()]
