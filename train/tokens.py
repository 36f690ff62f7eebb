"""Tokens on disk, the order in which they are trained on, and held-out windows to score.

Token files are memory-mapped uint16 or uint32 beside a JSON note of what they hold. A batch is a
pure function of (seed, step), so every architecture sees the same tokens in the same order and
a resumed run needs nothing but its step.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from archs.checks import parse, require_at_least
from archs.errors import UserError
from archs.files import make_folder, read, write
from train.corpus import Corpus
from train.tokenizer import Tokenizer

IGNORED = -100
FILES = ("train.bin", "held_out.bin")
Part = Literal["dev", "test"]


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What a pair of token files holds; checked before they are used again.

    sha256: of both files and of the other fields.
    """

    dtype: str
    sha256: str
    held_out_offsets: list[int]


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Memory-mapped tokens. Held-out document i is tokens offsets[i]:offsets[i+1].

    token_bytes: UTF-8 bytes that each id stands for, int64 [vocab_size].
    """

    train: np.ndarray
    held_out: np.ndarray
    offsets: tuple[int, ...]
    token_bytes: np.ndarray
    eot_id: int
    vocab_size: int
    name: str


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path) -> TokenSet:
    """Tokenize once; later calls map the cached files. Damaged or foreign ones are rebuilt."""
    name = tokenizer.name
    key = hashlib.sha256(f"{corpus.fingerprint}:{name}".encode()).hexdigest()[:16]
    folder = cache_dir / f"tokens-{key}"
    note = _valid_note(folder)
    if note is None:
        note = _write(corpus, tokenizer, folder)
    dtype = np.dtype(note.dtype)
    return TokenSet(
        train=np.memmap(folder / FILES[0], dtype=dtype, mode="r"),
        held_out=np.memmap(folder / FILES[1], dtype=dtype, mode="r"),
        offsets=tuple(note.held_out_offsets),
        token_bytes=tokenizer.token_bytes,
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        name=name,
    )


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> TokenNote:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    make_folder(folder)
    train = []
    for ids in tokenizer.encode_batch(corpus.train):
        train += [ids, np.asarray([tokenizer.eot_id])]
    held_out = tokenizer.encode_batch(corpus.held_out)
    offsets = [0, *np.cumsum([len(ids) for ids in held_out]).tolist()]
    contents = [np.concatenate(part).astype(dtype).tobytes() for part in (train, held_out)]
    note = TokenNote(
        dtype=np.dtype(dtype).name,
        sha256=_digest(contents, np.dtype(dtype).name, offsets),
        held_out_offsets=offsets,
    )
    for name, content in zip(FILES, contents, strict=True):
        write(folder / name, content)
    write(folder / "note.json", json.dumps(asdict(note)))
    return note


def _digest(contents: Sequence[bytes], dtype: str, offsets: Sequence[int]) -> str:
    digest = hashlib.sha256(json.dumps([dtype, offsets]).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _valid_note(folder: Path) -> TokenNote | None:
    """The note of files that are as they were written; None when they must be made (again)."""
    paths = [folder / name for name in ("note.json", *FILES)]
    if not all(path.is_file() for path in paths):
        return None
    held, *contents = map(read, paths)
    try:
        note = parse(TokenNote, json.loads(held), "note")
    except ValueError:
        return None
    found = _digest(contents, note.dtype, note.held_out_offsets)
    return note if note.sha256 == found else None


class Batches:
    """Training batches: windows of the token stream, each once per epoch, shuffled by seed."""

    def __init__(self, tokens: TokenSet, *, batch: int, seq_len: int, seed: int) -> None:
        require_at_least("batch", batch, 1)
        require_at_least("seq_len", seq_len, 1)
        require_at_least("seed", seed, 0)
        self.tokens = tokens
        self.batch = batch
        self.seq_len = seq_len
        self.seed = seed
        #: One window less than fit, so that each epoch can start at its own offset.
        self.windows = (len(tokens.train) - 1) // seq_len - 1
        if self.windows < batch:
            raise UserError(
                f"the corpus has {len(tokens.train)} training tokens, too few for a batch of "
                f"{batch} x {seq_len}; it must have {(batch + 1) * seq_len + 1}: take a larger "
                "corpus, a smaller batch or seq_len"
            )
        self._order = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        return int(random.integers(self.seq_len)), random.permutation(self.windows)

    def epochs_at(self, step: int) -> float:
        """Passes over the corpus after `step` steps."""
        return step * self.batch / self.windows

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of one step, int64 [B, T] each."""
        rows = []
        for n in range(step * self.batch, (step + 1) * self.batch):
            offset, order = self._order(n // self.windows)
            start = offset + int(order[n % self.windows]) * self.seq_len
            rows.append(self.tokens.train[start : start + self.seq_len + 1])
        window = torch.from_numpy(np.stack(rows).astype(np.int64))
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True, slots=True)
class HeldOutBatch:
    """Windows that never straddle a document; each token is a target exactly once.

    inputs, targets: int64 [B, T], targets IGNORED at padding; document: int64 [B].
    """

    inputs: Tensor
    targets: Tensor
    document: Tensor


def held_out_documents(tokens: TokenSet, part: Part) -> list[int]:
    """Every fourth held-out document is for choosing ("dev"), the others for reporting.

    Raises UserError where one document would have to be both.
    """
    count = len(tokens.offsets) - 1
    if count < 2:
        raise UserError(
            f"{count} held-out documents cannot give development and test text; hold out two"
        )
    return [d for d in range(count) if (d % 4 == 0) == (part == "dev")]


def held_out_batches(
    tokens: TokenSet, *, part: Part, seq_len: int, batch: int, max_tokens: int | None = None
) -> Iterator[HeldOutBatch]:
    """Windows of held-out documents; a document's first token is predicted from end of text.

    `max_tokens` takes that many scored tokens, an equal share from the start of each document.
    Raises UserError on sizes below one.
    """
    for name, value in (("seq_len", seq_len), ("batch", batch), ("max_tokens", max_tokens)):
        if value is not None:
            require_at_least(name, value, 1)
    documents = held_out_documents(tokens, part)
    share = None if max_tokens is None else max(1, max_tokens // len(documents))
    rows: list[tuple[np.ndarray, int]] = []
    for document in documents:
        first, last = tokens.offsets[document : document + 2]
        limit = last if share is None else min(last, first + share)
        ids = np.concatenate(([tokens.eot_id], tokens.held_out[first:limit])).astype(np.int64)
        for start in range(0, len(ids) - 1, seq_len):
            rows.append((ids[start : start + seq_len + 1], document))
    rows.sort(key=lambda row: -len(row[0]))
    for at in range(0, len(rows), batch):
        chosen = rows[at : at + batch]
        width = len(chosen[0][0]) - 1
        inputs = torch.full((len(chosen), width), tokens.eot_id, dtype=torch.int64)
        targets = torch.full((len(chosen), width), IGNORED, dtype=torch.int64)
        for row, (ids, _) in enumerate(chosen):
            inputs[row, : len(ids) - 1] = torch.from_numpy(ids[:-1])
            targets[row, : len(ids) - 1] = torch.from_numpy(ids[1:])
        yield HeldOutBatch(inputs, targets, torch.tensor([d for _, d in chosen]))
