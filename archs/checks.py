"""Checks of values that people give, and dataclasses from plain data.

A dataclass checks its own fields in `__post_init__`, so a wrong value is refused where it is read,
whether it came from a suite, a command or Python. Every refusal is a `UserError`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from numbers import Real
from types import UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from archs.errors import UserError, unknown_name

Record = TypeVar("Record")


def require_at_least(name: str, value: object, least: float) -> None:
    """Refuse a number, or a number of a list, that is not finite or below `least`."""
    for number in _each(value):
        if not (_is_number(number) and math.isfinite(number) and number >= least):
            raise UserError(f"{name}={number} must be at least {least}; change it")


def require_positive(name: str, value: object) -> None:
    """Refuse a number, or a number of a list, that is not finite or not above zero."""
    for number in _each(value):
        if not (_is_number(number) and math.isfinite(number) and number > 0):
            raise UserError(f"{name}={number} must be positive and finite; change it")


def require_some(name: str, values: Iterable[object]) -> None:
    """Refuse an empty list and one that names something twice."""
    held = list(values)
    if not held:
        raise UserError(f"{name} is empty; it needs at least one entry")
    for value in held:
        if held.count(value) > 1:
            raise UserError(f"{name} names {value!r} twice; name it once")


def at_least(owner: object, least: float, *names: str) -> None:
    """`require_at_least` of fields of a dataclass; a field that is None passes."""
    for name in names:
        if getattr(owner, name) is not None:
            require_at_least(name, getattr(owner, name), least)


def positive(owner: object, *names: str) -> None:
    """`require_positive` of fields of a dataclass."""
    for name in names:
        require_positive(name, getattr(owner, name))


def some(owner: object, *names: str) -> None:
    """`require_some` of fields of a dataclass."""
    for name in names:
        require_some(name, getattr(owner, name))


def parse(kind: type[Record], data: object, where: str) -> Record:
    """A dataclass from plain data, recursively.

    Raises UserError naming `where` and the key that is unknown, absent or of another type, and
    what the dataclass itself refuses.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} must be a table, not {data!r}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise unknown_name(f"key in {where}", str(key), known)
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = convert(hints[name], data[name], f"{where}: {name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise UserError(f"{where} lacks '{name}'; add it")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as a field's type; whole numbers pass as floats, lists as tuples."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in options:
            return None
        return convert(next(o for o in options if o is not type(None)), value, where)
    if origin is Literal:
        if value not in options:
            raise unknown_name(where.rpartition(": ")[2], str(value), options)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) != len(value):
            raise UserError(f"{where} must have {len(kinds)} entries, not {len(value)}")
        return tuple(convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {value!r}")
        return [convert(options[0], v, where) for v in value]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table, not {value!r}")
        return {k: convert(options[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if value not in list(hint):
            raise unknown_name(where.rpartition(": ")[2], str(value), [str(e) for e in hint])
        return hint(value)
    if hint is float and _is_number(value):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


def _each(value: object) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
