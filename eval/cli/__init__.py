"""The entry of the `decodebench` command: whatever happens ends in an exit code and one line.

A failure that was found ends with 1, what the user can mend and what the file system refuses with
2, a time budget that ended before the work with 3 (run again), Ctrl-C with 130; a traceback is a
defect. `main` imports the commands itself, as importing takes seconds in which all of this holds.
"""

import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

#: The shell's exit code for a process that Ctrl-C ended.
INTERRUPTED = 130
_TOLD = "interrupted; finished points are kept, run the same command again to go on"


def main() -> NoReturn:
    """Run the command that `sys.argv` holds."""
    code, message = _outcome(_Interrupts())
    if message:
        print("decodebench:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


class _Interrupts:
    """What Ctrl-C does, and whether it came.

    While the commands are imported it ends the process at once: C++ libraries whose import meets
    an exception of Python's may call abort(). Later it raises KeyboardInterrupt, of which a library
    may make something else.
    """

    def __init__(self) -> None:
        self.came = False
        self.importing = True
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.importing:
            os.write(2, f"decodebench: {_TOLD}\n".encode())
            os._exit(INTERRUPTED)
        self.came = True
        raise KeyboardInterrupt


def _outcome(interrupts: _Interrupts) -> tuple[int, str]:
    """Exit code, and the line that says why it is not zero."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # An output that lacks a character shows a question mark in its place.
                stream.reconfigure(errors="replace")
        _require_own_packages()
        from eval.measure.waiting import wait_briefly_beside_others

        wait_briefly_beside_others(os.environ)
        from eval.cli.app import run_app

        interrupts.importing = False
        code = run_app()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if interrupts.came or isinstance(error, KeyboardInterrupt):
            return _interrupted()
        return _verdict(error)
    return _interrupted() if code == INTERRUPTED else (code, "")


def _interrupted() -> tuple[int, str]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return INTERRUPTED, _TOLD


def _verdict(error: BaseException) -> tuple[int, str]:
    """What an exception means to the shell and to people; raised again where it is a defect."""
    from archs.errors import UserError

    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError):
        from archs.files import refused

        if error.filename is None:
            # Python would try once more to write what is left, and complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            # Whoever read it has seen enough.
            return 1, ""
        return 2, str(refused(error, error.filename or "the output", "used"))
    raise error


def _require_own_packages() -> None:
    """`kernels` and `eval` are other people's names too: make sure that ours are imported."""
    import importlib.util

    from archs.errors import UserError

    home = Path(__file__).resolve().parents[2]
    for name in ("kernels", "archs", "train", "infer"):
        found = importlib.util.find_spec(name)
        origin = Path(str(found.origin)).resolve() if found and found.origin else None
        if origin is None or home not in origin.parents:
            raise UserError(
                f"package '{name}' is taken from {origin}, not from {home}; uninstall the other "
                "one or use a virtual environment of its own (make run does)"
            )
