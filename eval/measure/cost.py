"""State, bytes and intensity that follow from the declarations alone."""

from eval.measure.cell_rows import cost_rows
from eval.measure.progress import Watch
from eval.measure.site import Site, about, serving_dtype, spec_of
from eval.results.point import Point
from eval.results.rows import Found, Row

#: Contexts at which state and intensity are predicted for every scale.
CONTEXTS = (0, 256, 1024, 4096, 16384)


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """The bytes that a model of this shape holds and reads."""
    spec = spec_of(point)
    model = spec.outline(serving_dtype(site.device))
    specs = model.state_specs()
    rows = [
        Row(measure="state_bytes_per_token", value=sum(s.bytes_per_token for s in specs)),
        Row(measure="state_bytes_fixed", value=sum(s.fixed_bytes for s in specs)),
        Row(measure="mlp_hidden", value=model.hidden),
    ]
    for context in point.options["contexts"]:
        rows += cost_rows(model, context)
    return Found(about=about(spec, model), rows=tuple(rows))
