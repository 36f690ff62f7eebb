"""The vocabulary of the tables."""

from eval.results.measures import MEASURES


def test_every_measure_has_a_unit_in_its_name() -> None:
    endings = {"ms": "ms", "byte": ("bytes", "token", "fixed"), "s": "_s", "FLOP": "flops"}
    for name, measure in MEASURES.items():
        if measure.unit in endings:
            assert name.removesuffix("_meas").endswith(endings[measure.unit]), name
