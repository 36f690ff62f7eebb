"""Every architecture has one look, told from all others by all eyes, by day and by night."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from archs.registry import HYBRIDS, REGISTRY
from eval.cli.predicted import draw
from eval.predict.roofline import predict
from eval.report.leaderboard import merge
from eval.report.pictures.palette import (
    DARK_PAPER,
    FORMS,
    HUES,
    INK,
    NIGHT,
    PAPER,
    RULE,
    SHAPES,
    SOFT,
    TICK,
    VERDICTS,
    Palette,
    looks_of,
)
from eval.report.pictures.plans import pictures
from tests.eval.colour import DEUTERANOPIA, NORMAL, Array, contrast, delta_e
from tests.eval.synthetic import write_run

KNOWN = (*REGISTRY, *HYBRIDS)
ALL = [look for family in HUES for look in looks_of(family)]
SIGHTS = {"normal": NORMAL, "deuteranopia": DEUTERANOPIA}


@pytest.mark.parametrize(
    ("first", "second", "sight", "distance"),
    [
        ("#ffffff", "#000000", NORMAL, 100.0),
        ("#ff0000", "#00ff00", NORMAL, 170.58),
        # Grey stays grey.
        ("#808080", "#000000", DEUTERANOPIA, 53.59),
    ],
)
def test_distances_are_those_of_the_textbook(
    first: str, second: str, sight: Array, distance: float
) -> None:
    assert delta_e(first, second, sight) == pytest.approx(distance, abs=0.05)


def test_blue_and_purple_are_alike_without_green_cones() -> None:
    blue, purple, orange = "#0b3c8c", "#6a1b9a", "#b26a00"
    assert delta_e(blue, purple) > 30
    assert delta_e(blue, purple, DEUTERANOPIA) < 12
    assert delta_e(blue, orange, DEUTERANOPIA) > 60


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
def test_no_two_looks_are_alike_in_colour_and_in_shape(sight: str, night: bool) -> None:
    assert len(set(ALL)) == len(ALL) == sum(len(HUES[f]) * len(FORMS[f]) for f in HUES)
    for a, b in combinations(ALL, 2):
        if a.shape == b.shape:
            pair = [NIGHT[look.colour] if night else look.colour for look in (a, b)]
            assert delta_e(*pair, SIGHTS[sight]) >= 12, (a, b)


def test_all_registered_have_looks_of_their_own() -> None:
    looks = Palette.of(KNOWN).looks
    assert set(looks) == set(KNOWN)
    assert len(set(looks.values())) == len(KNOWN)
    for arch, family in (("mha", "softmax"), ("mla", "latent"), ("gdn:gqa=3:1", "hybrid")):
        assert looks[arch] in looks_of(family)


def test_families_stand_together_in_a_legend() -> None:
    names = ["gdn:gqa=3:1", "gdn", "mla", "mine.py", "gqa", "linear", "mha"]
    assert Palette.of(names).archs == [
        "gqa", "mha", "mla", "gdn", "linear", "gdn:gqa=3:1", "mine.py",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*KNOWN, "gdn:mla=3:1", "mine/mixer.py", "no-such"])
def test_a_look_does_not_depend_on_the_company(name: str) -> None:
    alone = Palette.of([name]).looks[name]
    assert Palette.of([*KNOWN, name]).looks[name] == alone
    assert Palette.of([name, *reversed(KNOWN)]).looks[name] == alone


def test_other_names_share_a_look_only_when_there_are_no_more() -> None:
    free = looks_of("unknown")
    names = [f"mixer{i}.py" for i in range(len(free) + 1)]
    assert len(set(Palette.of(names[:-1]).looks.values())) == len(free)
    assert len(set(Palette.of(names).looks.values())) == len(free)
    assert Palette.of(reversed(names)).looks == Palette.of(names).looks


def test_other_names_keep_away_from_registered_looks() -> None:
    hybrids = [f"{a}:{b}=3:1" for a in ("gdn", "mamba1", "linear") for b in ("mha", "mla")]
    looks = Palette.of([*KNOWN, *hybrids]).looks
    assert len(set(looks.values())) == len(looks)
    for arch in hybrids:
        assert looks[arch] in looks_of("hybrid")


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
def test_colours_can_be_read(night: bool) -> None:
    def seen(colour: str) -> str:
        return NIGHT[colour] if night else colour

    paper = DARK_PAPER if night else PAPER
    # Labels are written in the colour of their architecture.
    for colour in (INK, SOFT, TICK, *(look.colour for look in ALL)):
        assert contrast(seen(colour), paper) >= 4.5, colour
    assert contrast(seen(RULE), paper) >= 3
    for cell in VERDICTS.values():
        assert contrast(seen(INK), seen(cell)) >= 4.5, cell


def test_every_colour_of_every_picture_has_its_night(tmp_path: Path) -> None:
    drawn = pictures(merge([write_run(tmp_path, seeds=1)]))
    for picture in drawn:
        assert picture.chart is not None, picture.name
        spec = picture.chart.to_dict()
        text = json.dumps({k: v for k, v in spec.items() if k != "datasets"})
        assert set(re.findall(r'"#[0-9a-fA-F]{3,8}"', text)) <= {f'"{c}"' for c in NIGHT}
        assert not re.search(r'"(white|black|gr[ae]y|steelblue)"', text), picture.name
        assert PAPER in text


def test_a_prediction_is_drawn_with_the_same_looks(tmp_path: Path) -> None:
    rows = predict(["mha", "gdn"], "8b", ["h100"], [1, 8], [1024, 4096])
    draw(rows, tmp_path / "drawn.svg")
    text = (tmp_path / "drawn.svg").read_text()
    looks = Palette.of(KNOWN).looks
    drawn = set(re.findall(r"#[0-9a-f]{6}", text)) & {look.colour for look in ALL}
    assert drawn == {looks["mha"].colour, looks["gdn"].colour}
    assert "stroke-dasharray" in text


def test_shapes_are_drawn_about_equally_large() -> None:
    for path in SHAPES.values():
        numbers = [abs(float(n)) for n in re.findall(r"-?\d*\.?\d+", path)]
        assert 0.85 <= max(numbers) <= 1.25
    assert {shape for forms in FORMS.values() for shape in forms} == set(SHAPES)
