"""Names, patterns and files become models of equal size and, where they share, equal weights."""

from pathlib import Path

import pytest
import torch

from archs.backbone import Model
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec, entry_of, layer_names
from archs.sizes import SCALES, get_scale

TINY = SCALES["tiny"]
NAMES = (*REGISTRY, *HYBRIDS)

GOOD_FILE = """
from archs.gqa import Attention
from archs.swa import WindowConfig


class Mine(Attention):
    Config = WindowConfig
"""


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("gqa", ["gqa"] * 4),
        ("swa:gqa=3:1", ["swa", "swa", "swa", "gqa"]),
        ("swa:gqa=1:1", ["swa", "gqa", "swa", "gqa"]),
        ("mla:swa:gqa=1:1:1", ["mla", "swa", "gqa", "mla"]),
        ("gqa=4", ["gqa"] * 4),
    ],
)
def test_pattern_repeats_over_the_layers(arch: str, names: list[str]) -> None:
    assert layer_names(arch, 4) == names


@pytest.mark.parametrize(
    "arch",
    ["swa:gqa=3", "swa=3:1", "gqa=", "gqa=0", "swa:gqa=3:-1", "swa:gqa=3:1.5", "swa:gqa=3:one"],
)
def test_pattern_without_one_positive_count_each_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match="needs one positive count per architecture"):
        layer_names(arch, 8)


def test_pattern_longer_than_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="has 6 layers but the scale only 4"):
        layer_names("swa:gqa=5:1", 4)


@pytest.mark.parametrize(
    ("arch", "wrong", "nearest"),
    [("gqaa", "gqaa", "gqa"), ("swa:mlaa=1:1", "mlaa", "mla"), ("CLA", "CLA", None)],
)
def test_unknown_name_lists_all_and_suggests_the_nearest(
    arch: str, wrong: str, nearest: str | None
) -> None:
    with pytest.raises(UserError) as caught:
        layer_names(arch, 4)
    message = str(caught.value)
    assert message.startswith(f"Unknown arch '{wrong}'.")
    assert (f"Did you mean '{nearest}'?" in message) is (nearest is not None)
    assert all(name in message for name in REGISTRY)


@pytest.mark.parametrize("scale", ["nano", "micro", "tiny", "mini", "small", "base", "70m", "350m"])
@pytest.mark.parametrize("arch", NAMES)
def test_parameters_are_equal_within_one_percent(arch: str, scale: str) -> None:
    model = ModelSpec(arch=arch, scale=get_scale(scale)).outline()
    ratio = model.non_embedding_parameters() / get_scale(scale).parameter_budget
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("scale", list(SCALES))
def test_any_two_architectures_are_within_what_the_readme_says(scale: str) -> None:
    deep = get_scale(scale)
    sizes = [
        ModelSpec(arch=arch, scale=deep).outline().non_embedding_parameters() for arch in NAMES
    ]
    assert max(sizes) / min(sizes) <= (1.016 if scale == "nano" else 1.013)


@pytest.mark.parametrize("scale", list(SCALES))
def test_budget_is_what_mha_holds(scale: str) -> None:
    model = ModelSpec(arch="mha", scale=get_scale(scale)).outline()
    assert model.non_embedding_parameters() == get_scale(scale).parameter_budget


def test_mixer_beyond_the_budget_is_refused() -> None:
    spec = ModelSpec(arch="mha", scale=TINY, overrides={"mha": {"head_dim": 256}})
    with pytest.raises(UserError, match=r"not within 1 % of 791680"):
        spec.outline()


def test_unknown_scale_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown scale '70M'.* Did you mean '70m'"):
        get_scale("70M")


def test_unknown_option_suggests_the_nearest() -> None:
    spec = ModelSpec(arch="gqa", scale=TINY, overrides={"gqa": {"kv_head": 1}})
    with pytest.raises(UserError, match=r"option 'kv_head'\. Did you mean 'kv_heads'\?"):
        spec.outline()


def test_override_of_an_absent_architecture_is_refused() -> None:
    spec = ModelSpec(arch="swa:gqa=3:1", scale=TINY, overrides={"mqa": {"kv_heads": 1}})
    with pytest.raises(UserError, match="Unknown architecture in overrides 'mqa'"):
        spec.outline()


def test_override_reaches_its_layers_only() -> None:
    spec = ModelSpec(arch="swa:gqa=3:1", scale=TINY, overrides={"swa": {"window": 7}})
    assert [s.rows[0].window for s in spec.outline().state_specs()] == [7, 7, 7, None]


def parameters(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("arch", NAMES)
def test_shared_modules_start_equal_across_architectures(arch: str) -> None:
    built = [ModelSpec(arch=a, scale=TINY, hidden=40).build(seed=7) for a in ("mha", arch)]
    reference, other = (
        {n: p for n, p in parameters(m).items() if ".mixer." not in n} for m in built
    )
    assert reference.keys() == other.keys()
    assert all(torch.equal(reference[name], other[name]) for name in reference)


def test_same_seed_same_weights_and_another_seed_others() -> None:
    spec = ModelSpec(arch="swa:mla=3:1", scale=TINY)
    first, again, other = (parameters(spec.build(seed=s)) for s in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_file_with_one_mixer_is_an_architecture(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD_FILE)
    spec = ModelSpec(arch=str(file), scale=TINY)
    model, built_in = spec.build(seed=1), ModelSpec(arch="swa", scale=TINY).build(seed=1)
    assert type(model.layers[0].mixer).__name__ == "Mine"
    tokens = torch.arange(50)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens), built_in(tokens))


def test_file_may_stand_in_a_pattern_and_takes_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD_FILE)
    spec = ModelSpec(arch=f"{file}:gqa=3:1", scale=TINY, overrides={str(file): {"window": 5}})
    assert [s.rows[0].window for s in spec.outline().state_specs()] == [5, 5, 5, None]


def test_a_path_with_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "lr=3"
    folder.mkdir()
    file = folder / "mine.py"
    file.write_text(GOOD_FILE)
    assert layer_names(str(file), 2) == [str(file)] * 2
    assert layer_names(f"{file}:gqa=1:1", 2) == [str(file), "gqa"]
    with pytest.raises(UserError, match="does not exist"):
        layer_names(str(folder / "other.py"), 2)


def test_files_of_one_name_have_modules_of_their_own(tmp_path: Path) -> None:
    modules = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(GOOD_FILE)
        modules.add(entry_of(str(tmp_path / folder / "mine.py")).mixer.__module__)
    assert len(modules) == 2


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder, name in (("a", "First"), ("b", "Second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(GOOD_FILE.replace("Mine", name))
    names = [entry_of(str(tmp_path / f / "mine.py")).mixer.__name__ for f in ("a", "b", "a")]
    assert names == ["First", "Second", "First"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("x = 1\n", r"must define exactly one Mixer \(found none\)"),
        ("from archs.gqa import Attention\n", r"exactly one Mixer \(found none\)"),
        (
            GOOD_FILE + "\n\nclass Other(Attention):\n    pass\n",
            r"exactly one Mixer \(found Mine, Other\)",
        ),
        ("import no_such_module_here\n", "fails to import: ModuleNotFoundError"),
        ("class Mine(:\n", "fails to import: SyntaxError"),
    ],
    ids=["missing", "no-mixer", "only-imported", "two-mixers", "import-error", "syntax-error"],
)
def test_bad_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        entry_of(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
