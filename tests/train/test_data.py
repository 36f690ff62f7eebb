"""Tokenizer, token files and batches: exact, repeatable, and clear about bad input."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.errors import UserError
from train.corpus import Corpus
from train.tokenizer import Tokenizer, train_or_load
from train.tokens import (
    IGNORED,
    Batches,
    TokenSet,
    held_out_batches,
    held_out_documents,
    prepare,
)

Damage = Callable[[bytes], bytes]

TEXT = "the quick brown fox jumps over the lazy dog, again and again.\n"
DOCUMENTS = tuple(f"document {i}: {TEXT * (i + 3)}" for i in range(8))
CORPUS = Corpus("made-up", DOCUMENTS, DOCUMENTS[:5], "here")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return train_or_load(CORPUS, 300, cache)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer, cache: Path) -> TokenSet:
    return prepare(CORPUS, tokenizer, cache)


# -- tokenizer --


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.eot_id] == 0


@pytest.mark.parametrize(
    "text",
    ["a<|endoftext|>b", "<|endoftext|>a", "a<|endoftext|>", "<|endoftext|><|endoftext|>", "a\r\nb"],
)
def test_trained_and_cached_tokenizers_are_one(tmp_path: Path, text: str) -> None:
    """The separator inside a document is text."""
    trained = train_or_load(CORPUS, 300, tmp_path)
    cached = train_or_load(CORPUS, 300, tmp_path)
    for tokenizer in (trained, cached):
        ids = tokenizer.encode(text).tolist()
        assert ids == trained.encode(text).tolist()
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text


def test_training_is_repeatable_and_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    first = train_or_load(CORPUS, 300, tmp_path).encode(TEXT).tolist()
    (file,) = tmp_path.glob("*.json")
    whole = file.read_text()
    for damaged in (whole[:100], whole.replace("0,", "1,", 1), "[]", "{}", '{"tokenizer": 3}'):
        assert damaged != whole
        file.write_text(damaged)
        assert train_or_load(CORPUS, 300, tmp_path).encode(TEXT).tolist() == first
        assert file.read_text() == whole


def test_a_vocabulary_must_hold_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=256 is below 257"):
        train_or_load(CORPUS, 256, tmp_path)


# -- tokens --


def test_documents_are_joined_by_end_of_text(tokens: TokenSet, tokenizer: Tokenizer) -> None:
    assert tokens.train.dtype == np.uint16
    assert (tokens.train == tokens.eot_id).sum() == len(DOCUMENTS)
    assert tokenizer.decode(tokens.train[: len(tokenizer.encode(DOCUMENTS[0]))]) == DOCUMENTS[0]


def cut(content: bytes) -> bytes:
    return content[:-1]


def zero(content: bytes) -> bytes:
    return bytes(len(content))


def shift(content: bytes) -> bytes:
    """Another byte in the middle."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, zero, shift])
@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "note.json"])
def test_damaged_token_files_are_made_again(
    tokens: TokenSet, tokenizer: Tokenizer, tmp_path: Path, name: str, damage: Damage
) -> None:
    prepare(CORPUS, tokenizer, tmp_path)
    (file,) = tmp_path.glob(f"*/{name}")
    file.write_bytes(damage(file.read_bytes()))
    again = prepare(CORPUS, tokenizer, tmp_path)
    assert np.array_equal(again.train, tokens.train)
    assert np.array_equal(again.held_out, tokens.held_out)
    assert again.offsets == tokens.offsets


@pytest.mark.parametrize("note", ["[]", "3", '{"dtype": 3}', '{"dtype": "uint16"}', "\x00"])
def test_a_foreign_note_is_no_note(
    tokens: TokenSet, tokenizer: Tokenizer, tmp_path: Path, note: str
) -> None:
    prepare(CORPUS, tokenizer, tmp_path)
    (file,) = tmp_path.glob("*/note.json")
    file.write_text(note)
    assert np.array_equal(prepare(CORPUS, tokenizer, tmp_path).train, tokens.train)


def test_a_disk_that_is_full_while_tokenizing_is_one_line(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"train.bin' cannot be written: No space left.*; free"):
        prepare(CORPUS, tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"json' cannot be written: No space left.*; free some"):
        train_or_load(CORPUS, 300, tmp_path)


def test_batches_are_a_function_of_seed_and_step(tokens: TokenSet) -> None:
    batches = Batches(tokens, batch=3, seq_len=16, seed=1)
    again = Batches(tokens, batch=3, seq_len=16, seed=1)
    other = Batches(tokens, batch=3, seq_len=16, seed=2)
    x, y = batches.batch_at(7)
    assert torch.equal(x, again.batch_at(7)[0])
    assert not torch.equal(x, other.batch_at(7)[0])
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_an_epoch_sees_every_window_once() -> None:
    stream = np.arange(1009, dtype=np.uint16)
    numbered = TokenSet(stream, stream[:1], (0, 1), np.ones(1009), 0, 1009, "numbered")
    batches = Batches(numbered, batch=2, seq_len=16, seed=0)
    steps = batches.windows // 2
    starts = torch.cat([batches.batch_at(s)[0][:, 0] for s in range(steps)]).tolist()
    assert len(set(starts)) == 2 * steps == batches.windows
    assert {s % 16 for s in starts} == {min(starts)}
    assert starts != sorted(starts)
    assert batches.epochs_at(batches.windows) == 2
    later = torch.cat([batches.batch_at(steps + s)[0][:, 0] for s in range(steps)]).tolist()
    assert sorted(later) != sorted(starts)


def test_a_corpus_shorter_than_a_batch_is_refused(tokens: TokenSet) -> None:
    with pytest.raises(UserError, match="too few for a batch of 4 x 100000; it must have 500001"):
        Batches(tokens, batch=4, seq_len=100_000, seed=0)


@pytest.mark.parametrize("seq_len", [7, 64])
def test_every_held_out_token_is_scored_once_within_its_document(
    tokens: TokenSet, seq_len: int
) -> None:
    assert held_out_documents(tokens, "dev") == [0, 4]
    assert held_out_documents(tokens, "test") == [1, 2, 3]
    scored: dict[int, list[int]] = {}
    for part in held_out_batches(tokens, part="test", seq_len=seq_len, batch=4):
        for x, y, document in zip(part.inputs, part.targets, part.document, strict=True):
            kept = y != IGNORED
            scored.setdefault(int(document), []).extend(y[kept].tolist())
            assert torch.equal(x[1:][kept[1:]], y[:-1][kept[1:]])
    for document, found in scored.items():
        first, last = tokens.offsets[document : document + 2]
        assert sorted(found) == sorted(tokens.held_out[first:last].tolist())
    limited = held_out_batches(tokens, part="test", seq_len=seq_len, batch=4, max_tokens=30)
    assert sum(int((p.targets != IGNORED).sum()) for p in limited) == 30
