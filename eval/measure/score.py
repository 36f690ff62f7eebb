"""Score held-out text with a checkpoint's model."""

from dataclasses import dataclass
from pathlib import Path

from archs.checks import parse
from archs.errors import UserError
from eval.measure.progress import Watch
from eval.measure.site import Site, about
from eval.measure.suite import CorpusPlan, QualityPlan
from eval.measure.text import quality_rows
from eval.results.point import Point
from eval.results.rows import Found
from train.checkpoint import load_model, read_metadata, read_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """checkpoint: its file, after `step` steps. arch: the architecture file that it was trained
    from, if it was. corpus: with the size of vocabulary that its tokenizer was asked for.
    """

    checkpoint: str
    step: int
    arch: str | None
    corpus: CorpusPlan
    quality: QualityPlan


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bits per byte and loss by position, as at the end of training.

    Raises UserError where the corpus gives other tokens than the model was trained on.
    """
    options = parse(ScoreOptions, point.options, f"the options of {point.key}")
    checkpoint = Path(options.checkpoint)
    identity = read_metadata(checkpoint).identity
    # The file that a checkpoint names is not ours to run: the user named another in its place.
    spec = read_spec(checkpoint, options.arch)
    model = load_model(checkpoint, device=str(site.device), arch=options.arch).eval()
    tokens = site.tokens(options.corpus.spec, options.corpus.vocab_size)
    if identity.data and identity.data != tokens.name:
        raise UserError(
            f"'{checkpoint}' was trained on tokens {identity.data}, corpus "
            f"'{options.corpus.spec}' gives {tokens.name}; name the corpus it was trained on"
        )
    recipe = identity.recipe
    trained = about(
        spec, model, corpus=options.corpus.spec, kernel_backend=model.backend,
        tokens=options.step * recipe.batch * recipe.seq_len,
    )  # fmt: skip
    watch.at(0.0, "score")
    rows = quality_rows(model, tokens, spec.scale.seq_len, options.quality)
    return Found(about=trained, rows=tuple(rows))
