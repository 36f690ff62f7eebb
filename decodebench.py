"""decodebench from Python: tables and pictures, loaded at their first use.

    import decodebench

    results = decodebench.compare(["gqa", "gdn"], suite="tiny")
    decodebench.leaderboard(results)
    decodebench.plot.quality_against_state(results)

Functions are those of `eval.cli.api`. The packages behind them have everyday names (`eval`,
`train`); they are taken from where this file lies, also beside a `train.py` of the user's.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.cli.api import *  # noqa: F403
    from eval.report import plot as plot

#: In the order in which they import each other.
_PACKAGES = ("kernels", "archs", "train", "infer", "eval")
_HOME = Path(__file__).resolve().parent


def _load(module: str) -> Any:
    """A module of ours. Raises ImportError where another program's package has its name."""
    for name in _PACKAGES:
        taken = sys.modules.get(name)
        if taken is not None and not _is_ours(taken):
            where = getattr(taken, "__file__", None) or "somewhere else"
            raise ImportError(
                f"'{name}' was imported from {where} before, and decodebench has a package of that "
                "name: import decodebench and use it first, or rename the other one"
            )
    sys.path.insert(0, str(_HOME))
    try:
        for name in _PACKAGES:
            importlib.import_module(name)
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(_HOME))


def _is_ours(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("decodebench")
    if name.startswith("_"):
        raise AttributeError(f"module 'decodebench' has no attribute '{name}'")
    if name == "plot":
        return _load("eval.report.plot")
    api = _load("eval.cli.api")
    if name not in api.__all__:
        raise AttributeError(
            f"module 'decodebench' has no attribute '{name}'; it has {', '.join(__dir__())}"
        )
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*_load("eval.cli.api").__all__, "plot"])
