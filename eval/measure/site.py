"""Where points are measured: a device, a folder for checkpoints, what several points share."""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from archs.backbone import Model
from archs.backends import AUTO, resolve_backend
from archs.checks import parse
from archs.registry import ModelSpec, folder_name, layer_names
from eval.counters import Counters
from eval.hardware import Roofline, measure_roofline, measured_again
from eval.results.point import Point
from eval.results.rows import About, Found, Status, failed
from infer.memory import require_memory
from train.corpus import load_corpus
from train.loop import training_bytes
from train.recipe import Recipe
from train.tokenizer import train_or_load
from train.tokens import TokenSet, prepare


class Failure(Exception):
    """Ends a point without its figures; stopped: only the time budget ended it."""

    def __init__(self, status: Status, about: About, note: str, *, stopped: bool = False) -> None:
        super().__init__(note)
        self.found = Found(about=about, rows=(failed(status, note),), stopped=stopped)


def serving_dtype(device: torch.device) -> torch.dtype:
    """Weights in training are float32; what is served on a GPU is bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def spec_of(point: Point) -> ModelSpec:
    """The model of a point."""
    return parse(ModelSpec, point.model, f"the model of {point.key}")


def about(spec: ModelSpec, model: Model, **more: Any) -> About:
    """What the rows of a model are about."""
    names = layer_names(spec.arch, len(model.blocks))
    return About(
        pattern=" ".join(names),
        params=sum(p.numel() for p in model.parameters()),
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        **more,
    )


class Site:
    """What the points of one process share.

    folder: where checkpoints go. cache: of tokenized text, shared by runs. deadline: by the
    monotonic clock. rows: the batches whose products are among the rates of the machine.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, cache: Path, deadline: float | None = None,
        rows: Sequence[int] = (1,),
    ) -> None:  # fmt: skip
        self.folder = folder
        self.device = device
        self.cache = cache
        self.deadline = deadline
        self._rows = sorted(set(rows))
        self._roofline: Roofline | None = None
        self._tokens: dict[tuple[str, int], TokenSet] = {}

    @property
    def late(self) -> bool:
        """Whether the time budget is spent."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def tokens(self, corpus: str, vocab_size: int) -> TokenSet:
        """A corpus, tokenized once and cached beside all runs."""
        held = self._tokens.get((corpus, vocab_size))
        if held is None:
            text = load_corpus(corpus)
            held = prepare(text, train_or_load(text, vocab_size, self.cache), self.cache)
            self._tokens[corpus, vocab_size] = held
        return held

    @property
    def roofline(self) -> Roofline:
        """This machine's rates, measured once; its ceilings the highest of those measured then and
        beside each timing since.
        """
        if self._roofline is None:
            dtype = serving_dtype(self.device)
            self._roofline = measure_roofline(self.device, dtype, self._rows)
        return self._roofline

    def measure_again(self) -> None:
        """Measure the ceilings once more, beside a timing."""
        self._roofline = measured_again(self.roofline, self.device)

    @cached_property
    def counters(self) -> Counters:
        """The device's counters, calibrated once."""
        return Counters(self.device)

    def to_train(self, spec: ModelSpec, recipe: Recipe) -> Model:
        """A new model. Raises DoesNotFitError where its training would not fit in memory."""
        wanted = training_bytes(spec.outline(), recipe)
        require_memory(wanted, self.device, f"training {spec.arch} at scale {spec.scale.name}")
        model = spec.build(seed=recipe.seed, device=str(self.device))
        return model.use(resolve_backend(AUTO, self.device))

    def work_folder(self, point: Point) -> Path:
        """Where a point keeps its checkpoints."""
        name = f"{point.stage}-{point.scale}-seed{point.seed}-{point.digest}"
        return self.folder / "cells" / folder_name(point.arch) / name
