"""A trained model, from a checkpoint or from the point that trains it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archs.backbone import Model
from archs.errors import UserError
from archs.heads import HeadModel
from archs.registry import ModelSpec
from eval.measure import text
from eval.measure.progress import Watch
from eval.measure.site import Site
from eval.measure.suite import CorpusPlan
from eval.results.point import Point
from train.checkpoint import load_head, load_model, read_metadata, read_spec
from train.tokens import TokenSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """checkpoint: its file, after `step` steps, and arch, the architecture file that it was trained
    from, if it was; or the point that trains it, as plain data.
    """

    checkpoint: str = ""
    step: int = 0
    arch: str | None = None
    point: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model, the tokens it was trained on, how many of them, and its checkpoint."""

    spec: ModelSpec
    model: Model
    tokens: TokenSet
    seen: int
    checkpoint: Path

    def head(self) -> HeadModel:
        """The head that was trained with the model. Raises UserError where there is none."""
        return load_head(self.checkpoint, self.model, self.spec)


def source_of(checkpoint: Path, arch: str | None = None) -> Source:
    """A checkpoint, or the one in a folder. Raises UserError where there is none of ours."""
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.safetensors"
    step = read_metadata(checkpoint).progress.step
    return Source(checkpoint=str(checkpoint), step=step, arch=arch)


def trained(source: Source, corpus: CorpusPlan, site: Site, watch: Watch) -> Trained:
    """The model of a source; a point that has not been trained yet is.

    Raises UserError where the corpus gives other tokens than the model was trained on, and Failure
    where training fails.
    """
    if source.point is not None:
        fitted = text.fit(Point(**source.point), site, watch)
        return Trained(
            fitted.spec, fitted.model, fitted.tokens, fitted.about.tokens, fitted.checkpoint
        )
    checkpoint = Path(source.checkpoint)
    identity = read_metadata(checkpoint).identity
    # The file that a checkpoint names is not ours to run: the user named another in its place.
    spec = read_spec(checkpoint, source.arch)
    model = load_model(checkpoint, device=str(site.device), arch=source.arch).eval()
    tokens = site.tokens(corpus.spec, corpus.vocab_size)
    if identity.data and identity.data != tokens.name:
        raise UserError(
            f"'{checkpoint}' was trained on tokens {identity.data}, corpus '{corpus.spec}' gives "
            f"{tokens.name}; name the corpus it was trained on"
        )
    recipe = identity.recipe
    seen = source.step * recipe.batch * recipe.seq_len
    return Trained(spec, model, tokens, seen, checkpoint)
