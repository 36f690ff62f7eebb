"""A suite so small that it trains, asks and times an architecture in a second."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eval.measure.progress import Progress
from eval.measure.run import run_suite
from eval.measure.suite import Suite

#: What makes `decodebench train` a matter of a second.
TRAIN = (
    "--steps", "2", "--batch", "2", "--seq-len", "32", "--vocab-size", "300", "--device", "cpu",
)  # fmt: skip

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "in",
    "a",
    "long",
    "grey",
    "night",
]

SUITE = """
[corpus]
spec = "path:{corpus}"
vocab_size = 300

[train]
scale = "tiny"
steps = 3
batch = 2
seq_len = 32
learning_rates = [{rate}]

[quality]
max_tokens = 2000

[tasks.mqar]
steps = 2
batch = 4
d_model = 32
head_dim = 16
eval_every = 1
test_sequences = 128
learning_rates = [0.003]

[[decode]]
scale = "tiny"
batches = [1, 2]
contexts = [16, 32]
steps = 3
prompt = 8
no_cache = 2
"""


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """A text file of some documents, three of them held out."""
    draw = random.Random(0)
    texts = []
    for _ in range(documents):
        lines = (" ".join(draw.choices(WORDS, k=12)) for _ in range(10))
        texts.append("\n".join(lines))
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(texts))
    return path


def write_suite(
    folder: Path, archs: Sequence[str] = ("gqa",), *, rate: float = 4e-3, more: str = ""
) -> Path:
    """A suite file over a fresh corpus."""
    corpus = write_corpus(folder)
    path = folder / "micro.toml"
    listed = ", ".join(f'"{arch}"' for arch in archs)
    path.write_text(f"archs = [{listed}]\n{SUITE.format(corpus=corpus, rate=rate)}\n{more}\n")
    return path


def run(suite: Suite, out: Path, **options: Any) -> bool:
    """The suite on the CPU, in silence."""
    quiet = Progress(Console(), quiet=True)
    return run_suite(suite, out, device=torch.device("cpu"), progress=quiet, **options)


def cells_of(out: Path) -> list[str]:
    """Keys of the recorded cells, in order, each append once."""
    with (out / "results.csv").open() as file:
        return [row["cell"] for row in csv.DictReader(file) if row["row"].startswith("1/")]


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows that a command printed; NaN is not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads(text, parse_constant=refuse)
    assert isinstance(rows, list) and rows
    return rows
