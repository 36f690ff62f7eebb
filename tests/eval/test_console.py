"""The command's entry and its console: no character, name or signal ends in a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.cli.console import console
from eval.cli.show import show
from eval.report.leaderboard import merge, rank, to_table, wide
from tests.eval.conftest import Command
from tests.eval.micro import write_corpus
from tests.eval.synthetic import write_run

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "eval.cli"]
#: A shell's background jobs, which these tests may be, ignore Ctrl-C.
HEEDING = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


#: Commands one after the other, each with its exit code behind it: importing takes longer than
#: they do.
SEVERAL = """
import sys
from eval.cli import main
for line in sys.argv[1:]:
    sys.argv = ["decodebench", *line.split()]
    try:
        main()
    except SystemExit as end:
        print(f"ended with {end.code}", flush=True)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_a_character_shows_a_question_mark(encoding: str, tmp_path: Path) -> None:
    """In a process of its own, whose terminal has an encoding."""
    run = write_run(tmp_path / "run", seeds=1, archs=("gqa",))
    lines = (f"leaderboard {run}", "predict --arch gqa --by-op", "check gqä")
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *lines], cwd=ROOT, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    shown, by_op, refused = done.stdout.split(b"ended with ")[:3]
    assert b"gqa" in shown and b"?" in shown
    assert by_op.startswith(b"0\n") and b"mlp" in by_op
    assert refused == b"0\n" and done.stdout.endswith(b"ended with 2\n")
    assert b"Unknown arch 'gq" in done.stderr and done.stderr.count(b"\n") == 1


def test_names_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"arch": "[red]my[/red]", "[bold]": "a :smile: [/]"}], False)
    shown = capsys.readouterr().out
    for text in ("[red]my[/red]", "[bold]", "a :smile: [/]"):
        assert text in shown


def test_a_leaderboard_shows_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", seeds=1, archs=("gqa",))
    table = tmp_path / "run" / "results.csv"
    table.write_text(table.read_text().replace("gqa", "[b]x[/i]"))
    console().print(to_table(rank(wide(merge([tmp_path / "run"])))))
    shown = capsys.readouterr().out
    assert "[b]x[/i]" in shown and "[dim]" not in shown


def test_an_architecture_with_a_name_like_markup_is_trained(
    decodebench: Command, tmp_path: Path
) -> None:
    write_corpus(tmp_path)
    assert decodebench("new-arch", "mine").code == 0
    (tmp_path / "mine.py").rename(tmp_path / "[red].py")
    argv = ("--corpus", "path:text.txt", "--steps", "2", "--seq-len", "32", "--vocab-size", "300")
    trained = decodebench("train", "--arch", "[red].py", *argv)
    assert trained.code == 0, trained.err
    assert "[red].py" in trained.out


@pytest.mark.parametrize("target", ["/dev/full", "pipe"])
def test_an_output_that_takes_nothing_is_one_line_or_silence(target: str, tmp_path: Path) -> None:
    if target == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY)
    done = subprocess.run(
        [*COMMAND, "archs", "--json"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    if target == "pipe":
        assert (done.returncode, done.stderr) == (1, b"")
    else:
        assert done.returncode == 2
        assert done.stderr == (
            b"decodebench: 'the output' cannot be used: No space left on device; free some space\n"
        )


@pytest.mark.parametrize("delay_s", [0.2, 0.5, 0.9, 1.4])
def test_ctrl_c_while_libraries_are_imported_is_one_line(delay_s: float) -> None:
    """Waits until Python itself has begun, which nobody guards."""
    code = HEEDING + "print('up', flush=True)\nfrom eval.cli import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "predict"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as begun:  # fmt: skip
        assert begun.stdout is not None and begun.stdout.readline() == "up\n"
        time.sleep(delay_s)
        begun.send_signal(signal.SIGINT)
        _, shown = begun.communicate()
    if begun.returncode:
        # By the signal, where Python ran a string when it came.
        assert begun.returncode in (130, -signal.SIGINT)
        assert shown.startswith("decodebench: interrupted") and shown.count("\n") == 1


def test_ctrl_c_that_a_library_turned_into_something_else_is_one_line() -> None:
    """As C extensions do whose import fails: what they raise does not name the interrupt."""
    code = (
        HEEDING
        + """
import os, sys
class Extension:
    def find_spec(self, name, path, target=None):
        if name != "pandas":
            return None
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise ImportError("initialization failed")
sys.meta_path.insert(0, Extension())
from eval.cli import main
main()"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "--arch", "gqa"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("decodebench: interrupted") and done.stderr.count("\n") == 1
