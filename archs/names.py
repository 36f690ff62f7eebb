"""What an architecture's name says, whether its mixers exist or not.

A name is a mixer's, with options of its own in parentheses where some differ from the scale's, as
in `gqa(kv_heads=1,window=64)`, or a layer pattern over such names, as in `gdn(beta_max=2):gqa=3:1`.
Options are written as TOML writes them.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from archs.errors import UserError

_OPTIONS = re.compile(r"\([^()]*\)")
_LAST = re.compile(r"\(([^()]*)\)$")
#: Colons and commas between names, none of those in options.
_BETWEEN = re.compile(r":(?![^()]*\))")
_LISTED = re.compile(r",(?![^()]*\))")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """`count` layers of one mixer, a registry name or a file, with options of their own."""

    mixer: str
    count: int
    options: dict[str, Any]


def mixer_of(name: str) -> str:
    """A name without its options."""
    return _LAST.sub("", name)


def options_of(name: str) -> dict[str, Any]:
    """The options in a name. Raises UserError where they are not TOML."""
    found = _LAST.search(name)
    if found is None:
        return {}
    try:
        if not found[1].strip():
            raise ValueError("there are none")
        return dict(tomllib.loads(f"options = {{{found[1]}}}")["options"])
    except ValueError as error:
        raise UserError(
            f"the options of '{name}' cannot be read: {error}; write them as in gqa(kv_heads=1) or "
            "gqa(window=64,sinks=4), text in quotes"
        ) from error


def is_pattern(arch: str) -> bool:
    """Whether a name is a layer pattern: it ends in counts, which no file's path does."""
    return not arch.endswith(".py") and "=" in _OPTIONS.sub("", arch)


def periods(arch: str) -> list[Layers]:
    """The layers of one period. Raises UserError on a bad pattern and on options that are not TOML.

    Whether the mixers exist, and have these options, is another question.
    """
    if not is_pattern(arch):
        return [_layers(arch, 1)]
    left, _, right = arch.rpartition("=")
    names, counts = _BETWEEN.split(left), right.split(":")
    if len(names) != len(counts) or not all(c.isdecimal() and int(c) > 0 for c in counts):
        raise UserError(
            f"pattern '{arch}' needs one positive count per architecture, as in gdn:gqa=3:1"
        )
    return [_layers(name, int(count)) for name, count in zip(names, counts, strict=True)]


def _layers(name: str, count: int) -> Layers:
    return Layers(mixer=mixer_of(name), count=count, options=options_of(name))


def mixers_in(arch: str) -> list[str]:
    """The mixers that a name or pattern speaks of, whether they exist or not."""
    names = _BETWEEN.split(arch.rpartition("=")[0]) if is_pattern(arch) else [arch]
    return [mixer_of(name) for name in names]


def names_in(listed: str) -> list[str]:
    """The names of a list with commas, as in `gqa,swa(window=64,sinks=4)`."""
    return [name.strip() for name in _LISTED.split(listed) if name.strip()]


def folder_name(arch: str) -> str:
    """A folder's name for an architecture; paths and options that differ anywhere have two."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in arch)
    return f"{plain}-{digest([arch])[:8]}" if ".py" in arch or "(" in arch else plain


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts side by side, in hex digits."""
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()
