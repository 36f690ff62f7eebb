"""What the code of a compiled kernel depends on, as one hash: equal hashes, equal machine code.

So a table of compiled kernels is addressed by content, and only what changed is compiled again.
Comments, docstrings, blank lines and where a kernel stands in its file count for nothing.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.language import constexpr
from triton.runtime.jit import JITCallable

from kernels.aot import machine_code
from kernels.aot.ahead import Variant, constants_for, stages_for

_LAYOUT = (tokenize.COMMENT, tokenize.NL)
_MARKS = {tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.NEWLINE: ";"}


def content_key(variant: Variant, target: str) -> str:
    """Hash of all that decides a variant's code for a target, and of how that code is read.

    Sources of the kernel and of every helper, their constants, the arguments' types and
    divisibility, the launch options, Triton's version, the reader of machine code.
    """
    parts = [
        triton.__version__, target, _reader(), *_sources(variant.kernel),
        *_ordered(variant.signature), *_ordered(constants_for(variant, target)),
        *sorted(variant.divisible),
        f"{variant.num_warps} warps", f"{stages_for(variant, target)} stages",
    ]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _ordered(values: Mapping[str, object]) -> list[str]:
    return [f"{name}={value!r}" for name, value in sorted(values.items())]


@cache
def _reader() -> str:
    return Path(machine_code.__file__).read_text(encoding="utf-8")


@cache
def _sources(kernel: JITCallable) -> tuple[str, ...]:
    """Text of a kernel, of what it calls but for Triton's own, and the constants that they read."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        found[_tokens(function.src)] = None
        for name, value in _referenced(function):
            if isinstance(value, JITCallable) and not value.fn.__module__.startswith("triton."):
                waiting.append(value)
            elif isinstance(value, constexpr):
                found[f"{name}={value.value!r}"] = None
    return tuple(found)


def _tokens(source: str) -> str:
    kept: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # A string that begins a statement says something, and nothing is left of its line.
        idle = token.type in (tokenize.STRING, tokenize.NEWLINE) and kept[-1] in _MARKS.values()
        if token.type not in _LAYOUT and not idle:
            kept.append(_MARKS.get(token.type, token.string))
    return " ".join(kept)


def _referenced(function: JITCallable) -> Iterator[tuple[str, Any]]:
    """Names of modules outside, and members of modules, that a function's text mentions."""
    scope = function.get_capture_scope()
    for node in ast.walk(ast.parse(function.src)):
        if isinstance(node, ast.Name) and node.id in scope:
            yield node.id, scope[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = scope.get(node.value.id)
            if isinstance(owner, ModuleType) and hasattr(owner, node.attr):
                yield node.attr, getattr(owner, node.attr)
