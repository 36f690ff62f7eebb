"""All architectures by name, and how a name, a pattern or a file becomes a model.

A name is a registry entry, the path of a Python file that defines one `Mixer`, either with options
of its own (`archs/names.py`), or a layer pattern over these: `gdn:gqa=3:1` repeats three `gdn`
layers and one `gqa` layer.
"""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from archs.backbone import Model, cast, initialise
from archs.checks import at_least, positive
from archs.cla import CrossLayerAttention, CrossLayerConfig
from archs.csa import CompressedSparseAttention, CompressedSparseConfig
from archs.dsa import SparseLatentAttention, SparseLatentConfig
from archs.errors import UserError, unknown_name
from archs.files import read
from archs.gated_conv import GatedConvConfig, GatedConvolution
from archs.gdn import GatedDeltaConfig, GatedDeltaNet
from archs.gqa import Attention, GroupedConfig, MultiHeadConfig, MultiQueryConfig
from archs.grouped_latent import GroupedLatentAttention, GroupedLatentConfig
from archs.gta import TiedAttention, TiedConfig
from archs.hca import HeavilyCompressedAttention, HeavilyCompressedConfig
from archs.heads import MultiTokenHead
from archs.kda import KimiDeltaAttention, KimiDeltaConfig
from archs.layer import LayerSpec
from archs.layers import NORM_EPS
from archs.linear import LinearAttention, LinearConfig
from archs.mamba1 import Mamba1, Mamba1Config
from archs.mamba2 import Mamba2, Mamba2Config
from archs.mamba3 import Mamba3, Mamba3Config
from archs.mixer import Mixer, MixerConfig, Place
from archs.mla import LatentAttention, LatentConfig
from archs.names import Layers, digest, is_pattern, mixer_of, mixers_in, periods
from archs.nsa import SparseBlockAttention, SparseBlockConfig
from archs.rwkv7 import Rwkv7, Rwkv7Config
from archs.short_conv import ShortConv
from archs.sizes import Scale, round_to
from archs.swa import WindowConfig


class Entry(NamedTuple):
    """A mixer and the configuration that makes it this architecture."""

    mixer: type[Mixer]
    config: type[MixerConfig]


REGISTRY: dict[str, Entry] = {
    "mha": Entry(Attention, MultiHeadConfig),
    "gqa": Entry(Attention, GroupedConfig),
    "mqa": Entry(Attention, MultiQueryConfig),
    "swa": Entry(Attention, WindowConfig),
    "gta": Entry(TiedAttention, TiedConfig),
    "mla": Entry(LatentAttention, LatentConfig),
    "grouped_latent": Entry(GroupedLatentAttention, GroupedLatentConfig),
    "dsa": Entry(SparseLatentAttention, SparseLatentConfig),
    "nsa": Entry(SparseBlockAttention, SparseBlockConfig),
    "hca": Entry(HeavilyCompressedAttention, HeavilyCompressedConfig),
    "csa": Entry(CompressedSparseAttention, CompressedSparseConfig),
    "cla": Entry(CrossLayerAttention, CrossLayerConfig),
    "linear": Entry(LinearAttention, LinearConfig),
    "gdn": Entry(GatedDeltaNet, GatedDeltaConfig),
    "kda": Entry(KimiDeltaAttention, KimiDeltaConfig),
    "mamba1": Entry(Mamba1, Mamba1Config),
    "mamba2": Entry(Mamba2, Mamba2Config),
    "mamba3": Entry(Mamba3, Mamba3Config),
    "shortconv": Entry(GatedConvolution, GatedConvConfig),
    "rwkv7": Entry(Rwkv7, Rwkv7Config),
}

#: Hybrids that suites and tests treat like architectures of their own.
HYBRIDS = ("gdn:gqa=3:1", "swa:gqa=3:1", "mamba2:gqa=3:1")


def entry_of(name: str) -> Entry:
    """The entry of a registry name or of a Python file with one mixer, whatever options the name
    has. Raises UserError.
    """
    name = mixer_of(name)
    if name in REGISTRY:
        return REGISTRY[name]
    if name.endswith(".py"):
        return _loaded(Path(name)).entry
    raise unknown_name("arch", name, REGISTRY)


def source_digest(arch: str) -> str:
    """What the architecture files in a name or pattern said when they were loaded, as 12 hex digits
    for all of them; "" where there are none. Raises UserError as `entry_of` does.
    """
    return _digest_of(layers.mixer for layers in pattern_of(arch))


def _digest_of(names: Iterable[str]) -> str:
    files = dict.fromkeys(name for name in names if name.endswith(".py"))
    digests = [_loaded(Path(name)).digest for name in files]
    return digest(digests)[:12] if digests else ""


def pattern_of(arch: str) -> list[Layers]:
    """The layers of one period. Raises UserError on a bad pattern and an unknown mixer."""
    if not is_pattern(arch):
        entry_of(arch)
    found = periods(arch)
    for layers in found:
        entry_of(layers.mixer)
    return found


def layer_names(arch: str, n_layers: int) -> list[str]:
    """The mixer of each layer: the pattern, repeated. Raises UserError on a bad pattern."""
    return [layers.mixer for layers in _layers(arch, n_layers)]


def _layers(arch: str, n_layers: int) -> list[Layers]:
    """What each layer is of."""
    period = [layers for layers in pattern_of(arch) for _ in range(layers.count)]
    if len(period) > n_layers:
        raise UserError(
            f"pattern '{arch}' has {len(period)} layers but the scale only {n_layers}; "
            "shorten the pattern or take a deeper scale"
        )
    return [period[i % len(period)] for i in range(n_layers)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Everything that determines a model but its weights; data only, so it can be stored.

    overrides: mixer options by architecture name, e.g. {"gqa": {"kv_heads": 1}}; options that the
      name of `arch` has go before them.
    hidden: MLP width; None: chosen so that non-embedding parameters match `mha`; 0: no MLP.
    short_conv: width of a short convolution before every mixer, the same for all; 0: none.
    layers: each of the scale's layers, where the pattern of `arch` and the three above do not say
      enough; `arch` is a name alone then.
    tied: whether the head is the embedding. norm_eps: of all norms of blocks and of the last one.
    """

    arch: str
    scale: Scale
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hidden: int | None = None
    short_conv: int = 0
    layers: tuple[LayerSpec, ...] = ()
    tied: bool = True
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        at_least(self, 0, "hidden", "short_conv")
        positive(self, "norm_eps")
        if not self.layers:
            return
        if len(self.layers) != self.scale.n_layers:
            raise UserError(
                f"{len(self.layers)} layers do not make the {self.scale.n_layers} of scale "
                f"{self.scale.name}; name one LayerSpec for each, or change the scale's n_layers"
            )
        if self.overrides or self.hidden is not None or self.short_conv:
            raise UserError(
                "layers say their own options, widths and convolutions; leave out overrides, "
                "hidden and short_conv"
            )

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Every layer: those given, or what pattern, scale and options make."""
        return self.layers or self._pattern(self.mlp_hidden())

    def spelled_out(self) -> "ModelSpec":
        """The same model, each layer with all its options: they no longer follow from the scale."""
        layers = tuple(
            replace(
                layer, options=_plain(entry_of(layer.mixer).config.at(self.scale, layer.options))
            )
            for layer in self.layer_specs()
        )
        return replace(self, overrides={}, hidden=None, short_conv=0, layers=layers)

    def source_digest(self) -> str:
        """`source_digest` of all its mixers."""
        if self.layers:
            return _digest_of(layer.mixer for layer in self.layers)
        return source_digest(self.arch)

    def build(
        self, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Model:
        """The model with initial weights. Raises UserError on impossible shapes and options."""
        model = self.outline(dtype)
        model.to_empty(device=device)
        initialise(model, seed, len(model.blocks))
        return model

    def outline(self, dtype: torch.dtype = torch.float32) -> Model:
        """The model without storage (meta device): parameter counts, specs and costs."""
        return self._assemble(dtype, self.layer_specs())

    def head(self, dtype: torch.dtype = torch.float32) -> MultiTokenHead:
        """A head that predicts one token more, without storage: a layer as the model's first."""
        layer = self.layer_specs()[0]
        with torch.device("meta"):
            mixer = self._mixer(layer, 0, 1, (0,))
            head = MultiTokenHead(self.scale.d_model, mixer, layer.hidden, self.norm_eps)
        return cast(head, dtype)

    def mlp_hidden(self) -> int:
        """The MLP width in use, where all layers have one."""
        if self.hidden is not None:
            return self.hidden
        scale, bare = self.scale, self._without_mlps()
        norms = scale.n_layers * scale.d_model
        per_unit = 3 * scale.d_model * scale.n_layers
        width = (scale.parameter_budget - bare - norms) / per_unit
        hidden = round_to(width, scale.mlp_multiple)
        total = bare + norms + hidden * per_unit
        if abs(total / scale.parameter_budget - 1) > 0.01:
            raise UserError(
                f"{self.arch} at scale {scale.name} has {total} non-embedding parameters, not "
                f"within 1 % of {scale.parameter_budget}; make its mixer smaller or set "
                "mlp_multiple lower"
            )
        return hidden

    def _without_mlps(self) -> int:
        """Non-embedding parameters of all but the MLPs; counted once, for it takes a model."""
        known = repr(self), tuple(entry_of(name) for name in mixers_in(self.arch))
        if known not in _BARE:
            bare = self._assemble(torch.float32, self._pattern(0))
            _BARE[known] = bare.non_embedding_parameters()
        return _BARE[known]

    def _pattern(self, hidden: int) -> tuple[LayerSpec, ...]:
        layers = _layers(self.arch, self.scale.n_layers)
        for name in self.overrides:
            if name not in (known := {each.mixer for each in layers}):
                raise unknown_name("architecture in overrides", name, known)
        return tuple(
            LayerSpec(
                mixer=each.mixer, options={**self.overrides.get(each.mixer, {}), **each.options},
                hidden=hidden, short_conv=self.short_conv,
            )
            for each in layers
        )  # fmt: skip

    def _assemble(self, dtype: torch.dtype, layers: tuple[LayerSpec, ...]) -> Model:
        scale = self.scale
        with torch.device("meta"):
            mixers = [
                self._mixer(
                    layer, index, scale.n_layers,
                    tuple(i for i, other in enumerate(layers) if other.mixer == layer.mixer),
                )
                for index, layer in enumerate(layers)
            ]  # fmt: skip
            model = Model(
                vocab_size=scale.vocab_size, d_model=scale.d_model, mixers=mixers,
                hidden=[layer.hidden for layer in layers], experts=scale.experts, tied=self.tied,
                norm_eps=self.norm_eps,
            )  # fmt: skip
            return cast(model, dtype)

    def _mixer(
        self, layer: LayerSpec, index: int, n_layers: int, siblings: tuple[int, ...]
    ) -> Mixer:
        scale, entry = self.scale, entry_of(layer.mixer)
        place = Place(d_model=scale.d_model, n_layers=n_layers, layer=index, siblings=siblings)
        mixer: Mixer = entry.mixer(entry.config.at(scale, layer.options), place)
        return ShortConv(mixer, scale.d_model, layer.short_conv) if layer.short_conv else mixer


#: By a model's text and its mixers, for files may come to define others.
_BARE: dict[tuple[str, tuple[Entry, ...]], int] = {}


def _plain(config: MixerConfig) -> dict[str, Any]:
    """Options as a checkpoint gives them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


class _Loaded(NamedTuple):
    entry: Entry
    digest: str


_FILES: dict[Path, _Loaded] = {}


def _loaded(path: Path) -> _Loaded:
    """The one mixer that a file the user named defines, and the file's digest; loaded once."""
    path = path.resolve()
    if path in _FILES:
        return _FILES[path]
    if not path.is_file():
        raise UserError(
            f"architecture file '{path}' does not exist; give a registry name or a file"
        )
    source = digest([read(path).decode("utf-8", errors="replace")])
    # Files of one name in two folders must not take each other's place among the modules.
    module_name = f"decodebench_user_{path.stem}_{digest([str(path)])[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"architecture file '{path}' cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"architecture file '{path}' fails to import: {error!r}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mixer) and value.__module__ == module_name
    ]
    if len(found) != 1:
        names = ", ".join(v.__name__ for v in found) or "none"
        raise UserError(f"architecture file '{path}' must define exactly one Mixer (found {names})")
    _FILES[path] = _Loaded(Entry(found[0], found[0].Config), source)
    return _FILES[path]
