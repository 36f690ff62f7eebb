"""The command: bad input is one clear line and exit code 2, good input is what scripts can read."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.cli import api
from eval.cli.app import app
from eval.cli.options import parse_duration_s
from eval.predict.machine import Roofline
from eval.predict.roofline import parse_counts
from tests.eval.conftest import Command
from tests.eval.micro import TRAIN, rows_of, write_corpus, write_suite
from tests.eval.synthetic import write_run

# -- bad input --


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("bench --arch gqq", ("'gqq'", "Did you mean 'gqa'?", "mamba2")),
        ("check gqq", ("'gqq'", "Did you mean 'gqa'?")),
        ("run --arch gqq", ("'gqq'", "Did you mean 'gqa'?")),
        ("bench --arch ./none.py", ("none.py", "does not exist", "give a registry name")),
        ("predict --arch gdn:gqa=3", ("'gdn:gqa=3'", "one positive count per architecture")),
        ("run --suite tinny", ("suite 'tinny'", "Did you mean 'tiny'?")),
        ("run --suite none.toml", ("'none.toml'", "does not exist", "give a name")),
        (
            "train --arch gqa --corpus sotuu",
            ("corpus 'sotuu'", "Did you mean 'sotu'?", "path:GLOB"),
        ),
        (
            "train --arch gqa --corpus path:none.txt",
            ("'path:none.txt'", "matches no file", "check"),
        ),
        ("train --arch gqa --corpus path:empty.txt", ("empty.txt", "is empty", "give it")),
        (
            "train --arch gqa --corpus path:binary.txt",
            ("binary.txt", "NUL byte at 3", "leave it out"),
        ),
        ("bench --arch gqa --scale tinny", ("scale 'tinny'", "Did you mean 'tiny'?")),
        ("predict --hardware h1000", ("hardware 'h1000'", "Did you mean 'h100'?")),
        ("bench --arch gqa --device gpu", ("device 'gpu'", "Did you mean 'cpu'?")),
        ("bench --arch gqa --context 100g", ("'100g'", "not a positive count", "4k")),
        ("bench --arch gqa --scale tiny --context 100000m", ("GiB", "free", "lower the batch")),
        ("bench --arch gqa --scale tiny --batch 0", ("'0'", "positive count")),
        ("bench --arch gqa --scale tiny --steps 0", ("steps=0", "at least 1")),
        ("bench --arch gqa --arch gqa", ("archs names 'gqa' twice",)),
        ("bench --arch gqa --batch 1,1", ("batches names 1 twice",)),
        ("predict --context 8:2", ("'8:2'", "low:high")),
        ("predict --context 8,8", ("contexts names 8 twice",)),
        ("predict --launch-us -5", ("launch_us=-5.0 must be at least 0",)),
        ("predict --launch-us nan", ("launch_us=nan must be at least 0",)),
        ("predict --price nan", ("price 'nan'", "positive number")),
        ("predict --price=-1", ("price '-1'", "positive number")),
        ("train --arch gqa --seq-len 0", ("seq_len=0 must be at least 1",)),
        ("train --arch gqa --vocab-size 0", ("vocab_size=0 must be at least 1",)),
        ("train --arch gqa --vocab-size 99", ("vocab_size=99 must be at least 257",)),
        ("train --arch gqa --steps -4", ("steps=-4 must be at least 1",)),
        ("train --arch gqa --batch 0", ("batch=0 must be at least 1",)),
        ("train --arch gqa --seed -1", ("seed=-1 must be at least 0",)),
        ("train --arch gqa --learning-rate nan", ("learning_rate", "finite", "nan")),
        ("train --arch gqa --optimizer adam", ("'adam'", "Did you mean 'adamw'?")),
        ("train --arch gqa --corpus sotu:zzz", ("corpus 'sotu:zzz' takes no source", "sotu")),
        ("quality folder --max-tokens -5", ("max_tokens=-5 must be at least 1",)),
        ("quality folder --max-tokens 0", ("max_tokens=0 must be at least 1",)),
        ("quality folder --corpus stdlib:x", ("corpus 'stdlib:x' takes no source",)),
        ("quality none.safetensors", ("none.safetensors", "does not exist", "train it first")),
        ("quality folder", ("folder/checkpoint.safetensors", "does not exist")),
        ("quality torn.safetensors", ("torn.safetensors", "damaged", "restore it")),
        ("quality foreign.safetensors", ("foreign.safetensors", "no checkpoint of this program")),
        ("report folder", ("folder/results.csv", "does not exist", "name a run folder")),
        ("leaderboard folder", ("folder/results.csv", "does not exist")),
        ("run --out folder", ("'folder'", "not a run folder", "choose another --out")),
        ("run --time-budget soon", ("'soon'", "positive number", "9m")),
        ("new-arch Bad-Name", ("'Bad-Name'", "lower-case")),
        ("bench --arch gqa --steps many", ("--steps", "bench --help")),
        ("bench", ("arch", "bench --help")),
        ("run --nothing", ("--nothing", "run --help")),
        ("benhc", ("'benhc'", "decodebench --help")),
    ],
)
def test_bad_input_is_one_clear_line(
    decodebench: Command, tmp_path: Path, arguments: str, fragments: tuple[str, ...]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"abc\x00def")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    whole = (tmp_path / "foreign.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:-5])
    decodebench(*arguments.split()).refuses(*fragments)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"


def test_head_counts_that_do_not_divide_are_refused(
    decodebench: Command, tmp_path: Path, stub_roofline: Roofline
) -> None:
    suite = write_suite(tmp_path, more="[overrides.gqa]\nkv_heads = 3")
    outcome = decodebench("run", "--suite", suite, "--out", "out", "--json")
    outcome.refuses("n_heads=4 is not divisible by kv_heads=3", "choose a kv_heads")


def test_weights_beyond_memory_are_refused_before_they_are_made(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.memory.free_bytes", lambda _: 1 << 20)
    decodebench("bench", "--arch", "gqa", "--scale", "tiny").refuses(
        "gqa at scale tiny needs", "free"
    )


def test_training_beyond_memory_is_refused_before_anything_is_made(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and two averages: 16 bytes a parameter."""
    monkeypatch.setattr("infer.memory.free_bytes", lambda _: 20 << 30)
    shape = get_scale("8b")
    count = sum(p.numel() for p in ModelSpec(arch="gqa", scale=shape).outline().parameters())
    outcome = decodebench("train", "--arch", "gqa", "--scale", "8b")
    outcome.refuses(f"gqa at scale 8b needs {16 * count / 2**30:.2f} GiB but 20.00 GiB", "lower")


@pytest.mark.usefixtures("stub_roofline")
def test_bench_times_the_contexts_that_fit(decodebench: Command) -> None:
    argv = ("--arch", "gqa", "--scale", "tiny", "--context", "16,100000m", "--steps", "2")
    rows = rows_of(decodebench("bench", *argv, "--json").out)
    assert {row["context"]: row["status"] for row in rows} == {16: "ok", 100_000 << 20: "oom"}


def test_an_unwritable_leaderboard_names_the_reason(decodebench: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", seeds=1, archs=("gqa",))
    outcome = decodebench("leaderboard", "run", "--out", "nowhere/board.csv")
    outcome.refuses("'nowhere/board.csv'", "No such file or directory")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("run --suite unreadable.toml", ("'unreadable.toml' cannot be read", "permissions")),
        ("run --suite latin.toml", ("'latin.toml' is not UTF-8 text",)),
        ("run --suite micro.toml --out file", ("'file' cannot be written", "Not a directory")),
        ("run --suite micro.toml --out file/out", ("'file/out' cannot be written",)),
        ("train --arch gqa --corpus path:text.txt --out file", ("'file' cannot be made a folder",)),
        ("leaderboard run --page run", ("'run' cannot be written: Is a directory",)),
        ("leaderboard run --page /dev/full", ("'/dev/full' cannot be written: No space left",)),
        ("leaderboard run --out none/a.csv", ("'none/a.csv' cannot be written",)),
        ("predict --arch gqa --out file/a.csv", ("'file/a.csv' cannot be written",)),
        ("predict --arch gqa --picture file/a.png", ("'file' cannot be made a folder",)),
    ],
)
def test_files_that_cannot_be_used_are_one_clear_line(
    decodebench: Command, tmp_path: Path, arguments: str, fragments: tuple[str, ...]
) -> None:
    write_suite(tmp_path)
    write_run(tmp_path / "run", seeds=1, archs=("gqa",))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    (tmp_path / "unreadable.toml").symlink_to("/proc/self/mem")
    short = TRAIN if arguments.startswith("train") else ()
    decodebench(*arguments.split(), *short).refuses(*fragments)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_in_place_of_the_cache_is_refused(
    decodebench: Command, tmp_path: Path, stub_roofline: Roofline
) -> None:
    """And is no failure of the architecture."""
    suite = write_suite(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".cache").write_text("mine")
    short = ("--corpus", "path:text.txt", *TRAIN)
    decodebench("train", "--arch", "gqa", *short).refuses("runs/.cache' cannot be made a folder")
    (tmp_path / ".cache").write_text("mine")
    stopped = decodebench("run", "--suite", suite, "--out", "out", "--json")
    stopped.refuses(".cache' cannot be made a folder")
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_page_is_written_through_a_link(decodebench: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", seeds=1, archs=("gqa",))
    (tmp_path / "real.html").write_text("before")
    (tmp_path / "link.html").symlink_to("real.html")
    for option, name in (("--page", "link.html"), ("--out", "board.csv")):
        (tmp_path / "board.csv").unlink(missing_ok=True)
        assert decodebench("leaderboard", "run", option, name).code == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text().startswith("<!doctype html>")
    outcome = decodebench("leaderboard", "run", "--out", "/dev/stdout", "--json")
    assert outcome.out.startswith("rank,arch,")


def test_quality_on_another_corpus_is_refused(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "other.txt").write_text("a wholly different text\n" * 200)
    assert decodebench("train", "--arch", "gqa", *TRAIN, "--corpus", "path:text.txt").code == 0
    outcome = decodebench("quality", "runs/train", "--corpus", "path:other.txt")
    outcome.refuses("path:other.txt", "name the corpus it was trained on")


@pytest.mark.parametrize("text", ["0", "-1m", "nan", "inf", "", "m"])
def test_impossible_durations(text: str) -> None:
    with pytest.raises(ValueError, match="positive number"):
        parse_duration_s(text)


def test_durations_have_units() -> None:
    given = ("90", "45s", "9m", "2h", None)
    assert [parse_duration_s(t) for t in given] == [90, 45, 540, 7200, None]


# -- good input --


def test_the_command_says_its_version_and_takes_a_short_help(decodebench: Command) -> None:
    shown = decodebench("--version")
    assert (shown.code, shown.out) == (0, f"decodebench {version('decodebench')}\n")
    for argv in (("-h",), ("predict", "-h")):
        helped = decodebench(*argv)
        assert helped.code == 0 and "Usage" in helped.out
    assert "3 the time budget ended" in " ".join(decodebench("-h").out.split())


def test_a_dry_run_lists_its_cells_as_json(decodebench: Command, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    cells = rows_of(decodebench("run", "--suite", suite, "--dry-run", "--json").out)
    plain = decodebench("run", "--suite", suite, "--dry-run").out.split()
    assert [cell["cell"] for cell in cells] == plain
    assert {cell["stage"] for cell in cells} >= {"hardware", "cost", "train", "decode"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["predict", "predict_ops", "fit", "bench", "isoquality"])
def test_the_command_and_the_api_have_the_same_defaults(name: str) -> None:
    """As the command's words are read: `1k,16k` is (1024, 16384)."""
    command = {"predict_ops": "predict", "fit": "predict"}.get(name, name)
    here = {c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    given = {k: p.default for k, p in inspect.signature(here[command]).parameters.items()}
    mine = {k: p.default for k, p in inspect.signature(getattr(api, name)).parameters.items()}
    read: dict[str, tuple[str, Callable[[Any], object]]] = {
        "scale": ("scale", str), "batches": ("batch", parse_counts),
        "contexts": ("context", parse_counts), "hardware": ("hardware", lambda v: v.split(",")),
        "dtype": ("dtype", str), "launch_us": ("launch_us", lambda v: v), "steps": ("steps", int),
        "prompt": ("prompt", int), "reference": ("reference", str), "backend": ("backend", str),
    }  # fmt: skip
    shared = {k: v for k, v in read.items() if k in mine and v[0] in given}
    assert {"scale", "contexts"} <= set(shared)
    for name_there, (name_here, parse) in shared.items():
        there = mine[name_there]
        there = list(there) if isinstance(there, tuple) else there
        held = given[name_here]
        # With --fit no batch may be given, so that its default is not the parser's.
        held = "1" if held is None and name_here == "batch" else held
        assert parse(held) == there, name_there


def test_archs_lists_every_architecture(decodebench: Command) -> None:
    rows = rows_of(decodebench("archs", "--json").out)
    by_name = {row["arch"]: row for row in rows}
    assert {"mha", "mla", "mamba2", "gdn:gqa=3:1"} <= set(by_name)
    assert by_name["mha"]["state_bytes_per_token"] == 2 * by_name["gqa"]["state_bytes_per_token"]
    assert by_name["mamba2"]["state_bytes_per_token"] == 0 < by_name["mamba2"]["state_bytes_fixed"]


def test_predict_gives_a_row_per_cell(decodebench: Command) -> None:
    argv = ("--arch", "gqa", "--hardware", "h100,h200", "--batch", "1,8", "--context", "1k:4k")
    rows = rows_of(decodebench("predict", *argv, "--json").out)
    assert len(rows) == 2 * 2 * 3
    assert [row["context"] for row in rows[:3]] == [1024, 2048, 4096]


def test_doctor_tells_the_machine(decodebench: Command, stub_roofline: Roofline) -> None:
    facts = json.loads(decodebench("doctor", "--json").out)
    assert facts["copy_bytes_per_s"] == stub_roofline.copy_bytes_per_s
    assert facts["torch"] == torch.__version__


def test_leaderboard_merges_and_writes(decodebench: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", seeds=1, archs=("gqa", "mamba2"))
    outcome = decodebench("leaderboard", "run", "--out", "board.csv", "--json")
    assert {row["arch"] for row in rows_of(outcome.out)} == {"gqa", "mamba2"}
    assert (tmp_path / "board.csv").read_text().startswith("rank,arch,")


def test_bench_times_a_tiny_shape(decodebench: Command) -> None:
    argv = (
        "--arch",
        "gqa",
        "--arch",
        "linear",
        "--scale",
        "tiny",
        "--context",
        "16,32",
        "--steps",
        "2",
    )
    rows = rows_of(decodebench("bench", *argv, "--prompt", "8", "--json").out)
    assert [(row["arch"], row["context"]) for row in rows] == [
        ("gqa", 16), ("gqa", 32), ("linear", 16), ("linear", 32),
    ]  # fmt: skip
    assert all(0 < row["tpot_ms"] < 1e4 and 0 < row["ttft_ms"] < 1e4 for row in rows)


def test_a_checkpoint_is_scored_on_its_corpus(decodebench: Command, tmp_path: Path) -> None:
    """The corpus is too small to fill the vocabulary that was asked for."""
    write_corpus(tmp_path)
    argv = [*TRAIN, "--vocab-size", "4000", "--corpus", "path:text.txt", "--json"]
    trained = rows_of(decodebench("train", "--arch", "gqa", *argv).out)[0]
    outcome = decodebench("quality", "runs/train", "--corpus", "path:text.txt", "--json")
    scored = rows_of(outcome.out)
    assert scored[0]["measure"] == "bits_per_byte"
    assert scored[0]["value"] == pytest.approx(trained["bits_per_byte"])


def test_a_new_architecture_passes_check_trains_and_is_scored(
    decodebench: Command, tmp_path: Path
) -> None:
    write_corpus(tmp_path)
    assert decodebench("new-arch", "my_mixer").code == 0
    decodebench("new-arch", "my_mixer").refuses("my_mixer.py", "exists already", "--force")
    outcome = decodebench("check", "my_mixer.py", "--json")
    assert outcome.code == 0
    unproven = [v["check"] for v in rows_of(outcome.out) if v["passed"] is not True]
    assert unproven == ([] if torch.cuda.is_available() else ["triton equals torch"])
    text = ("--corpus", "path:text.txt")
    assert decodebench("train", "--arch", "my_mixer.py", *TRAIN, *text).code == 0
    decodebench("quality", "runs/train", *text).refuses("my_mixer.py", "from a file you name")
    assert decodebench("quality", "runs/train", "--arch", "my_mixer.py", *text).code == 0
    # The file may have moved, and what lies in its place now is not run. A process of its own,
    # since this one has loaded the file.
    (tmp_path / "my_mixer.py").rename(tmp_path / "moved.py")
    (tmp_path / "my_mixer.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    command = [sys.executable, "-c", "from eval.cli import main; main()", "quality", "runs/train"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--arch", "moved.py", *text], cwd=tmp_path, env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_process_of_its_own_shows_no_traceback() -> None:
    command = [sys.executable, "-c", "from eval.cli import main; main()", "bench", "--arch", "gqq"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("decodebench: Unknown arch 'gqq'")
    assert done.stderr.count("\n") == 1


def test_architectures_may_have_options_of_their_own(decodebench: Command) -> None:
    asked = ("predict", "--arch", "gqa(kv_heads=1)", "--arch", "mqa", "--json")
    rows = json.loads(decodebench(*asked).out)
    apart = [
        [{k: v for k, v in row.items() if k != "arch"} for row in rows if row["arch"] == arch]
        for arch in ("gqa(kv_heads=1)", "mqa")
    ]
    assert apart[0]
    assert apart[0] == apart[1]
    decodebench("predict", "--arch", "gqa(heads=1)").refuses("option 'heads'")
