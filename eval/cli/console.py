"""Where commands print: names are text and never markup, and no character fails."""

import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given; 160 columns wide where nobody's terminal is."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stderr or stream.isatty() else 160
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


out = console()
err = console(stderr=True)
