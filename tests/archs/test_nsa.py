"""`nsa` chooses by one rule and reads what it says; dense where it picks all; bytes by a formula.

That it equals fla-core's naive form is held by `tests/peers/test_nsa.py`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.errors import UserError
from archs.nsa import SparseBlockAttention, SparseBlockConfig
from archs.ops import blocks as ops
from archs.ops.blocks import Blocks, attend_all_blocks
from archs.registry import ModelSpec
from archs.sizes import SCALES
from archs.state import PagedSeen
from archs.state_formats import StateFormat
from archs.storage import keep
from infer.engine import Engine
from kernels.attention.torch import attention, window_mask
from tests.archs.hf import our_steps
from tests.archs.test_mla import small_scale


def small(**options: Any) -> Model:
    """Two layers over random weights in float64, two query heads to a KV head."""
    chosen = {"block": 3, "picks": 4, "window": 5, **options}
    spec = ModelSpec(arch="nsa", scale=small_scale(4), overrides={"nsa": chosen}, hidden=16)
    return spec.build(seed=3).double()


def mixers(model: Model) -> list[SparseBlockAttention]:
    found = [block.mixer for block in model.layers]
    assert all(isinstance(mixer, SparseBlockAttention) for mixer in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (6, 1)])
def test_blocks_that_cover_everything_are_dense_attention(heads: int, groups: int) -> None:
    """And so is a window that does."""
    tokens, dim = 29, 6
    q, kv = torch.randn(2, tokens, heads, dim), torch.randn(2, 2, groups, tokens, dim)
    dense = attention(q, *kv.unbind(1), causal=True)
    for blocks in (Blocks(4, 8, tokens), Blocks(1, tokens, 40), Blocks(40, 3, tokens)):
        found = attend_all_blocks(q, kv, blocks)
        torch.testing.assert_close(found.picked, dense)
        torch.testing.assert_close(found.window, dense)
    # All blocks, by the choice, not because there is none.
    assert Blocks(3, 9, 1).are_all(27) and not Blocks(3, 9, 1).are_all(28)
    found = attend_all_blocks(q, kv, Blocks(3, 9, 7))
    torch.testing.assert_close(found.picked[:, :27], dense[:, :27])
    assert float((found.picked - dense)[:, 27:].abs().max()) > 1e-4
    mask = window_mask(tokens, 7, 0, q.device)[None]
    torch.testing.assert_close(found.window, attention(q, *kv.unbind(1), mask=mask))


def test_means_are_of_whole_blocks_and_nothing_else() -> None:
    q, kv = torch.randn(1, 10, 2, 4), torch.randn(1, 2, 1, 10, 4)
    found = attend_all_blocks(q, kv, Blocks(4, 3, 2)).means
    assert not found[:, :3].any()
    for token in (3, 6):
        torch.testing.assert_close(found[0, token], kv[0, 1, :, :4].mean(1).expand(2, 4))
    changed = kv.clone()
    changed[:, :, :, 8:] += 1
    same = attend_all_blocks(q, changed, Blocks(4, 3, 2)).means
    torch.testing.assert_close(same, found)


def test_up_to_all_blocks_the_number_of_picks_tells_nothing() -> None:
    tokens = torch.randint(0, 101, (2, 30))
    few, many = small(picks=4), small(picks=10)
    with torch.inference_mode():
        ours, whole = few(tokens), many(tokens)
    torch.testing.assert_close(ours[:, :12], whole[:, :12])
    assert float((ours - whole)[:, 12:].abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("block", "picks", "window"), [(3, 4, 5), (1, 5, 2), (4, 3, 11), (2, 6, 1)]
)
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((50,), id="at-once"),
        pytest.param((1,) * 50, id="singly"),
        pytest.param((7, 1, 1, 20, 3, 2, 16), id="odd"),
        pytest.param((46, 2, 2), id="last"),
    ],
)
def test_every_split_picks_the_same_blocks(
    monkeypatch: pytest.MonkeyPatch, block: int, picks: int, window: int, pieces: tuple[int, ...]
) -> None:
    model, tokens = (
        small(block=block, picks=picks, window=window),
        torch.randint(0, 101, (2, 50)),
    )
    honest, found = ops.best_blocks, list[list[Any]]()

    def seen(weights: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
        at, valid = honest(weights, own, count)
        found.append(blocks_of(at, valid))
        return at, valid

    monkeypatch.setattr("archs.ops.blocks.best_blocks", seen)
    with torch.inference_mode():
        expected = model(tokens)
        wanted = list(found)
        found.clear()
        got = our_steps(model, tokens.split(pieces, 1))
    # Rotary angles are float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for layer in (0, 1):
        for b in (0, 1):
            steps = [token for step in found[layer::2] for token in step[b]]
            # Steps over few rows have nothing to choose.
            assert steps and steps == wanted[layer][b][50 - len(steps) :]


def blocks_of(at: Tensor, valid: Tensor) -> list[list[list[list[int]]]]:
    """By sequence, token and KV head."""
    return [
        [
            [a[v].tolist() for a, v in zip(*heads, strict=True)]
            for heads in zip(*tokens, strict=True)
        ]
        for tokens in zip(at, valid, strict=True)
    ]


def test_without_a_preference_the_earlier_blocks_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries of zeros weigh all blocks alike: the first two, beside a token's own and the last."""
    model, found = small(picks=4), list[list[Any]]()
    with torch.no_grad():
        for mixer in mixers(model):
            mixer.qkv.weight[: mixer.qkv.sizes[0]] = 0
    honest = ops.best_blocks

    def seen(*given: Any) -> tuple[Tensor, Tensor]:
        found.append(blocks_of(*honest(*given)))
        return honest(*given)

    monkeypatch.setattr("archs.ops.blocks.best_blocks", seen)
    with torch.inference_mode():
        model(torch.randint(0, 101, (1, 40)))
    for layer in found:
        assert layer[0][20:] == [[[0, 1], [0, 1]]] * 20


def test_a_ragged_decode_step_touches_no_page_that_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = small(), list[Any]()
    honest = ops.attend_blocks

    def attend(q: Tensor, rows: Any, *given: Any, **options: Any) -> Any:
        seen.append(rows)
        return honest(q, rows, *given, **options)

    monkeypatch.setattr("archs.nsa.attend_blocks", attend)
    tokens = torch.randint(0, 101, (2, 40))
    engine = Engine(model, max_sequences=3, max_context=48, page_size=4)
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


# -- bytes and FLOPs --


@pytest.mark.parametrize("context", [0, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_step_are_a_scan_of_means_and_a_gather_of_blocks(
    context: int, batch: int
) -> None:
    """Of `gqa`'s rows, 2·2·32 numbers, at most four blocks of eight, which hold the window."""
    model = ModelSpec(arch="nsa", scale=SCALES["tiny"]).outline(torch.bfloat16)
    row, block, most, layers = 2 * 2 * 32 * 2, 8, 32, 4
    seen = context + 1
    (spec, *_) = specs = model.state_specs()
    held = context * row + context // block * row
    assert sum(s.state_bytes(context) for s in specs) == layers * held
    assert spec.bytes_per_token == row * (1 + 1 / block)
    assert spec.scanned_bytes(context) == seen // block * row
    assert spec.gathered_bytes(context) == min(most, seen) * row
    cost = model.cost(Step(batch=batch, new_tokens=1, context=context))
    read = layers * batch * (seen // block + min(most, seen)) * row
    assert sum(op.state_read_bytes for op in cost.ops) == read
    written = layers * batch * (1 + (seen % block == 0)) * row
    assert sum(op.state_write_bytes for op in cost.ops) == written


@pytest.mark.parametrize(
    ("blocks", "rows"),
    [
        pytest.param(Blocks(8, 4, 16), 32, id="a window within the newest two blocks"),
        pytest.param(Blocks(8, 4, 3), 32, id="a short window"),
        pytest.param(Blocks(8, 4, 40), 56, id="a window that reaches beyond them"),
        pytest.param(Blocks(64, 16, 512), 1408, id="the paper's"),
    ],
)
def test_no_token_reads_more_distinct_rows_than_declared(blocks: Blocks, rows: int) -> None:
    assert blocks.rows == rows
    most = 0
    for at in range(20 * blocks.size, 24 * blocks.size):
        own = at // blocks.size
        # Picked blocks that the window does not reach.
        read = {*range(blocks.count - 2), own - 1, own}
        seen = {r for b in read for r in range(b * blocks.size, (b + 1) * blocks.size) if r <= at}
        most = max(most, len(seen | set(range(at - blocks.window + 1, at + 1))))
    assert most == rows


def test_means_take_the_format_of_rows() -> None:
    model = ModelSpec(arch="nsa", scale=SCALES["tiny"]).build()
    keep(model, StateFormat.named("kv:int8"))
    kv, means = model.state_specs()[0].rows
    assert kv.nbytes == means.nbytes == 2 * 2 * (32 + 4)
    tokens = torch.randint(0, 4096, (1, 70))
    assert our_steps(model, tokens.split([44, 1, 5, 20], 1)).isfinite().all()


def test_defaults_are_the_papers_for_long_sequences() -> None:
    config = SparseBlockConfig.at(SCALES["8b"], {})
    assert (config.block, config.picks, config.window) == (64, 16, 512)
    assert (config.n_heads, config.kv_heads) == (32, 8)
    tiny = SparseBlockConfig.at(SCALES["tiny"], {})
    assert (tiny.block, tiny.picks, tiny.window) == (8, 4, 16)


def test_a_backend_without_a_form_says_so() -> None:
    with pytest.raises(NoFormError, match="native sparse attention has no form for backend 'fla'"):
        ops.attend_blocks(*[torch.zeros(1)] * 5, backend="fla")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block": 0}, "block=0 must be at least 1"),
        ({"picks": 2}, "picks=2 must be at least 3"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sinks": 1}, "sinks=1: nsa always reads the first block; leave sinks out"),
        ({"n_heads": 6, "kv_heads": 4}, "n_heads=6 is not divisible by kv_heads=4; choose"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"window": None}, "window=None: nsa reads a window of rows; give it 1 or more"),
    ],
)
def test_impossible_shapes_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseBlockConfig.at(SCALES["tiny"], option)
