"""Names of architectures with options of their own: what they say, and what is refused."""

from pathlib import Path

import pytest

from archs.errors import UserError
from archs.names import Layers, folder_name, is_pattern, mixer_of, mixers_in, names_in, periods
from archs.registry import ModelSpec, layer_names
from archs.sizes import get_scale

TINY = get_scale("tiny")


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("gqa", [("gqa", 1, {})]),
        ("gqa(kv_heads=1)", [("gqa", 1, {"kv_heads": 1})]),
        ("swa(window=8, sinks=2)", [("swa", 1, {"window": 8, "sinks": 2})]),
        (
            "swa(window=8):swa(window=64):gqa=2:1:1",
            [("swa", 2, {"window": 8}), ("swa", 1, {"window": 64}), ("gqa", 1, {})],
        ),
        ('lr(1)/my.py(kind="a:b")', [("lr(1)/my.py", 1, {"kind": "a:b"})]),
    ],
)
def test_options_stand_in_parentheses(
    arch: str, layers: list[tuple[str, int, dict[str, object]]]
) -> None:
    wanted = [Layers(mixer=m, count=n, options=options) for m, n, options in layers]
    assert periods(arch) == wanted
    assert mixers_in(arch) == [m for m, *_ in layers]
    assert is_pattern(arch) is (len(layers) > 1)


def test_only_the_last_parentheses_are_options() -> None:
    assert mixer_of("a(1)/my.py") == "a(1)/my.py"
    assert mixer_of("a(1)/my.py(x=2)") == "a(1)/my.py"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("gqa()", "the options of 'gqa\\(\\)' cannot be read: there are none; write them as in"),
        ("gqa(kv_heads)", "cannot be read: .*; write them as in gqa\\(kv_heads=1\\)"),
        ("gqa(a=1,a=2)", "cannot be read"),
        ("gqa(kv_heads=1", "pattern .* needs one positive count|Unknown arch"),
        ("gqaa(kv_heads=1)", "Unknown arch 'gqaa'. Did you mean 'gqa'?"),
        ("gqa(kv_head=1)", "Unknown GroupedConfig option 'kv_head'. Did you mean 'kv_heads'?"),
        ("gqa(kv_heads=3)", "n_heads=4 is not divisible by kv_heads=3"),
        ("gqa(kv_heads=1.5)", "kv_heads must be of type int, not 1.5"),
        ("gdn:gqa(kv_heads=1)", "Unknown arch 'gdn:gqa'"),
    ],
)
def test_bad_options_are_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSpec(arch=arch, scale=TINY).outline()


def test_options_of_a_name_are_those_of_overrides() -> None:
    named = ModelSpec(arch="gqa(kv_heads=1)", scale=TINY)
    given = ModelSpec(arch="gqa", scale=TINY, overrides={"gqa": {"kv_heads": 1}})
    assert named.layer_specs() == given.layer_specs()
    assert named.mlp_hidden() == given.mlp_hidden() > ModelSpec(arch="gqa", scale=TINY).mlp_hidden()


def test_options_of_a_name_go_before_overrides_of_its_mixer() -> None:
    arch = "swa(window=8):swa=1:1"
    spec = ModelSpec(arch=arch, scale=TINY, overrides={"swa": {"window": 5, "sinks": 1}})
    rows = [spec.rows[0] for spec in spec.outline().state_specs()]
    assert [(row.window, row.sinks) for row in rows] == [(8, 1), (5, 1)] * 2
    assert layer_names(arch, 4) == ["swa"] * 4


def test_a_list_of_names_is_split_between_them() -> None:
    assert names_in("gqa, swa(window=8,sinks=2),gdn:gqa=3:1,") == [
        "gqa", "swa(window=8,sinks=2)", "gdn:gqa=3:1",
    ]  # fmt: skip


def test_folders_of_two_options_are_two() -> None:
    names = ["gqa", "gqa(kv_heads=1)", "gqa(kv_heads=2)", "gqa(kv_heads-1)"]
    assert len({folder_name(name) for name in names}) == len(names)
    assert all(Path(folder_name(name)).name == folder_name(name) for name in names)
