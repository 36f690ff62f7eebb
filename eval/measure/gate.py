"""No latency without correctness, as every timed stage asks for it."""

from collections.abc import Callable

from archs.backends import NoFormError
from eval.measure.agreement import Agreement
from eval.measure.site import Failure
from eval.results.rows import About, Row, Status


def agreed_rows(agree: Callable[[], Agreement], told: About) -> list[Row]:
    """The rows of an agreement that holds.

    Raises Failure about `told` where it does not, those rows withheld, and where the backend has no
    form for the model.
    """
    try:
        found = agree()
    except NoFormError as why:
        raise Failure(Status.UNSUPPORTED, told, str(why)) from None
    rows = [
        Row(measure="agreement_error", value=found.error),
        Row(measure="agreement_limit", value=found.limit),
    ]
    if not found.holds:
        raise Failure(Status.INCORRECT, told, found.why_not, withheld=rows)
    return rows
