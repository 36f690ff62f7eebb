"""`measure(point, site) -> Found`: everything that is measured goes through here.

A stage is a function of a point, of the `Site` where it is measured and of a `Watch` to tell how
far it is; what it returns depends on the point, the machine and the code alone.
"""

import traceback
from collections.abc import Callable
from contextlib import suppress

from archs.errors import UserError
from archs.files import REFUSALS, refused
from eval.measure import (
    compressing,
    cost,
    hardware,
    keeping,
    latency,
    pruning,
    recall,
    score,
    serving,
    speculation,
    task,
    text,
)
from eval.measure.decode import out_of_memory
from eval.measure.progress import Silent, Watch
from eval.measure.site import Failure, Site
from eval.results.point import Point
from eval.results.rows import About, Found, Status, failed
from infer.sampling import NoTokenError

#: Every stage by its name.
STAGES: dict[str, Callable[[Point, Site, Watch], Found]] = {
    "hardware": hardware.measure,
    "cost": cost.measure,
    "train": text.measure,
    "quality": score.measure,
    "task": task.measure,
    "decode": latency.measure,
    "speculate": speculation.measure,
    "compress": compressing.measure,
    "state": keeping.measure,
    "recall": recall.measure,
    "prune": pruning.measure,
    "serve": serving.measure,
}


def measure(point: Point, site: Site, watch: Watch | None = None) -> Found:
    """The point's rows, or one row that says how it failed.

    Raises UserError on what the user can mend (a full disk, a bad corpus): it can be asked again;
    where the site keeps nothing, also what an error of the program raises.
    """
    try:
        return STAGES[point.stage](point, site, watch or Silent())
    except Failure as failure:
        return failure.found
    except Exception as error:
        if out_of_memory(error):
            site.release()
            return _failed(Status.OOM, _one_line(error))
        if isinstance(error, NoTokenError):
            return _failed(Status.NAN, _one_line(error))
        if isinstance(error, UserError) or site.folder is None:
            raise
        if isinstance(error, OSError) and error.errno in REFUSALS:
            # Not the architecture's fault: a row would say so for ever.
            why = refused(error, error.filename or site.folder, "used")
            raise UserError(
                f"{why}; finished points are kept, run the same command again to go on"
            ) from error
        with suppress(OSError), (site.folder / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{point.key}\n{traceback.format_exc()}\n")
        return _failed(Status.ERROR, f"{type(error).__name__}: {_one_line(error)}")


def _failed(status: Status, note: str) -> Found:
    return Found(about=About(), rows=(failed(status, note),))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
