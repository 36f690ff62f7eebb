"""The one exception that means "the user can mend this".

Everything below the command line raises `UserError` with one line that names the value, the
rule and the remedy; the command line prints that line and exits with status 2. Anything else
that escapes is a defect and shows its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: one line that names the value, the rule and the remedy."""


class MisfitError(UserError):
    """What was asked for exists, and does not fit this model: in a suite others may take it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, with the nearest one suggested."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {kind} '{name}'.{hint} Available: {', '.join(names)}.")
