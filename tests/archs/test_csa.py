"""`csa` equals DeepSeek-V4's compressed sparse attention; rows are chosen by one rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.csa import CompressedSparseAttention, CompressedSparseConfig
from archs.errors import UserError
from archs.mixer import Place, asking_losses, losses_left
from archs.ops import sparse
from archs.ops.pooling import attend_picked_rows
from archs.registry import ModelSpec
from archs.sizes import SCALES
from archs.state import PagedSeen, Rows
from archs.state_formats import StateFormat
from archs.storage import keep
from infer.engine import Engine
from tests.archs.deepseek_v4 import Theirs, copy_compressed, our_pieces, series_first
from tests.archs.hf import TOLERANCE, our_steps
from tests.archs.test_mla import small_scale

#: Many index heads: with few, many scores are 0, and `topk` breaks such ties as it likes.
SHAPES = [
    pytest.param(
        {
            "n_heads": 4, "dim": 12, "rope_dim": 4, "q_rank": 9, "out_groups": 2, "out_rank": 5,
            "every": 4, "window": 7, "index_heads": 16, "index_dim": 9, "picks": 3,
        },
        id="few-rows",
    ),
    pytest.param(
        {
            "n_heads": 3, "dim": 8, "rope_dim": 6, "q_rank": 6, "out_groups": 1, "out_rank": 7,
            "every": 3, "window": 2, "index_heads": 13, "index_dim": 6, "picks": 1,
        },
        id="one-row",
    ),
    pytest.param(
        {
            "n_heads": 2, "dim": 6, "rope_dim": 2, "q_rank": 4, "out_groups": 2, "out_rank": 3,
            "every": 5, "window": 4, "index_heads": 3, "index_dim": 8, "picks": 60,
        },
        id="dense",
    ),
]  # fmt: skip


@torch.no_grad()
def copy_indexer(mixer: CompressedSparseAttention, indexer: Any) -> None:
    values, gates = (series_first(p.weight.T, 2).T for p in (indexer.kv_proj, indexer.gate_proj))
    weights = indexer.scorer.weights_proj.weight
    mixer.index_down.weight.copy_(torch.cat((values, gates, weights)))
    mixer.index_q.weight.copy_(indexer.q_b_proj.weight)
    mixer.index_norm.weight.copy_(indexer.kv_norm.weight)
    mixer.index_bias.copy_(series_first(indexer.position_bias, 2))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 43), (3, 43), (2, 1), (1, 63)])
def test_a_pass_and_steps_equal_deepseek_v4(
    options: dict[str, Any], batch: int, length: int
) -> None:
    config, d_model = CompressedSparseConfig(**options), 20
    theirs = Theirs(
        "compressed_sparse_attention", d_model, config, seed=batch,
        index_n_heads=config.index_heads, index_head_dim=config.index_dim,
        index_topk=config.picks,
    )  # fmt: skip
    place = Place(d_model=d_model, n_layers=1, layer=0, siblings=(0,))
    mixer = CompressedSparseAttention(config, place)
    copy_compressed(mixer, theirs.attention)
    copy_indexer(mixer, theirs.attention.compressor.indexer)
    x = torch.randn(batch, length, d_model)
    expected = theirs(x)
    with torch.inference_mode():
        torch.testing.assert_close(mixer(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    pieces = [9, 3, 1, 13] if length > 26 else []
    pieces += [1] * (length - sum(pieces))
    stepwise = theirs(x, pieces)
    torch.testing.assert_close(stepwise, expected, rtol=TOLERANCE, atol=TOLERANCE)
    ours = our_pieces(mixer, x, pieces)
    torch.testing.assert_close(ours, stepwise, rtol=TOLERANCE, atol=TOLERANCE)


def grown(**options: Any) -> Model:
    """Two layers in float64, whose sinks and positions in groups are no longer zero."""
    chosen = {"every": 4, "window": 5, "picks": 3, **options}
    spec = ModelSpec(arch="csa", scale=small_scale(4), overrides={"csa": chosen}, hidden=16)
    model, draw = spec.build(seed=3).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "_bias")):
                parameter.normal_(generator=draw)
    return model


def rows_of(at: Tensor, valid: Tensor) -> list[list[list[int]]]:
    """By sequence and token."""
    return [
        [a[v].tolist() for a, v in zip(rows, valids, strict=True)]
        for rows, valids in zip(at, valid, strict=True)
    ]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((50,), id="at-once"),
        pytest.param((1,) * 50, id="singly"),
        pytest.param((7, 1, 1, 20, 3, 2, 16), id="odd"),
        pytest.param((49, 1), id="last"),
    ],
)
def test_every_split_picks_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, ...]
) -> None:
    """Row by row, in both layers."""
    model, tokens = grown(), torch.randint(0, 101, (2, 50))
    honest, found = sparse.best_rows, list[tuple[Tensor, Tensor]]()

    def seen(*given: Any) -> tuple[Tensor, Tensor]:
        found.append(honest(*given))
        return found[-1]

    monkeypatch.setattr("archs.ops.sparse.best_rows", seen)
    monkeypatch.setattr("archs.csa.best_rows", seen)
    with torch.inference_mode():
        expected = model(tokens)
        wanted = [rows_of(*pair) for pair in found]
        found.clear()
        got = our_steps(model, tokens.split(pieces, 1))
    # Rotary angles are float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for layer in (0, 1):
        steps = [rows_of(*pair) for pair in found[layer::2]]
        assert [[r for step in steps for r in step[b]] for b in (0, 1)] == wanted[layer]


@pytest.mark.parametrize("back", range(1, 9))
@pytest.mark.parametrize("held", [11, 12, 14])
@torch.inference_mode()
def test_a_rollback_takes_both_groups_back(held: int, back: int) -> None:
    """Of four tokens whose rows reach into the group before, across one border and two."""
    model, tokens = grown(), torch.randint(0, 101, (1, 30))
    engine = Engine(model, max_sequences=2, max_context=64, page_size=4, lookback=8)
    slot = engine.store.add()
    engine.extend([slot], tokens[:, :held])
    wrong = (tokens[:, held : held + back] + 1) % 101
    engine.extend([slot], wrong)
    other = engine.store.fork(slot)
    engine.store.rollback(slot, back)
    for part in tokens[:, held:].split([1, 5, 30 - held - 6], 1):
        got = engine.extend([slot], part)
    expected = model(tokens)
    torch.testing.assert_close(got, expected[:, -got.shape[1] :], rtol=1e-5, atol=1e-5)
    last = engine.extend([other], tokens[:, -1:])
    whole = model(torch.cat((tokens[:, :held], wrong, tokens[:, -1:]), 1))
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


def test_a_ragged_decode_step_touches_no_pooled_page_that_is_not_picked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = grown(), list[Rows]()

    def attend(q: Tensor, near: Rows, far: Rows, *given: Any, **options: Any) -> Tensor:
        seen.append(far)
        return attend_picked_rows(q, near, far, *given, **options)

    monkeypatch.setattr("archs.csa.attend_picked_rows", attend)
    tokens = torch.randint(0, 101, (2, 40))
    engine = Engine(model, max_sequences=3, max_context=48, page_size=2)
    # Sequences that do not lie side by side are read page by page.
    slots = [engine.store.add() for _ in range(3)][::-2]
    padded = torch.stack((tokens[0, :39], torch.cat((tokens[1, :17], tokens[1, :22]))))
    engine.extend(slots, padded, torch.tensor([39, 17]))
    seen.clear()
    got = engine.extend(slots, torch.stack((tokens[0, 39:], tokens[1, 17:18])))
    assert [isinstance(s, PagedSeen) and not s.gathered for s in seen] == [True, True]
    with torch.inference_mode():
        for row, length in enumerate((40, 18)):
            expected = model(tokens[row : row + 1, :length])[:, -1]
            torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)


# -- bytes --


def test_bytes_at_the_published_shape() -> None:
    """640/4 numbers a token, a window of 128 rows, and parts of one group for two rows each."""
    published = CompressedSparseConfig(
        n_heads=64, dim=512, rope_dim=64, q_rank=1024, out_groups=8, out_rank=1024, every=4,
        window=128, index_heads=64, index_dim=128, picks=512,
    )  # fmt: skip
    assert CompressedSparseConfig.at(SCALES["8b"], {}) == published
    model, context = ModelSpec(arch="csa", scale=SCALES["8b"]).outline(torch.bfloat16), 4 * 9000
    spec = model.state_specs()[0]
    assert spec.bytes_per_token == 2 * 640 / 4
    window, begun = 2 * 512 * 128, 4 * 2 * 2 * (512 + 128)
    assert spec.state_bytes(context) == 2 * 640 * 9000 + window + begun
    assert spec.scanned_bytes(context) == 2 * 128 * 9000 + window
    assert spec.gathered_bytes(context) == 2 * 512 * 512
    cost = model.cost(Step(batch=1, new_tokens=1, context=context))
    read = 2 * 128 * 9000 + 2 * 512 * 512 + window + begun
    assert sum(op.state_read_bytes for op in cost.ops) == 32 * read


def test_index_keys_have_a_format_of_their_own() -> None:
    model = ModelSpec(arch="csa", scale=SCALES["tiny"]).build()
    before = {t.name: t.nbytes for t in model.state_specs()[0].rows}
    keep(model, StateFormat.named("index:fp8"))
    after = {t.name: t.nbytes for t in model.state_specs()[0].rows}
    assert after["pooled"] == before["pooled"] == 4 * 64
    assert (before["index"], after["index"]) == (4 * 16, 16 + 4)
    tokens = torch.randint(0, 4096, (1, 50))
    assert our_steps(model, tokens.split([44, 1, 5], 1)).isfinite().all()


def test_defaults_follow_the_trained_length() -> None:
    tiny = CompressedSparseConfig.at(SCALES["tiny"], {})
    assert (tiny.every, tiny.window, tiny.picks, tiny.index_dim) == (4, 16, 8, 16)


def test_a_backend_without_a_form_says_so() -> None:
    given: list[Any] = [torch.zeros(1)] * 7
    with pytest.raises(NoFormError, match="pooled rows has no form for backend 'fla'"):
        attend_picked_rows(*given, scale=1.0, backend="fla")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"picks": 0}, "picks=0 must be at least 1"),
        ({"index_heads": 0}, "index_heads=0 must be at least 1"),
        ({"index_dim": 12}, "index_dim=12 is less than rope_dim=16"),
        ({"every": 0}, "every=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompressedSparseConfig.at(SCALES["tiny"], option)


# -- the indexer's own loss --


def test_the_indexer_learns_from_its_loss_alone() -> None:
    model, shared = grown(), asking_losses()
    hidden = model.hidden_states(torch.randint(0, 101, (2, 21)), shared=shared)
    own = losses_left(shared)
    assert len(own) == 2 and all(loss > 0 for loss in own)
    named = dict(model.named_parameters())
    of_index = {name for name in named if ".index_" in name}
    found = torch.autograd.grad(
        torch.stack(own).sum(), list(named.values()), allow_unused=True, retain_graph=True
    )
    reached = {name for name, grad in zip(named, found, strict=True) if grad is not None}
    assert reached == of_index
    assert all(grad.isfinite().all() for grad in found if grad is not None)
    found = torch.autograd.grad(hidden.square().sum(), list(named.values()), allow_unused=True)
    reached = {name for name, grad in zip(named, found, strict=True) if grad is not None}
    assert reached == set(named) - of_index


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_sequence_with_hardly_a_row_has_a_loss_and_gradients(tokens: int) -> None:
    model, shared = grown(), asking_losses()
    hidden = model.hidden_states(torch.arange(tokens)[None], shared=shared)
    (hidden.square().sum() + torch.stack(losses_left(shared)).sum()).backward()
    # With one row at most there is nothing to choose.
    assert all(loss.abs() < 1e-6 for loss in losses_left(shared))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_indexers_loss_falls_as_it_learns() -> None:
    model = grown(index_heads=4, index_dim=16).float()
    tokens = torch.randint(0, 101, (4, 48), generator=torch.Generator().manual_seed(0))
    learning = [p for name, p in model.named_parameters() if ".index_" in name]
    optimizer = torch.optim.Adam(learning, 1e-2)
    losses = []
    for _ in range(60):
        shared = asking_losses()
        model.hidden_states(tokens, shared=shared)
        loss = torch.stack(losses_left(shared)).sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])
