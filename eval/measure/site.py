"""Where points are measured: a device, a folder for checkpoints, what several points share."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from archs.backbone import Model
from archs.backends import AUTO, resolve_backend
from archs.checks import parse
from archs.errors import MisfitError
from archs.names import folder_name
from archs.ops.matrix import storages_of, weights_of
from archs.registry import ModelSpec
from archs.weights import WeightFormat
from eval.measure.agreement import COMPANY, Agreement, agreement, telling_length
from eval.measure.counters import Counters
from eval.measure.decode import build_to_serve
from eval.measure.family import state_family
from eval.predict.coding import with_codings
from eval.predict.machine import Roofline, measure_roofline, measured_again, with_products
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status, failed
from infer.memory import require_memory
from train.corpus import load_corpus
from train.loop import training_bytes
from train.recipe import Recipe
from train.tokenizer import train_or_load
from train.tokens import TokenSet, prepare

#: The default cache of tokenized text.
CACHE = Path("runs") / ".cache"


class Failure(Exception):
    """Ends a point without its figures. stopped: only because the time budget was spent.

    withheld: figures found all the same, not to be recorded.
    """

    def __init__(
        self, status: Status, about: About, note: str, *, stopped: bool = False,
        withheld: Sequence[Row] = (),
    ) -> None:  # fmt: skip
        super().__init__(note)
        self.found = Found(
            about=about, rows=(failed(status, note),), stopped=stopped, withheld=tuple(withheld)
        )


@contextmanager
def fitting(told: Callable[[], About]) -> Iterator[None]:
    """Raise Failure, "unsupported", where what is done does not fit the model.

    told: describes what was asked for.
    """
    try:
        yield
    except MisfitError as why:
        raise Failure(Status.UNSUPPORTED, told(), str(why)) from None


def serving_dtype(device: torch.device) -> torch.dtype:
    """Weights in training are float32; what is served on a GPU is bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def served_dtype(model: Model, device: torch.device) -> torch.dtype:
    """What a trained model is served in: packed weights say it, others take `serving_dtype`."""
    packed = model.weight_format
    return WeightFormat.named(packed).dtype if packed else serving_dtype(device)


def spec_of(point: Point) -> ModelSpec:
    """The model of a point."""
    return parse(ModelSpec, point.model, f"the model of {point.key}")


def about(spec: ModelSpec, model: Model, **more: Any) -> About:
    """The columns that describe a point's model."""
    return About(
        pattern=" ".join(layer.mixer for layer in spec.layer_specs()),
        family=state_family(block.mixer.state_spec() for block in model.layers),
        params=sum(w.numel() for w in weights_of(model)),
        weight_format=model.weight_format,
        state_format=model.state_format,
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        **more,
    )


class Site:
    """What the points of one process share.

    folder: where checkpoints and tracebacks go; None: nothing is kept, and what is no failure of
    the point itself is raised. checkpoint_folder: where the only point that is trained keeps its
    checkpoint. resume: whether training goes on from one. cache: of tokenized text, shared by runs.
    deadline: by the monotonic clock. roofline: the machine's rates for what is served, where they
    are known.
    """

    def __init__(
        self, folder: Path | None, device: torch.device, *, cache: Path = CACHE,
        deadline: float | None = None, roofline: Roofline | None = None,
        checkpoint_folder: Path | None = None, resume: bool = True,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.resume = resume
        self._checkpoint_folder = checkpoint_folder
        self.device = device
        self.cache = cache
        self.deadline = deadline
        self._rooflines = {} if roofline is None else {serving_dtype(device): roofline}
        self._tokens: dict[tuple[str, int], TokenSet] = {}
        self._served: tuple[str, Model] | None = None
        self._agreed: dict[tuple[object, ...], Agreement] = {}

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

    def roofline(
        self, rows: Sequence[int], *, again: bool = False, dtype: torch.dtype | None = None,
        storages: Sequence[str] = ("",),
    ) -> Roofline:  # fmt: skip
        """This machine's rates, with products of as many rows, each measured once; its ceilings the
        highest of those measured then and beside each timing since.

        again: beside a timing, the ceilings are measured once more. dtype: None: that which is
        served. storages: the formats of the products' weights (`archs.weights`).
        """
        dtype = dtype or serving_dtype(self.device)
        known = self._rooflines.get(dtype)
        if known is None:
            known = measure_roofline(self.device, dtype, rows)
        known = with_products(known, self.device, rows, storages)
        self._rooflines[dtype] = measured_again(known, self.device) if again else known
        return self._rooflines[dtype]

    def rates_of(
        self, models: Sequence[Model], rows: Sequence[int], *, ran_by: str, again: bool = False
    ) -> Roofline:
        """`roofline` for models of one dtype, with products of their weights as they are stored
        and, where it is torch that codes their states as it is written, those rates, too.

        ran_by: the backend as it stands in results.
        """
        storages = sorted({storage for model in models for storage in storages_of(model)})
        dtype = models[0].norm.weight.dtype
        rates = self.roofline(rows, again=again, dtype=dtype, storages=storages)
        if ran_by != "torch":
            return rates
        specs = [spec for model in models for spec in model.state_specs()]
        return with_codings(rates, self.device, specs)

    @cached_property
    def counters(self) -> Counters:
        """The device's counters, calibrated once."""
        return Counters(self.device)

    def to_serve(self, spec: ModelSpec, weights: str = "", state: str = "") -> Model:
        """A model with random weights, stored and its state kept in formats where some are named;
        the last one is kept.

        Raises DoesNotFitError, and Failure where a format does not fit the model.
        """
        known = f"{_identity(spec)} {weights} {state}"
        if self._served is None or self._served[0] != known:
            self.release()
            dtype = serving_dtype(self.device)
            outline = about(spec, spec.outline(dtype))
            with fitting(lambda: replace(outline, weight_format=weights, state_format=state)):
                made = build_to_serve(spec, self.device, dtype, weights, state)
            self._served = known, made
        return self._served[1]

    def release(self) -> None:
        """Free the model that is kept."""
        self._served = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def agreement(
        self, spec: ModelSpec, model: Model, *, context: int, batch: int, backend: str,
        compiled: bool, replay: int,
    ) -> Agreement:  # fmt: skip
        """As `eval.measure.agreement`, found once for all that it holds for. Raises NoFormError."""
        length, company = telling_length(model, context), min(batch, COMPANY)
        stored = str(model.norm.weight.dtype), model.weight_format, model.state_format
        known = _identity(spec), *stored, length, company, backend, compiled, replay
        if known not in self._agreed:
            self._agreed[known] = agreement(
                model, context=context, batches=(batch,), backend=backend, compiled=compiled,
                replay=replay,
            )  # fmt: skip
        return self._agreed[known]

    def require_room(self, spec: ModelSpec, recipe: Recipe) -> None:
        """Raises DoesNotFitError where a model's training would not fit in memory."""
        wanted = training_bytes(spec, recipe)
        require_memory(wanted, self.device, f"training {spec.arch} at scale {spec.scale.name}")

    def to_train(self, spec: ModelSpec, recipe: Recipe, backend: str = AUTO) -> Model:
        """A new model. Raises DoesNotFitError where its training would not fit in memory."""
        self.require_room(spec, recipe)
        model = spec.build(seed=recipe.seed, device=str(self.device))
        return model.use(resolve_backend(backend, self.device))

    def keep_at(self, folder: Path | None) -> None:
        """Keep the next point's checkpoint in a folder of its own; None: nowhere."""
        self._checkpoint_folder = folder

    @property
    def keeps(self) -> bool:
        """Whether there is a place for checkpoints."""
        return self.folder is not None or self._checkpoint_folder is not None

    def work_folder(self, point: Point) -> Path:
        """Where a point keeps its checkpoints. Raises ValueError where nothing is kept."""
        if self._checkpoint_folder is not None:
            return self._checkpoint_folder
        if self.folder is None:
            raise ValueError(f"{point.key} keeps checkpoints; give its site a folder")
        name = f"{point.stage}-{point.scale}-seed{point.seed}-{point.digest}"
        return self.folder / "cells" / folder_name(point.arch) / name


def _identity(spec: ModelSpec) -> str:
    """Everything that a model with random weights depends on, as text."""
    return f"{json.dumps(asdict(spec), sort_keys=True)} {spec.source_digest()}"
