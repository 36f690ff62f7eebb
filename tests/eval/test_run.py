"""A micro suite end to end: everything is written, nothing is lost, nothing is run twice."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from archs.errors import UserError
from archs.gqa import Attention
from archs.linear import LinearAttention
from archs.registry import ModelSpec
from eval.measure.run import OWN_NAMES, prepare_folder
from eval.measure.suite import Suite, load_suite
from eval.results.schema import check_long, load_long
from tests.eval.conftest import Command
from tests.eval.micro import cells_of, run, write_suite

pytestmark = pytest.mark.usefixtures("stub_roofline")


def status_of(out: Path, stage: str, arch: str) -> set[str]:
    long = load_long(out / "results.csv")
    return set(long[(long["stage"] == stage) & (long["arch"] == arch)]["status"])


def wreck(*_: object, **__: object) -> NoReturn:
    raise ZeroDivisionError("kernel says\nno")


# -- the whole --


def test_a_run_leaves_everything_it_promises(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path, ("gqa", "gdn:gqa=3:1"))
    first = decodebench("run", "--suite", path, "--out", "out", "--device", "cpu")
    assert first.code == 0, first.err
    out = tmp_path / "out"
    assert load_suite(str(out / "config.toml")) == load_suite(str(path))
    for name in ("results.csv", "leaderboard.csv", "report.html", "plots/tpot-context.png"):
        assert (out / name).stat().st_size > 500, name
    [folder] = out.glob("cells/gqa/train-tiny-seed0-*")
    assert {f.name for f in folder.iterdir()} >= {"metrics.jsonl", "checkpoint.safetensors"}
    long = load_long(out / "results.csv")
    assert set(long["status"]) == {"ok"}
    expected = {"bits_per_byte", "accuracy", "tpot_ms", "ttft_ms", "state_bytes", "mbu",
                "nocache_tpot_ms", "loss_at_position", "copy_bytes_per_s"}  # fmt: skip
    assert expected <= set(long["measure"])
    assert "gdn:gqa=3:1" in first.out


def test_a_sweep_as_long_as_the_training_is_the_first_seeds_training(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path)))
    assert suite.train
    plan = replace(suite.train, learning_rates=(2e-3, 4e-3), seeds=(0, 1), sweep_steps=1)
    trained: dict[int, set[str]] = {}
    for steps in (plan.steps, plan.steps - 1):
        out = tmp_path / f"swept-{steps}"
        whole = replace(suite, train=replace(plan, sweep_steps=steps), tasks={}, decode=())
        assert run(whole, out)
        trained[steps] = {f.name.rpartition("-")[0] for f in (out / "cells/gqa").glob("train-*")}
        long = load_long(out / "results.csv")
        rates = long[long["measure"] == "learning_rate"].set_index("seed")["value"]
        [log] = out.glob(f"cells/gqa/sweep-train-tiny-*/lr_{rates[0]:g}/metrics.jsonl")
        loss = json.loads(log.read_text().splitlines()[-1])["smoothed_loss_nats"]
        first = long[(long["measure"] == "train_loss") & (long["seed"] == 0)]["value"].item()
        assert (first == loss) == (steps == plan.steps)
    assert trained[plan.steps] == {"train-tiny-seed1"}
    assert trained[plan.steps - 1] == {"train-tiny-seed0", "train-tiny-seed1"}


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_runs_nothing_again(decodebench: Command, tmp_path: Path) -> None:
    argv = ("run", "--suite", write_suite(tmp_path), "--out", "out", "--device", "cpu")
    assert decodebench(*argv).code == 0
    before = (tmp_path / "out" / "results.csv").read_bytes()
    again = decodebench(*argv)
    assert again.code == 0
    assert "6 of 6 points are done already" in again.err
    assert (tmp_path / "out" / "results.csv").read_bytes() == before


def test_dry_run_writes_nothing(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    outcome = decodebench("run", "--suite", path, "--out", "out", "--dry-run")
    assert len(outcome.out.splitlines()) == 6
    assert not (tmp_path / "out").exists()


def test_the_command_needs_no_git(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run(replace(suite, train=None, quality=None, tasks={}), tmp_path / "out")
    assert set(load_long(tmp_path / "out" / "results.csv")["commit"]) == {"unknown"}


# -- the folder --


def test_what_a_suite_asks_for_anew_is_measured_and_nothing_else(tmp_path: Path) -> None:
    """One more architecture, another recipe, and the way back."""
    suite, out = load_suite(str(write_suite(tmp_path))), tmp_path / "out"
    assert run(suite, out)
    first = written(out)
    more = replace(suite, archs=("gqa", "mqa"))
    assert run(more, out)
    second = written(out)
    assert second.items() > first.items()
    assert {name.split("-")[1] for name in second.keys() - first} == {"mqa"}
    assert set(load_long(out / "results.csv")["arch"]) == {"", "gqa", "mqa"}
    assert load_long(out / "results.csv")["config_hash"].nunique() == 1
    assert suite.train
    longer = replace(suite, train=replace(suite.train, steps=4))
    assert run(longer, out)
    third = written(out)
    [again] = third.keys() - second
    assert again.startswith("train-gqa-") and third.items() > second.items()
    assert run(suite, out)
    assert written(out) == third
    assert set(load_long(out / "results.csv")["arch"]) == {"", "gqa"}


def written(out: Path) -> dict[str, int]:
    """When each point's file was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "points").iterdir()}


@pytest.mark.usefixtures("no_report")
def test_fresh_replaces_what_is_ours_alone(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    prepare_folder(load_suite(str(path)), tmp_path / "out", fresh=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "results.csv").write_text("old")
    argv = ("run", "--suite", path, "--out", "out", "--device", "cpu", "--json")
    assert decodebench(*argv, "--fresh").code == 0
    assert len(cells_of(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_fresh_spares_a_folder_that_is_no_run(suite: Suite, tmp_path: Path) -> None:
    """The user's own folder may have names in common with ours."""
    (tmp_path / "thesis" / "plots").mkdir(parents=True)
    (tmp_path / "thesis" / "plots" / "figure1.svg").write_text("<svg/>")
    with pytest.raises(UserError, match="not a run folder"):
        prepare_folder(suite, tmp_path / "thesis", fresh=True)
    assert (tmp_path / "thesis" / "plots" / "figure1.svg").exists()


def test_a_folder_emptied_in_part_is_still_ours(suite: Suite, tmp_path: Path) -> None:
    prepare_folder(suite, tmp_path / "out", fresh=False)
    (tmp_path / "out" / "cells").mkdir()
    assert OWN_NAMES[-1] == "config.toml"
    prepare_folder(suite, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_file_in_place_of_the_folder_is_refused(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"out' cannot be written: Not a directory"):
        prepare_folder(suite, tmp_path / "out", fresh=False)


# -- cells that fail --


def test_a_cell_that_raises_is_a_row_and_the_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("linear", "gqa"))))
    monkeypatch.setattr(LinearAttention, "forward", wreck)
    out = tmp_path / "out"
    assert run(suite, out)
    for stage in ("train", "task", "decode"):
        assert status_of(out, stage, "linear") == {"error"}
        assert status_of(out, stage, "gqa") == {"ok"}
    long = load_long(out / "results.csv")
    assert "ZeroDivisionError: kernel says no" in set(long["note"])
    assert "Traceback" in (out / "errors.log").read_text()
    assert run(suite, out)
    assert max(Counter(cells_of(out)).values()) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_a_status(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhaust(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("eval.measure.decode.measure_decode", exhaust)
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"oom"}
    assert status_of(tmp_path / "out", "train", "gqa") == {"ok"}


def test_a_state_beyond_memory_is_out_of_memory(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    path.write_text(path.read_text().replace("contexts = [16, 32]", "contexts = [100000000000]"))
    assert run(load_suite(str(path)), tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"oom"}


def test_a_context_that_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    path.write_text(path.read_text().replace("[16, 32]", "[16, 100000000000, 32, 200000000000]"))
    assert run(load_suite(str(path)), tmp_path / "out")
    long = load_long(tmp_path / "out" / "results.csv")
    tpot = long[(long["measure"] == "tpot_ms") & (long["batch"] == 1)]
    by_context = dict(zip(tpot["context"], tpot["status"], strict=True))
    assert by_context == {16: "ok", 32: "ok", 100_000_000_000: "oom", 200_000_000_000: "oom"}
    assert tpot["note"].str.contains("GiB of cpu memory are free").sum() == 2
    timed = long[long["measure"].isin(["nocache_tpot_ms", "ttft_ms"])]
    assert set(timed["status"]) == {"ok"}
    assert not check_long(tmp_path / "out" / "results.csv")


def test_training_beyond_memory_is_refused_before_it_is_made(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.memory.free_bytes", lambda _: 1 << 20)
    monkeypatch.setattr(ModelSpec, "build", wreck)
    assert run(replace(suite, decode=()), tmp_path / "out")
    for stage in ("train", "task"):
        assert status_of(tmp_path / "out", stage, "gqa") == {"oom" if stage == "train" else "error"}
    long = load_long(tmp_path / "out" / "results.csv")
    assert long["note"].str.contains("training gqa at scale tiny needs .* GiB but 0.00 GiB").any()


def test_training_that_diverges_is_a_status(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, rate=1e30)))
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "train", "gqa") == {"nan"}
    assert status_of(tmp_path / "out", "decode", "gqa") == {"ok"}


def test_a_mixer_that_decodes_wrongly_gets_no_latency(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attention, "extend", lambda self, x, state: 2 * x)
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"incorrect"}
    assert "tpot_ms" not in set(load_long(tmp_path / "out" / "results.csv")["measure"])
