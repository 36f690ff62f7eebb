"""Models whose layers are named one by one: mixers, options, widths, and a head of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archs.backbone import lay_out
from archs.cost import Step
from archs.errors import UserError
from archs.layer import LayerSpec
from archs.registry import ModelSpec
from archs.sizes import get_scale
from infer.engine import Engine
from train.checkpoint import Progress, load_model, save_checkpoint
from train.identity import Identity
from train.optim import Optimizer, parts_of
from train.recipe import Recipe

SCALE = get_scale("nano")
LAYERS = (
    LayerSpec(mixer="gqa", options={"kv_heads": 1}, hidden=48),
    LayerSpec(mixer="gdn", hidden=16),
    LayerSpec(mixer="swa", options={"window": 4}),
    LayerSpec(mixer="gqa", options={"kv_heads": 2}, hidden=80, short_conv=3),
)
MIXED = ModelSpec(arch="mine", scale=SCALE, layers=LAYERS, tied=False, norm_eps=1e-3)


def test_a_pattern_and_a_scale_make_layers() -> None:
    spec = ModelSpec(
        arch="gdn:gqa=3:1", scale=SCALE, overrides={"gqa": {"kv_heads": 1}}, short_conv=4
    )
    layers = spec.layer_specs()
    assert [layer.mixer for layer in layers] == ["gdn", "gdn", "gdn", "gqa"]
    assert [dict(layer.options) for layer in layers] == [{}, {}, {}, {"kv_heads": 1}]
    assert {(layer.hidden, layer.short_conv) for layer in layers} == {(spec.mlp_hidden(), 4)}
    named = replace(spec, overrides={}, short_conv=0, layers=layers)
    pairs = zip(named.build(seed=3).parameters(), spec.build(seed=3).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_each_layer_is_what_it_says() -> None:
    model = MIXED.build(seed=0)
    widths = [0 if block.mlp is None else block.mlp.hidden for block in model.layers]
    assert widths == [48, 16, 0, 80]
    assert [block.norm_mixer.eps for block in model.layers] == [1e-3] * 4
    assert model.norm.eps == 1e-3
    with pytest.raises(ValueError, match=r"widths \[48, 16, 0, 80\]"):
        _ = model.hidden
    windows = [next((t.window for t in s.rows), None) for s in model.state_specs()]
    assert windows == [None, None, 4, None]


def test_a_head_of_its_own_makes_the_logits_and_is_counted() -> None:
    model = MIXED.build(seed=0).double()
    tokens = torch.randint(SCALE.vocab_size, (2, 9))
    assert model.head is not None
    hidden = model.hidden_states(tokens)
    torch.testing.assert_close(model(tokens), hidden @ model.head.weight.t())
    tied = replace(MIXED, tied=True).build(seed=0)
    head_bytes = model.head.weight.nbytes
    assert model.non_embedding_parameters() == tied.non_embedding_parameters()
    both = sum(p.nbytes for p in model.parameters())
    assert both - head_bytes == sum(2 * p.nbytes for p in tied.parameters())
    assert model.cost(Step(1, 1, 8)).weight_bytes == 2 * tied.cost(Step(1, 1, 8)).weight_bytes


def test_a_split_gives_what_the_whole_gives() -> None:
    model = MIXED.build(seed=0, dtype=torch.float64)
    tokens = torch.randint(SCALE.vocab_size, (2, 12))
    engine = Engine(model, max_sequences=2, max_context=16, page_size=2)
    slots = [engine.store.add(), engine.store.add()]
    with torch.inference_mode():
        pieces = [engine.extend(slots, tokens[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-6, atol=1e-6)


def test_layers_and_what_they_stand_for_are_not_both_given() -> None:
    with pytest.raises(UserError, match="3 layers do not make the 4 of scale nano"):
        replace(MIXED, layers=LAYERS[:3])
    for more in ({"hidden": 8}, {"short_conv": 2}, {"overrides": {"gqa": {"kv_heads": 1}}}):
        with pytest.raises(UserError, match="leave out overrides, hidden and short_conv"):
            replace(MIXED, **more)
    with pytest.raises(UserError, match=r"Unknown arch 'gqs'\. Did you mean 'gqa'"):
        replace(MIXED, layers=(replace(LAYERS[0], mixer="gqs"), *LAYERS[1:])).outline()


def test_an_identity_keeps_them_and_old_hashes_hold() -> None:
    recipe = Recipe(steps=2, batch=1, seq_len=8)
    found = Identity(spec=MIXED, recipe=recipe)
    assert Identity.from_dict(found.to_dict()) == found
    plain = Identity(spec=ModelSpec(arch="gqa", scale=SCALE), recipe=recipe)
    assert plain.to_dict()["spec"].keys() == {"arch", "scale", "overrides", "hidden", "short_conv"}
    hashes = {
        Identity(spec=spec, recipe=recipe).config_hash
        for spec in (MIXED, replace(MIXED, tied=True), replace(MIXED, norm_eps=1e-4))
    }
    assert len(hashes) == 3


def test_files_of_layers_are_part_of_the_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from archs.gqa import Attention\n\n\nclass Mine(Attention): ...\n")
    layers = (replace(LAYERS[0], mixer=str(file)), *LAYERS[1:])
    assert MIXED.source_digest() == ""
    assert len(replace(MIXED, layers=layers).source_digest()) == 12


def test_a_head_of_its_own_is_no_hidden_matrix_and_its_embedding_is_only_looked_up() -> None:
    model = MIXED.build(seed=0)
    parts = {part.name: part for part in parts_of(model, split=True)}
    assert not parts["head.weight"].matrix and parts["head.weight"].decayed
    assert any(part.matrix for part in parts.values())
    lay_out(model, rows=1)
    assert model.head is not None
    assert model.embedding.weight.is_contiguous() and not model.head.weight.is_contiguous()


def test_one_file_cannot_stand_for_several(tmp_path: Path) -> None:
    """A checkpoint names its files; the user's one must not take the place of two."""
    files = [tmp_path / name for name in ("one.py", "two.py")]
    for file in files:
        file.write_text("from archs.gqa import Attention\n\n\nclass Mine(Attention): ...\n")
    layers = tuple(LayerSpec(mixer=str(files[i % 2])) for i in range(4))
    spec = ModelSpec(arch="mine", scale=SCALE, layers=layers)
    recipe = Recipe(steps=1, batch=1, seq_len=8)
    path = tmp_path / "model.safetensors"
    model = spec.build(seed=0)
    identity = Identity(spec=spec, recipe=recipe)
    save_checkpoint(path, model, Optimizer(model, recipe), identity, Progress())
    with pytest.raises(UserError, match=r"2 architecture files.*one\.py.*can stand for one alone"):
        load_model(path, arch=str(files[0]))
