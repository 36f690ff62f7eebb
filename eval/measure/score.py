"""Score held-out text with a checkpoint's model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from archs.checks import parse
from eval.measure.keeping import kept_as
from eval.measure.progress import Watch
from eval.measure.site import Site, about
from eval.measure.suite import CorpusPlan, QualityPlan
from eval.measure.text import quality_rows
from eval.measure.trained import Source, trained
from eval.results.point import Point
from eval.results.rows import Found


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """checkpoint: its file, after `step` steps. arch: the architecture file that it was trained
    from, if it was. corpus: with the size of vocabulary that its tokenizer was asked for. state:
    the format that it is kept in, read as it would be decoded; "": the parallel form reads.
    """

    checkpoint: str
    step: int
    arch: str | None
    corpus: CorpusPlan
    quality: QualityPlan
    state: str = ""


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bits per byte and loss by position, as at the end of training.

    Raises UserError where the corpus gives other tokens than the model was trained on, and Failure
    where the state does not take its format.
    """
    options = parse(ScoreOptions, point.options, f"the options of {point.key}")
    source = Source(checkpoint=options.checkpoint, step=options.step, arch=options.arch)
    given = trained(source, options.corpus, site, watch)
    model = given.model
    label: dict[str, Any] = {
        "kernel_backend": model.backend, "corpus": options.corpus.spec, "tokens": given.seen,
    }  # fmt: skip
    if options.state:
        kept_as(model, options.state, partial(about, given.spec, **label))
    scored = about(given.spec, model, **label)
    watch.at(0.0, "score")
    rows = quality_rows(
        model, given.tokens, given.spec.scale.seq_len, options.quality, stored=bool(options.state)
    )
    return Found(about=scored, rows=tuple(rows))
