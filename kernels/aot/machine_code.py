"""What a kernel's machine code does: global loads by width, those in loops apart, matrix products.

Control flow is read from labels and branches: a load is in a loop when its block can reach itself.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from re import Pattern

_MATRIX = re.compile(r"\b(?:HGMMA|HMMA|IMMA|QGMMA|UTCHMMA|UTCQMMA|v_mfma\w*)")
_SASS_LOAD = re.compile(r"\b(?:LDGSTS|LDG|UTMALDG)\b(?P<how>[A-Z0-9.]*)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_[us]?(?P<how>dwordx[234]|dword|short|byte)")
_AMD_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True, slots=True)
class Code:
    """Global loads and asynchronous copies by their width in bytes, and matrix instructions.

    loop_load_bytes: of the loads, those in loops.
    """

    load_bytes: Counter[int]
    loop_load_bytes: Counter[int]
    matrix_instructions: int


@dataclass(frozen=True, slots=True)
class _Dialect:
    """label: of a line. jump: a branch and its label. always: a jump that never falls through, or
    an end. load: with group `how`, from which `_width` reads bytes."""

    label: Pattern[str]
    jump: Pattern[str]
    always: Pattern[str]
    load: Pattern[str]


_SASS = _Dialect(
    label=re.compile(r"^(\.L_x_\d+):"),
    jump=re.compile(r"\b(?:BRA|CALL)\b.*`\((\.L_x_\d+)\)"),
    always=re.compile(r"\*/\s+(?:BRA `|EXIT|RET)"),
    load=_SASS_LOAD,
)
_AMD = _Dialect(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    jump=re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
    always=re.compile(r"\bs_(?:branch|endpgm|setpc_b64)\b"),
    load=_AMD_LOAD,
)


@dataclass(slots=True)
class _Block:
    loads: Counter[int] = field(default_factory=Counter)
    jumps: list[str] = field(default_factory=list)
    falls: bool = True


def read_sass(text: str) -> Code:
    """The code that `nvdisasm -c` prints."""
    return _read(text, _SASS)


def read_amdgcn(text: str) -> Code:
    """The assembly of an AMD GPU."""
    return _read(text, _AMD)


def _read(text: str, dialect: _Dialect) -> Code:
    blocks, labels = _blocks(text, dialect)
    loads = sum((b.loads for b in blocks), Counter[int]())
    loops = Counter[int]()
    for i, block in enumerate(blocks):
        if block.loads and i in _reached(i, blocks, labels):
            loops += block.loads
    return Code(loads, loops, len(_MATRIX.findall(text)))


def _blocks(text: str, dialect: _Dialect) -> tuple[list[_Block], dict[str, int]]:
    blocks, labels = [_Block()], dict[str, int]()
    for line in text.splitlines():
        if label := dialect.label.match(line):
            blocks.append(_Block())
            labels[label[1]] = len(blocks) - 1
        elif load := dialect.load.search(line):
            blocks[-1].loads[_width(load)] += 1
        else:
            jump = dialect.jump.search(line)
            ends = dialect.always.search(line)
            if jump:
                blocks[-1].jumps.append(jump[1])
            if ends:
                blocks[-1].falls = False
            if jump or ends:
                blocks.append(_Block())
    return blocks, labels


def _reached(start: int, blocks: list[_Block], labels: dict[str, int]) -> set[int]:
    """The blocks that control can come to after block `start`."""

    def after(i: int) -> Iterator[int]:
        yield from (labels[name] for name in blocks[i].jumps)
        if blocks[i].falls and i + 1 < len(blocks):
            yield i + 1

    reached: set[int] = set()
    waiting = list(after(start))
    while waiting:
        if (i := waiting.pop()) not in reached:
            reached.add(i)
            waiting.extend(after(i))
    return reached


def _width(load: re.Match[str]) -> int:
    how = load["how"]
    if load.re is _AMD_LOAD:
        return _AMD_WIDTH[how]
    if load[0].startswith("UTMALDG") or ".128" in how:
        return 16
    if ".64" in how:
        return 8
    # Unsigned or signed; a cache hint (LTC128B) is no width.
    small = re.search(r"\.[US](8|16)\b", how)
    return int(small[1]) // 8 if small else 4
