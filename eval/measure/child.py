"""Processes of this program's own modules, whatever the folder they start in holds.

`-m` alone would look in the working folder first, where a user's own `eval/` or `train.py` may lie.
"""

import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]


def command(module: str, *words: str) -> list[str]:
    """What runs a module of ours with this interpreter; start it in `environment()`."""
    return [sys.executable, "-P", "-m", module, *words]


def environment() -> dict[str, str]:
    """This process's environment, in which our modules are found before anybody else's."""
    path = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
