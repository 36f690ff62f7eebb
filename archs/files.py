"""Files are read and written here, so that what the system refuses is one clear line.

A file is replaced whole or not at all, by its name in its own folder; where the name is a link,
what it points to is replaced; a device or a pipe is written to.
"""

import errno
import os
import secrets
import stat
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archs.errors import UserError

#: What a file system refuses, as against what a program does wrong.
REFUSALS = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
        errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE,
        errno.ENFILE, errno.ENXIO,
    }
)  # fmt: skip
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Names of what is open already: a second opening would begin at its start.
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


def refused(error: OSError, path: Path | str, doing: str) -> UserError:
    """The line about `path`, which cannot be read or written (`doing`)."""
    remedy = "free some space" if error.errno in FULL else "check the path and its permissions"
    return UserError(f"'{path}' cannot be {doing}: {error.strerror or error}; {remedy}")


@contextmanager
def refusing(path: Path, doing: str) -> Iterator[None]:
    """Within it an OSError is the UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise refused(error, path, doing) from error


def read(path: Path) -> bytes:
    """A file's content. Raises UserError where it cannot be read."""
    with refusing(path, "read"):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError where it cannot be read or is something else."""
    try:
        return read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text (byte {error.start}); convert it or name another file"
        ) from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The values of a TOML file; what: the word for it. Raises UserError on what is off."""
    if not path.is_file():
        raise UserError(f"{what} file '{path}' does not exist; give a name or a .toml file")
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} file '{path}' is not valid TOML: {error}") from None


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises UserError where the system refuses."""
    with refusing(path, "made a folder"):
        path.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: bytes | str) -> None:
    """Write a file, all or nothing. Raises UserError where the system refuses.

    What was there before is then untouched; the folder must be there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with refusing(path, "written"):
        mode = _mode(path)
        if str(path) in STREAMS:
            sys.stdout.flush()
            with os.fdopen(os.dup(STREAMS[str(path)]), "wb") as stream:
                stream.write(data)
        elif mode is not None and not stat.S_ISREG(mode):
            with path.open("wb") as device:
                device.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data, mode)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    # A name of its own, as another process may write the same file.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
