"""One process at a time writes to a folder of results."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archs.errors import UserError
from archs.files import refusing


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder and hold it until the body ends; a killed process holds nothing.

    Raises UserError where another process holds it, or it cannot be made.
    """
    with refusing(folder, "written"):
        # If a file stands in its place, opening it says so.
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to '{folder}'; wait until it ends, or choose "
                "another --out"
            ) from None
        yield
    finally:
        os.close(handle)
