"""Where two architectures cross: predicted against brute force, measured by interpolation."""

import json
from pathlib import Path

import pandas as pd
import pytest

from archs.errors import UserError
from eval.predict.crossover import crossovers, measured_crossovers, told
from eval.predict.roofline import predict
from eval.report.leaderboard import merge
from eval.results.rows import COLUMNS
from tests.eval.conftest import Command

COMMITTED = Path(__file__).parents[2] / "leaderboards" / "cpu-2-threads" / "2026-11-23"


def predicted_ms(arch: str, batch: int, context: int) -> float:
    [row] = predict([arch], "70m", ["h100"], [batch], [context])
    assert isinstance(row["tpot_ms"], float)
    return row["tpot_ms"]


@pytest.mark.parametrize("batch", [1, 64])
def test_the_predicted_crossover_is_where_the_order_turns(batch: int) -> None:
    [row] = crossovers("gdn", "gqa", "70m", ["h100"], [batch])
    assert row["verdict"] == "from"
    context = row["context"]
    assert isinstance(context, int) and 1 < context < 1 << 20
    assert predicted_ms("gdn", batch, context) < predicted_ms("gqa", batch, context)
    assert predicted_ms("gdn", batch, context - 1) >= predicted_ms("gqa", batch, context - 1)
    [turned] = crossovers("gqa", "gdn", "70m", ["h100"], [batch])
    assert turned["verdict"] == "until" and abs(int(str(turned["context"])) - context) <= 1


def test_an_architecture_that_is_always_ahead() -> None:
    assert [r["verdict"] for r in crossovers("mqa", "mha", "8b", ["h200"], [64])] == ["always"]
    assert [r["verdict"] for r in crossovers("mha", "mqa", "8b", ["h200"], [64])] == ["never"]


def test_a_verdict_says_at_which_contexts_it_was_looked() -> None:
    [row] = crossovers("mqa", "mha", "8b", ["h200"], [64], longest=4096)
    assert (row["verdict"], row["looked_from"], row["looked_to"]) == ("always", 1, 4096)
    assert told(row)["mqa is faster"] == "at every context (looked at from 1 to 4,096 tokens)"


def test_a_batch_that_does_not_fit_at_the_crossing_has_no_time() -> None:
    [row] = crossovers("mqa", "mha", "8b", ["h100"], [64], longest=131072)
    assert (row["first_tpot_ms"], row["second_tpot_ms"]) == (None, None)
    assert row["note"] == (
        "mqa: 29 sequences fit at 131,072 tokens; mha: 0 sequences fit at 131,072 tokens"
    )
    [row] = crossovers("gdn", "mqa", "8b", ["h100"], [64], longest=131072)
    [alone] = predict(["gdn"], "8b", ["h100"], [64], [int(str(row["context"]))])
    assert row["first_tpot_ms"] == alone["tpot_ms"] and row["note"] == ""


def timed(arch: str, pairs: list[tuple[int, float]], run: str = "a") -> pd.DataFrame:
    rows = [
        {
            **dict.fromkeys(COLUMNS, ""), "arch": arch, "measure": "tpot_p50_ms", "value": ms,
            "context": context, "batch": 1, "scale": "70m", "hardware": "x", "status": "ok",
            "kernel_backend": "torch", "stage": "decode", "run": run,
        }
        for context, ms in pairs
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_measured_crossover_is_interpolated() -> None:
    flat, rising = timed("gdn", [(100, 5.0), (200, 5.0)]), timed("gqa", [(100, 4.0), (200, 8.0)])
    [row] = measured_crossovers(pd.concat([flat, rising], ignore_index=True), "gdn", "gqa")
    assert (row["verdict"], row["context"], row["timed_to"]) == ("from", 125, 200)


def test_an_order_that_turns_twice_is_told_whole() -> None:
    """A sparse architecture may pay between two contexts alone."""
    contexts = (100, 200, 300, 400)
    flat = timed("dsa", [(context, 5.0) for context in contexts])
    rising = timed("mla", list(zip(contexts, (4.0, 6.0, 6.0, 4.0), strict=True)))
    rows = pd.concat([flat, rising], ignore_index=True)
    [row] = measured_crossovers(rows, "dsa", "mla")
    assert (row["verdict"], row["context"], row["earlier"]) == ("until", 350, (150,))
    assert told(row)["dsa is faster"] == "from 150 to 350 tokens (timed from 100 to 400 tokens)"
    [turned] = measured_crossovers(rows, "mla", "dsa")
    said = "below 150 tokens, from 350 tokens on (timed from 100 to 400 tokens)"
    assert told(turned)["mla is faster"] == said


def test_two_runs_that_differ_give_a_crossover_each() -> None:
    rising = [(100, 4.0), (200, 8.0)]
    slow = timed("gdn", [(100, 6.0), (200, 6.0)]), timed("gqa", rising)
    fast = timed("gdn", [(100, 5.0), (200, 5.0)], "b"), timed("gqa", rising, "b")
    rows = measured_crossovers(pd.concat([*slow, *fast], ignore_index=True), "gdn", "gqa")
    assert {row["source"]: row["context"] for row in rows} == {"a": 150, "b": 125}


def test_formats_that_differ_are_not_averaged() -> None:
    """A recurrent state is held against rows as they are and in few bits, and one by one."""
    flat = timed("gdn", [(100, 5.0), (200, 5.0)])
    plain, short = timed("gqa", [(100, 4.0), (200, 8.0)]), timed("gqa", [(100, 4.0), (200, 6.0)])
    packed = [t.assign(weight_format="int4-g64") for t in (flat, plain)]
    rows = pd.concat([flat, plain, short.assign(state_format="kv:int8"), *packed])
    found = measured_crossovers(rows.reset_index(drop=True), "gdn", "gqa")
    at = [(r["weight_format"], r["second_state_format"], r["context"]) for r in found]
    assert at == [("", "", 125), ("", "kv:int8", 150), ("int4-g64", "", 125)]
    # Of two that both have rows, those that are kept alike.
    other = timed("mqa", [(100, 5.0), (200, 5.0)]).assign(state_format="kv:int8")
    [one] = measured_crossovers(pd.concat([rows, other], ignore_index=True), "mqa", "gqa")
    assert (one["first_state_format"], one["context"]) == ("kv:int8", 150)


def test_formats_are_predicted() -> None:
    plain, short = (
        crossovers("gdn", "gqa", "8b", ["h100"], [64], state=state)[0]
        for state in ("", "kv:int8,memory:int8")
    )
    # Rows and states shrink alike, so launches weigh more and the crossover lies farther out.
    assert short["second_tpot_ms"] < plain["second_tpot_ms"]  # type: ignore[operator]
    assert short["state_format"] == "kv:int8,memory:int8"


def test_committed_results_hold_a_crossover() -> None:
    rows = measured_crossovers(merge([COMMITTED]), "gdn", "mha")
    assert rows and all(row["timed_from"] < row["timed_to"] for row in rows)


def test_scale_and_batch_choose_among_results_and_a_part_is_refused(
    decodebench: Command,
) -> None:
    at = ("crossover", "gdn", "mha", "--results", COMMITTED, "--json")
    every = json.loads(decodebench(*at).out)
    assert {row["batch"] for row in every} == {1, 8}
    chosen = json.loads(decodebench(*at, "--batch", "8").out)
    assert [row for row in every if row["batch"] == 8] == chosen
    decodebench(*at, "--scale", "8b").refuses("timed alike at scale 8b", "run a suite with both")
    decodebench(*at, "--hardware", "h100").refuses("hardware is of predictions", "leave out")
    decodebench(*at, "--dtype", "float16").refuses("dtype is of predictions")
    decodebench(*at, "--state", "kv:int8").refuses("state is of predictions")
    shown = " ".join(decodebench("crossover", "mqa", "mha", "--results", COMMITTED).out.split())
    assert "timed from 256 to 16,384 tokens" in shown


def test_results_without_both_are_refused() -> None:
    with pytest.raises(UserError, match="both 'gdn' and 'gqa'"):
        measured_crossovers(timed("gdn", [(100, 5.0), (200, 5.0)]), "gdn", "gqa")
