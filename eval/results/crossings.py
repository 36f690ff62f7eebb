"""Where one curve of times comes to lie under another, between the contexts that are known."""

from collections.abc import Sequence

ALWAYS, NEVER = "always", "never"


def between(contexts: Sequence[int], gaps: Sequence[float]) -> tuple[str, int | None]:
    """Verdict and interpolated context, from the first's time less the second's by context."""
    ahead = [gap < 0 for gap in gaps]
    if all(ahead) or not any(ahead):
        return (ALWAYS if ahead[0] else NEVER), None
    i = max(i for i in range(1, len(ahead)) if ahead[i] != ahead[i - 1])
    share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
    crossing = contexts[i - 1] + share * (contexts[i] - contexts[i - 1])
    return ("from" if ahead[i] else "until"), round(crossing)
