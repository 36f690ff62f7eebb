"""Kernels compiled ahead for a machine without time, compiler or network.

`prepare` runs the proof on the stand-in and keeps the machine code of all that it launched; `use`
puts it, on the other machine, where its Triton looks. Triton's key for a kernel holds no GPU and no
path but its own files' and its assembler's, which differ: entries are renamed by what this Triton
would call them. A Triton of another version compiles to other code: prepare with the version that
will run (3.6 needs numpy before 2.4 here).
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from archs.errors import UserError
from eval.measure import child

INDEX, KERNELS = "index.json", "kernels"
#: The target that the stand-in compiles for.
TARGET = "sm_90"


def prepare(folder: Path, ops: Sequence[str] = (), *, more: Sequence[str] = ()) -> dict[str, Any]:
    """Fill `folder` with every kernel that the proof of these operations (all, and steps) launches.

    more: further words for `eval.proof.gpu.standin.run`. Returns the stand-in's report.
    Raises UserError where the stand-in cannot run, and where it finds a fault.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        report = stand_in(Path(scratch), ops, more)
        kept = _pack(Path(scratch) / "cache", folder, report)
    import triton

    index = {
        "target": TARGET, "triton": triton.__version__, "kernels": kept,
        "launchers": report["launchers"],
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return report


def stand_in(scratch: Path, ops: Sequence[str] = (), more: Sequence[str] = ()) -> dict[str, Any]:
    """The report of the proof on the stand-in. Raises UserError where it does not end well."""
    report = scratch / "report.json"
    words = child.command("eval.proof.gpu.standin.run", str(report))
    words += ["--out", str(scratch / "proof"), "--cache", str(scratch / "cache")]
    words += ["--ops", ",".join(ops)] if ops else []
    done = subprocess.run(
        [*words, *more], stderr=subprocess.PIPE, text=True, check=False, env=child.environment()
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"the stand-in ended with exit code {done.returncode}: {last[:300]}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def _pack(cache: Path, folder: Path, report: dict[str, Any]) -> dict[str, dict[str, str]]:
    from triton.runtime.cache import _base32

    kept = {}
    for number, entry in report["kernels"].items():
        files = [p for p in (cache / _base32(number)).glob("*") if p.suffix in (".json", ".cubin")]
        if not files:
            continue
        place = folder / KERNELS / number[:32]
        place.mkdir(parents=True)
        for file in files:
            if not file.name.startswith("__grp__"):
                shutil.copy2(file, place / file.name)
        kept[number] = {**entry, "files": place.name}
    return kept


def use(folder: Path, cache: Path | None = None) -> int:
    """Put the kernels of a prepared folder into Triton's cache. Returns how many there are.

    cache: None: where this Triton looks.
    Raises UserError where the folder is none, or was prepared for another target or Triton.
    """
    import triton
    from triton import knobs

    source = folder / INDEX
    if not source.is_file():
        raise UserError(f"'{folder}' holds no {INDEX}; fill a folder with --prepare first")
    index = json.loads(source.read_text(encoding="utf-8"))
    if index["triton"] != triton.__version__:
        raise UserError(
            f"'{folder}' was prepared with triton {index['triton']}, here is {triton.__version__}; "
            "prepare it again with that version"
        )
    for entry in index["kernels"].values():
        _place(folder / KERNELS / entry["files"], cache or Path(knobs.cache.dir), entry)
    _compile_launchers(index["launchers"].values())
    return len(index["kernels"])


def _place(files: Path, cache: Path, entry: dict[str, str]) -> None:
    from triton.runtime.cache import _base32

    key = _key(entry)
    place = cache / _base32(key)
    place.mkdir(parents=True, exist_ok=True)
    names = []
    for file in files.iterdir():
        shutil.copy2(file, place / file.name)
        names.append(file.name)
    [metadata] = [n for n in names if n.endswith(".json")]
    held = json.loads((place / metadata).read_text(encoding="utf-8"))
    (place / metadata).write_text(json.dumps({**held, "hash": key}), encoding="utf-8")
    group = {"child_paths": {n: str(place / n) for n in names}}
    (place / f"__grp__{metadata}").write_text(json.dumps(group), encoding="utf-8")


def _key(entry: dict[str, str]) -> str:
    """This Triton's name for a kernel."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    source, options = (SimpleNamespace(hash=lambda h=entry[k]: h) for k in ("src", "options"))
    backend = make_backend(GPUTarget("cuda", 90, 32))
    text = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _compile_launchers(sources: Any) -> None:
    """Triton 3.6 has a launcher in C for every signature: all of them, on all cores, at once."""
    sources = list(sources)
    if not sources:
        return
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    options = {
        "library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs,
        "libraries": driver.libraries,
    }  # fmt: skip

    def make(source: dict[str, str]) -> None:
        compile_module_from_src(**source, **options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, sources))
