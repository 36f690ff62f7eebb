"""Checkpoints: one safetensors file that holds a run and says what it is.

Tensors are named `model.*`, `optimizer.*` and `rng.*`; the header carries JSON metadata from
which the model is rebuilt without any other file, the format of packed weights included. Nothing
is unpickled, and no code is loaded because a checkpoint names it. Writing is atomic
(`archs.files`), so a kill or a full disk leaves the earlier checkpoint intact.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from archs.backbone import Model, cast
from archs.checks import parse
from archs.errors import UserError
from archs.files import make_folder, write
from archs.heads import HEAD, HeadModel
from archs.names import mixer_of, mixers_in, periods
from archs.registry import ModelSpec, source_digest
from archs.storage import store
from archs.weights import PLAIN_WEIGHTS, WeightFormat
from train.identity import Identity
from train.optim import Optimizer
from train.recipe import LATER

FORMAT = "decodebench-checkpoint-1"


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is, and what it needs beside tensors to go on as if never interrupted.

    seconds: spent in training steps, over all sittings. early_loss, average: see `train.loop`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses_seen: int = 0
    early_loss: float = 0.0
    average: float = 0.0
    steps_above: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a checkpoint says about itself. weights: the format that its model's weights are packed
    in (`archs.weights`); "": plain numbers. pruned: the plans by which it was; "": it was not.
    """

    identity: Identity
    config_hash: str
    progress: Progress
    torch_version: str
    weights: str = ""
    pruned: str = ""

    def describe(self) -> dict[str, Any]:
        """As plain JSON values, the header of a file."""
        values = {
            **self.identity.to_dict(), "config_hash": self.config_hash,
            "progress": asdict(self.progress), "torch_version": self.torch_version,
        }  # fmt: skip
        later = (("weights", self.weights), ("pruned", self.pruned))
        return values | {key: value for key, value in later if value}


def save_checkpoint(
    path: Path, model: Model, optimizer: Optimizer, identity: Identity, progress: Progress
) -> None:
    """Write the whole run to `path`, atomically. Raises UserError when the disk refuses."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.tensors().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    device = model.embedding.weight.device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    version = str(torch.__version__)
    _write(path, tensors, Metadata(identity, identity.config_hash, progress, version))


def save_compressed(path: Path, model: Model, parent: Path) -> None:
    """Write a model whose weights are packed, made from the checkpoint `parent`, to `path`.

    It can be loaded, and not be trained on; a head that was trained with the model stays as it is.
    Raises UserError as `save_checkpoint` and where `parent` is none of ours.
    """
    metadata, heads = _read(parent, f"model.{HEAD}.")
    tensors = heads | {f"model.{k}": v for k, v in model.state_dict().items()}
    _write(path, tensors, replace(metadata, weights=model.weight_format))


def save_pruned(path: Path, model: Model, spec: ModelSpec, plan: str, parent: Path) -> None:
    """Write a model that was pruned from the checkpoint `parent` by a plan, to `path`.

    It can be loaded, packed and trained on in another folder; a head that was trained with the
    parent no longer fits and is left out. Raises UserError as `save_compressed`.
    """
    metadata = read_metadata(parent)
    identity = replace(metadata.identity, spec=spec)
    pruned = f"{metadata.pruned},{plan}" if metadata.pruned else plan
    own = replace(metadata, identity=identity, config_hash=identity.config_hash, pruned=pruned)
    _write(path, {f"model.{k}": v for k, v in model.state_dict().items()}, own)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    header = {"format": FORMAT, "checkpoint": json.dumps(metadata.describe())}
    # Cloned row-major: safetensors takes no views into one storage, and an engine may have laid
    # the model's matrices out column-major.
    rows = {k: v.detach().cpu() for k, v in tensors.items()}
    rows = {k: v.clone(memory_format=torch.contiguous_format) for k, v in rows.items()}
    make_folder(path.parent)
    write(path, save(rows, header))


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint says about itself. Raises UserError unless it is one of ours, whole."""
    return _read(path, "none")[0]


def resume(path: Path, model: Model, optimizer: Optimizer, identity: Identity) -> Progress:
    """Load a run into `model`, `optimizer` and the random generators; returns how far it was.

    Raises UserError when the checkpoint belongs to another identity, and names the difference.
    """
    metadata, tensors = _read(path, "all")
    _require_same(path, metadata, identity)
    if metadata.weights:
        raise UserError(
            f"{path} holds weights packed as {metadata.weights}, which cannot be trained on; train "
            "on from the checkpoint that they were made of"
        )
    if metadata.pruned:
        raise UserError(
            f"{path} holds a model pruned by {metadata.pruned} and no optimizer's state; load it, "
            "and train on in another folder"
        )
    weights = _under("model.", tensors)
    _require_fit(path, model, weights)
    _load_weights(model, weights)
    device = model.embedding.weight.device
    try:
        optimizer.load(_under("optimizer.", tensors))
        torch.set_rng_state(tensors["rng.cpu"])
        if device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} has a state of the optimizer or of random numbers that does not "
            f"fit ({error}); restore it, or delete it and train again"
        ) from error
    return metadata.progress


def load_model(
    path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, arch: str | None = None
) -> Model:
    """The trained model, rebuilt from the checkpoint alone.

    dtype: of all that is not packed, and what is computed in.
    arch: the architecture file, to be named by the user if the run was trained from one, since
        a checkpoint alone must not make code run.
    Raises UserError on damaged or foreign files and on tensors that do not fit.
    """
    metadata, tensors = _read(path, "model.")
    spec = _spec(path, metadata, arch)
    weights = _under("model.", tensors)
    weights = {k: v for k, v in weights.items() if not k.startswith(f"{HEAD}.")}
    model = _outline(path, spec, metadata.weights)
    _require_fit(path, model, weights)
    model = cast(model, dtype).to_empty(device=device)
    _load_weights(model, weights)
    return model


def _outline(path: Path, spec: ModelSpec, weights: str) -> Model:
    """A checkpoint's model without storage."""
    model = spec.outline()
    if not weights:
        return model
    try:
        return store(model, WeightFormat.named(weights))
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None


def load_head(path: Path, trunk: Model, spec: ModelSpec | None = None) -> HeadModel:
    """The head that was trained with a model from the same checkpoint, over it.

    spec: the trunk's (None: the checkpoint's, where no architecture file is needed). Raises
    UserError where there is none, and as `load_model`.
    """
    metadata, tensors = _read(path, f"model.{HEAD}.")
    if not tensors:
        raise UserError(
            f"{path} holds no head: it was trained with mtp_weight="
            f"{metadata.identity.recipe.mtp_weight:g}; train one with mtp_weight = 0.3, say"
        )
    weight = trunk.embedding.weight
    spec = spec or _spec(path, metadata, None)
    head = spec.head(weight.dtype).to_empty(device=weight.device)
    weights = {k.removeprefix(f"{HEAD}."): v for k, v in _under("model.", tensors).items()}
    _require_fit(path, head, weights)
    _load_weights(head, weights)
    return HeadModel(trunk, head).eval()


def read_spec(path: Path, arch: str | None = None) -> ModelSpec:
    """What `load_model` builds with the same `arch`, and as it refuses."""
    return _spec(path, read_metadata(path), arch)


def _spec(path: Path, metadata: Metadata, arch: str | None) -> ModelSpec:
    spec = metadata.identity.spec
    mixers = {layer.mixer for layer in spec.layers} or set(mixers_in(spec.arch))
    if arch is not None:
        files = sorted({layer.mixer for layer in spec.layers if layer.mixer.endswith(".py")})
        if len(files) > 1:
            raise UserError(
                f"{path} was trained from {len(files)} architecture files, {', '.join(files)}; "
                f"arch='{arch}' can stand for one alone: build its ModelSpec and load the weights"
            )
        if not spec.layers and _own_options(arch) != _own_options(spec.arch):
            raise UserError(
                f"{path} was trained as '{spec.arch}', which has other options than arch='{arch}'; "
                "name the same ones"
            )
        file, trained = mixer_of(arch), mixer_of(spec.arch)
        options = {file if k == trained else k: v for k, v in spec.overrides.items()}
        layers = tuple(
            replace(layer, mixer=file) if layer.mixer.endswith(".py") else layer
            for layer in spec.layers
        )
        spec = replace(spec, arch=spec.arch if layers else arch, overrides=options, layers=layers)
        _require_same_source(path, metadata.identity.source, arch)
    elif any(name.endswith(".py") for name in mixers):
        raise UserError(
            f"{path} was trained from the architecture file in '{spec.arch}'; code is only loaded "
            "from a file you name, so pass it as arch"
        )
    return spec


def _own_options(arch: str) -> list[dict[str, Any]]:
    return [layers.options for layers in periods(arch)]


def _read(path: Path, wanted: str) -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata and the tensors whose names start with `wanted` ("all", "none")."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; check the path, or train it first")
    prefix = "" if wanted == "all" else wanted
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = file.metadata() or {}
            keys = [k for k in file.keys() if k.startswith(prefix)]  # noqa: SIM118
            tensors = {k: file.get_tensor(k) for k in keys}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path} is damaged or no safetensors file ({error}); restore it, or "
            "delete it and train again"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but no checkpoint of this program (format "
            f"{header.get('format')!r}, not {FORMAT!r}); give a checkpoint that `train` wrote"
        )
    try:
        values = json.loads(header["checkpoint"])
        metadata = Metadata(
            identity=Identity.from_dict(values),
            config_hash=str(values["config_hash"]),
            progress=parse(Progress, values["progress"], "progress"),
            torch_version=str(values["torch_version"]),
            weights=str(values.get("weights", "")),
            pruned=str(values.get("pruned", "")),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"checkpoint {path} carries metadata that cannot be read ({error}); it was altered or "
            "written by another version: restore it, or delete it and train again"
        ) from error
    return metadata, tensors


def _require_same(path: Path, metadata: Metadata, identity: Identity) -> None:
    there, here = metadata.identity.hashed(), identity.hashed()
    keys = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    if not keys and metadata.config_hash == identity.config_hash:
        return
    differences = ", ".join(
        f"{k} is {_told(there, k)!r} there, {_told(here, k)!r} here" for k in keys[:3]
    )
    raise UserError(
        f"{path} belongs to another run: {_name(metadata.identity)} ({metadata.config_hash}), this "
        f"one is {_name(identity)} ({identity.config_hash}): {differences}; start afresh or choose "
        "another run folder"
    )


def _told(values: Mapping[str, Any], name: str) -> object:
    """A value of `Identity.hashed`; 0 of a recipe's field that is left out there."""
    return values.get(name, 0 if name.removeprefix("recipe.") in LATER else None)


def _require_same_source(path: Path, trained: str, arch: str) -> None:
    if trained and trained != source_digest(arch):
        raise UserError(
            f"{path} was trained when '{arch}' said something else ({trained}, now "
            f"{source_digest(arch)}); train again, or restore the file as it was"
        )


def _name(identity: Identity) -> str:
    return f"{identity.spec.arch} at {identity.spec.scale.name}"


def _require_fit(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name in sorted({*own, *weights}):
        there = _form(weights[name]) if name in weights else "absent"
        here = _form(own[name]) if name in own else "absent"
        if there != here:
            raise UserError(
                f"{path} does not fit the model: {name} is {there} there and {here} here; load it "
                "with the architecture it was trained with"
            )


def _form(tensor: Tensor) -> str:
    """What must be equal for a tensor to take another's place: codes must not be cast."""
    plain = tensor.dtype in PLAIN_WEIGHTS.values() or tensor.dtype == torch.float64
    return f"{tuple(tensor.shape)}" + ("" if plain else f" of {str(tensor.dtype)[6:]}")


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
