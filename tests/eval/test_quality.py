"""Held-out quality against figures worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval.measure.quality
from archs.backbone import Model
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure.quality import (
    DocumentScore,
    bits_per_byte,
    document_scores,
    loss_by_position,
    octaves,
    over_documents,
)
from eval.results.statistics import clustered_share, wilson
from eval.tasks.mqar import Mqar
from eval.tasks.score import accuracy
from train.corpus import Corpus
from train.tokenizer import train_or_load
from train.tokens import TokenSet, prepare

VOCAB = 11
#: Tokens of four held-out documents; the first is for development, the others are the test part.
LENGTHS = (9, 40, 13, 21)
#: Bytes of each token id.
TOKEN_BYTES = np.array([0, 1, 1, 1, 2, 3, 5, 8, 2, 4, 1])


@pytest.fixture
def tokens() -> TokenSet:
    held_out = np.random.default_rng(0).integers(1, VOCAB, sum(LENGTHS)).astype(np.uint16)
    return TokenSet(
        train=held_out, held_out=held_out, offsets=(0, *np.cumsum(LENGTHS).tolist()),
        token_bytes=TOKEN_BYTES, eot_id=0, vocab_size=VOCAB, name="made-up",
    )  # fmt: skip


@pytest.fixture
def model() -> Model:
    scale = replace(get_scale("tiny"), d_model=32, head_dim=16, n_layers=2, vocab_size=VOCAB)
    return ModelSpec(arch="gqa", scale=scale, hidden=16).build(seed=1).eval()


def nats_of(model: Model, tokens: TokenSet, document: int, window: int) -> list[float]:
    """Loss of each token of a document, window by window, by torch's own cross entropy."""
    first, last = tokens.offsets[document : document + 2]
    text = [tokens.eot_id, *tokens.held_out[first:last].tolist()]
    losses: list[float] = []
    for start in range(0, len(text) - 1, window):
        ids = torch.tensor(text[start : start + window + 1])
        with torch.no_grad():
            scores = model(ids[None, :-1])[0].log_softmax(-1)
        losses += [-scores[t, target].item() for t, target in enumerate(ids[1:].tolist())]
    assert len(losses) == LENGTHS[document]
    return losses


def bytes_of(tokens: TokenSet, document: int, count: int | None = None) -> int:
    """UTF-8 bytes of a document's first `count` tokens."""
    first, last = tokens.offsets[document : document + 2]
    return sum(TOKEN_BYTES[t] for t in tokens.held_out[first:last][:count].tolist())


# -- bits per byte --


@pytest.mark.parametrize("window", [8, 16, 64])
def test_bits_per_byte_is_what_the_losses_add_up_to(
    model: Model, tokens: TokenSet, window: int
) -> None:
    found = bits_per_byte(model, tokens, part="test", seq_len=window)
    nats = sum(sum(nats_of(model, tokens, d, window)) for d in (1, 2, 3))
    size = sum(bytes_of(tokens, d) for d in (1, 2, 3))
    assert found.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.n == 3
    assert found.low <= found.value <= found.high
    assert found.high > found.low


def test_development_text_is_apart_from_test_text(model: Model, tokens: TokenSet) -> None:
    found = bits_per_byte(model, tokens, part="dev", seq_len=16)
    nats = sum(nats_of(model, tokens, 0, 16))
    assert found.value == pytest.approx(nats / math.log(2) / bytes_of(tokens, 0), rel=1e-5)
    assert found.n == 1


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(
    model: Model, tokens: TokenSet
) -> None:
    with torch.no_grad():
        model.embedding.weight.zero_()
    found = bits_per_byte(model, tokens, part="test", seq_len=16)
    expected = math.log2(VOCAB) * sum(LENGTHS[1:]) / sum(bytes_of(tokens, d) for d in (1, 2, 3))
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_a_document_scored_in_part_counts_the_bytes_of_that_part(
    model: Model, tokens: TokenSet
) -> None:
    """15 tokens are five of each document."""
    found = bits_per_byte(model, tokens, part="test", seq_len=16, max_tokens=15)
    nats = sum(sum(nats_of(model, tokens, d, 16)[:5]) for d in (1, 2, 3))
    size = sum(bytes_of(tokens, d, 5) for d in (1, 2, 3))
    assert found.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_bytes_are_those_of_the_scored_text(tmp_path: Path) -> None:
    """Documents that begin with three bytes a character and go on with one: 20 tokens of each."""
    texts = tuple(f"{chr(0x4E00 + i) * 40}{'plain ascii words ' * 40}" for i in range(4))
    corpus = Corpus("mixed", ("plain ascii words " * 50,), texts, "here")
    tokenizer = train_or_load(corpus, 300, tmp_path)
    tokens = prepare(corpus, tokenizer, tmp_path)
    scale = replace(get_scale("tiny"), n_layers=1, vocab_size=tokens.vocab_size)
    model = ModelSpec(arch="gqa", scale=scale, hidden=16).build().eval()
    with torch.no_grad():
        model.embedding.weight.zero_()
    scores = document_scores(model, tokens, part="test", seq_len=16, max_tokens=60)
    assert [(s.document, s.size_bytes) for s in scores] == [(1, 20), (2, 20), (3, 20)]
    found = bits_per_byte(model, tokens, part="test", seq_len=16, max_tokens=60)
    assert found.value == pytest.approx(math.log2(tokens.vocab_size), rel=1e-6)
    whole = document_scores(model, tokens, part="test", seq_len=16)
    assert [s.size_bytes for s in whole] == [len(text.encode()) for text in texts[1:]]


def test_one_document_has_no_interval() -> None:
    found = over_documents([DocumentScore(0, 300.0, 100)])
    assert (found.value, found.n) == (3.0, 1)
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("count", [2, 3, 5, 9, 40])
def test_the_interval_over_documents_covers_what_it_says(count: int) -> None:
    """Documents of two- to threefold sizes; a bootstrap covers 31 % of two documents."""
    noise, hits = np.random.default_rng(count), 0
    for _ in range(600):
        sizes = 1000 * np.exp(noise.normal(0, 0.4, count))
        values = noise.normal(2.0, 0.3, count)
        found = over_documents(
            [DocumentScore(d, values[d] * sizes[d], sizes[d]) for d in range(count)]
        )
        hits += found.low <= 2.0 <= found.high
    assert 0.92 <= hits / 600 <= 0.98


def test_large_documents_weigh_more() -> None:
    found = over_documents([DocumentScore(0, 100.0, 100), DocumentScore(1, 900.0, 300)])
    assert found.value == 2.5


# -- loss by position --


def test_positions_fall_into_octaves() -> None:
    assert octaves(64) == [(0, 8), (8, 16), (16, 32), (32, 64)]
    assert octaves(63) == [(0, 8), (8, 16), (16, 32)]
    assert octaves(8) == [(0, 8)]
    assert octaves(7) == []


def test_loss_by_position_is_the_mean_over_documents(model: Model, tokens: TokenSet) -> None:
    found = loss_by_position(model, tokens, part="test", reach=32)
    losses = [nats_of(model, tokens, d, 32) for d in (1, 2, 3)]
    windows = [losses[0][:32], losses[0][32:], *losses[1:]]
    assert list(found) == [8, 16, 32]
    for first, last in ((0, 8), (8, 16), (16, 32)):
        chosen = np.array([x for window in windows for x in window[first:last]])
        assert found[last].n == sum(length > first for length in LENGTHS[1:])
        assert found[last].value == pytest.approx(chosen.mean(), rel=1e-5)


@pytest.mark.parametrize("count", [2, 4, 12])
def test_tokens_of_a_document_are_not_taken_as_independent(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard documents are hard at every position: 40 windows are not 320 tokens of evidence."""
    noise, hits = np.random.default_rng(count), 0
    document = torch.arange(count).repeat_interleave(4)
    held = SimpleNamespace(offsets=range(count + 1))
    for _ in range(400):
        hard = torch.from_numpy(noise.normal(3.0, 0.3, count))[document]
        losses = hard[:, None] + torch.from_numpy(noise.normal(0, 1, (len(document), 8)))
        scored = [(losses, torch.ones(losses.shape, dtype=torch.int64), document)]
        monkeypatch.setattr(eval.measure.quality, "_scored", lambda *_, scored=scored: scored)
        found = loss_by_position(None, held, part="test", reach=8)[8]  # type: ignore[arg-type]
        hits += found.low <= 3.0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


# -- recall --


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_intervals(right: int, asked: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    found = wilson(right, asked)
    assert (found.value, found.n) == (right / asked, asked)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


class Oracle(torch.nn.Module):
    """Answers a share of the queries by looking the key up."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, 1)

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        answers = torch.zeros_like(tokens)
        for b, row in enumerate(tokens.tolist()):
            for t, token in enumerate(row):
                where = row.index(token)
                answers[b, t] = row[where + 1] if where + 1 < len(row) else 0
        return answers[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(hidden[..., 0].long(), 64)
        return one_hot.float()


def test_recall_of_one_who_looks_up_and_of_one_who_does_not(model: Model) -> None:
    task = Mqar(vocab=64, seq_len=32, pairs=4)
    looked_up = accuracy(Oracle(64), task, split="test", sequences=256, seed=0)  # type: ignore[arg-type]
    assert (looked_up.value, looked_up.n) == (1.0, 256 * 4)
    guessed = accuracy(model, replace(task, vocab=10), split="dev", sequences=128, seed=0)
    assert guessed.value < 0.6
    assert guessed.n == 128 * 4


def test_queries_of_one_sequence_are_not_taken_as_independent() -> None:
    """Whole sequences succeed or fail: 64 of them are 64 trials, not 512."""
    noise = np.random.default_rng(0)
    asked = np.full(64, 8.0)
    found = [clustered_share(8.0 * (noise.random(64) < 0.7), asked) for _ in range(400)]
    assert 0.92 <= sum(one.low <= 0.7 <= one.high for one in found) / 400 <= 0.98
    assert found[0].n == 512
    apart = [clustered_share(noise.binomial(8, 0.7, 64).astype(float), asked) for _ in range(400)]
    assert 0.92 <= sum(one.low <= 0.7 <= one.high for one in apart) / 400 <= 0.98
