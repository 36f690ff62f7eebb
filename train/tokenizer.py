"""Byte-level BPE, trained on the corpus with `tokenizers` and cached by its fingerprint.

Every UTF-8 text comes back exactly. Token 0 is <|endoftext|>, the end of each document.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from archs.errors import UserError
from archs.files import make_folder, read, write
from train.corpus import SEPARATOR, Corpus

#: The 256 bytes and the end of text.
SMALLEST_VOCAB = 257


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, backend: Backend, name: str) -> None:
        # Inside a document the separator is ordinary text: only `eot_id` ends one. The setting is
        # not part of a tokenizer's file, so it is made here for trained and cached ones alike.
        backend.encode_special_tokens = True
        self._backend = backend
        self.name = name
        self.eot_id = int(backend.token_to_id(SEPARATOR) or 0)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._backend.get_vocab_size())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; none for the end of text."""
        size = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab().items():
            # A byte-level vocabulary writes every byte as one character.
            size[index] = len(token)
        size[self.eot_id] = 0
        return size

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 [n]; a separator inside the text is text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def train_or_load(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """The tokenizer of a corpus's training documents; trained once, then read from the cache.

    A cached file that is not as it was written is made again. Raises UserError when `vocab_size`
    cannot hold the bytes, and when the disk refuses.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size={vocab_size} is below {SMALLEST_VOCAB} (256 bytes and end of text); "
            "raise it"
        )
    name = f"bpe{vocab_size}-{corpus.fingerprint[:16]}-{tokenizers.__version__}"
    path = cache_dir / f"{name}.json"
    cached = _load(path) if path.exists() else None
    if cached is None:
        cached = _train(corpus, vocab_size)
        make_folder(cache_dir)
        text = cached.to_str()
        write(path, json.dumps({"sha256": _digest(text), "tokenizer": text}))
    return Tokenizer(cached, name)


def _load(path: Path) -> Backend | None:
    """The tokenizer of a cached file; None where it is damaged."""
    try:
        held = json.loads(read(path))
        text = held["tokenizer"]
        return Backend.from_str(text) if held["sha256"] == _digest(text) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _train(corpus: Corpus, vocab_size: int) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.train, trainer, length=len(corpus.train))
    return backend
