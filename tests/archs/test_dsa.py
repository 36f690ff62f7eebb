"""`dsa` equals DeepSeek-V3.2's attention; rows are chosen by one rule; bytes follow a formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.dsa import SparseLatentAttention, SparseLatentConfig
from archs.errors import UserError
from archs.mixer import asking_losses, losses_left
from archs.ops import sparse
from archs.registry import ModelSpec
from archs.sizes import SCALES
from archs.state import PagedSeen, Pages, Rows
from archs.state_formats import StateFormat
from archs.storage import keep
from infer.engine import Engine
from tests.archs.hf import assert_equal, copy_backbone, interleaved, our_steps, random_model
from tests.archs.test_mla import copy_latent, small_scale
from tests.kernels.interpreter import interpreted
from train.loop import train
from train.recipe import Recipe

#: Many index heads: with few, many scores are 0, and `topk` breaks such ties as it likes.
SHAPES = [
    pytest.param(
        4,
        {
            "rank": 20, "nope_dim": 8, "rope_dim": 6, "v_dim": 5, "q_rank": 11, "index_heads": 16,
            "index_dim": 9, "picks": 7,
        },
        id="narrow-values",
    ),
    pytest.param(
        2,
        {
            "rank": 5, "nope_dim": 4, "rope_dim": 2, "v_dim": 9, "q_rank": 7, "index_heads": 13,
            "index_dim": 2, "picks": 12,
        },
        id="all-index-channels-rotary",
    ),
    pytest.param(
        3,
        {
            "rank": 17, "nope_dim": 6, "rope_dim": 4, "v_dim": 6, "q_rank": 10, "index_heads": 12,
            "index_dim": 16, "picks": 1,
        },
        id="one-row",
    ),
    pytest.param(
        3,
        {
            "rank": 16, "nope_dim": 5, "rope_dim": 4, "v_dim": 6, "q_rank": 9, "index_heads": 3,
            "index_dim": 8, "picks": 60,
        },
        id="dense",
    ),
]  # fmt: skip


@torch.no_grad()
def copy_sparse(mixer: SparseLatentAttention, theirs: Any) -> None:
    """Their index channels are half-split; ours stand in pairs, those of the norm included."""
    copy_latent(mixer, theirs)
    c, indexer = mixer.config, theirs.indexer
    assert mixer.index_q is not None

    def paired(t: Tensor, heads: int = 1) -> Tensor:
        each = t.reshape(heads, c.index_dim, -1)
        first = torch.stack([interleaved(head[: c.rope_dim], c.rope_dim) for head in each])
        return torch.cat((first, each[:, c.rope_dim :]), 1).reshape(t.shape)

    key, weights = paired(indexer.wk.weight), indexer.weights_proj.weight
    mixer.index_down.weight.copy_(torch.cat((key, weights)))
    mixer.index_q.weight.copy_(paired(indexer.wq_b.weight, c.index_heads))
    mixer.index_norm_weight.copy_(paired(indexer.k_norm.weight))
    mixer.index_norm_bias.copy_(paired(indexer.k_norm.bias))


@pytest.mark.parametrize(("heads", "options"), SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 43), (3, 43), (2, 1), (1, 63)])
def test_model_equals_deepseek_v32(
    heads: int, options: dict[str, int], batch: int, length: int
) -> None:
    scale = small_scale(heads)
    config = DeepseekV32Config(
        vocab_size=101, hidden_size=scale.d_model, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, first_k_dense_replace=2,
        kv_lora_rank=options["rank"], q_lora_rank=options["q_rank"],
        qk_nope_head_dim=options["nope_dim"], qk_rope_head_dim=options["rope_dim"],
        v_head_dim=options["v_dim"], index_n_heads=options["index_heads"],
        index_head_dim=options["index_dim"], index_topk=options["picks"], rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = random_model(DeepseekV32ForCausalLM, config, seed=heads)
    model = ModelSpec(arch="dsa", scale=scale, overrides={"dsa": options}, hidden=37).build()
    for mixer, other in copy_backbone(model, theirs):
        copy_sparse(mixer, other)
    tokens = torch.randint(0, 101, (batch, length))
    cuts = [n for n in (9, 12, 13, 38) if n < length]
    assert_equal(model, theirs, tokens, cuts=cuts)


def small(picks: int = 6, **options: Any) -> Model:
    """Two layers over random weights in float64."""
    scale = small_scale(4)
    overrides = {"dsa": {"picks": picks, **options}}
    return ModelSpec(arch="dsa", scale=scale, overrides=overrides, hidden=16).build(seed=3).double()


def test_up_to_k_rows_are_those_of_dense_attention() -> None:
    tokens = torch.randint(0, 101, (2, 30))
    sparse_, dense = small(picks=9), small(picks=30)
    with torch.inference_mode():
        ours, whole = sparse_(tokens), dense(tokens)
    torch.testing.assert_close(ours[:, :9], whole[:, :9])
    assert float((ours - whole)[:, 9:].abs().max()) > 1e-3


@pytest.mark.parametrize("q_rank", [None, 12])
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
    monkeypatch: pytest.MonkeyPatch, q_rank: int | None, pieces: tuple[int, ...]
) -> None:
    """Row by row, in both layers; with two index heads a quarter of all scores is exactly 0."""
    model, tokens = small(q_rank=q_rank, index_heads=2), torch.randint(0, 101, (2, 50))
    honest, found = sparse.best_rows, list[tuple[Tensor, Tensor]]()

    def seen(*given: Any) -> tuple[Tensor, Tensor]:
        found.append(honest(*given))
        return found[-1]

    monkeypatch.setattr("archs.ops.sparse.best_rows", seen)
    monkeypatch.setattr("archs.dsa.best_rows", seen)
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


def rows_of(at: Tensor, valid: Tensor) -> list[list[list[int]]]:
    """By sequence and token."""
    return [
        [a[v].tolist() for a, v in zip(rows, valids, strict=True)]
        for rows, valids in zip(at, valid, strict=True)
    ]


def test_equal_scores_are_won_by_the_earlier_row() -> None:
    """Without head weights every score is 0: each token reads the first rows."""
    model = small(picks=4)
    with torch.no_grad():
        for block in model.layers:
            mixer = block.mixer
            assert isinstance(mixer, SparseLatentAttention)
            size = mixer.config.index_dim
            mixer.index_down.weight[size : size + mixer.config.index_heads] = 0
    tokens = torch.randint(0, 101, (1, 20))
    other = tokens.clone()
    other[:, 4:19] = (other[:, 4:19] + 1) % 101
    for run in (model, lambda t: our_steps(model, t.split(1, 1))):
        with torch.inference_mode():
            last, changed = run(tokens)[:, -1], run(other)[:, -1]
        # The last token's row is none of the first four, so it reads nothing that was changed.
        torch.testing.assert_close(last, changed)


def test_a_ragged_decode_step_touches_no_page_that_is_not_picked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = small(picks=5), list[Rows]()

    def attend(q: Tensor, q_rotary: Tensor, rows: Rows, *given: Any, **options: Any) -> Tensor:
        seen.append(rows)
        return sparse.attend_picked(q, q_rotary, rows, *given, **options)

    monkeypatch.setattr("archs.dsa.attend_picked", attend)
    tokens = torch.randint(0, 101, (2, 40))
    engine = Engine(model, max_sequences=3, max_context=48, page_size=4)
    # Sequences that do not lie side by side are read page by page.
    slots = [engine.store.add() for _ in range(3)][::-2]
    padded = torch.stack((tokens[0, :39], torch.cat((tokens[1, :17], tokens[1, :22]))))
    engine.extend(slots, padded, torch.tensor([39, 17]))
    got = engine.extend(slots, torch.stack((tokens[0, 39:], tokens[1, 17:18])))
    assert [isinstance(s, PagedSeen) and not s.gathered for s in seen] == [True, True]
    with torch.inference_mode():
        for row, length in enumerate((40, 18)):
            expected = model(tokens[row : row + 1, :length])[:, -1]
            torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)


# -- bytes and FLOPs --


@pytest.mark.parametrize("context", [0, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_step_are_a_scan_of_keys_and_a_gather_of_latents(
    context: int, batch: int
) -> None:
    model = ModelSpec(arch="dsa", scale=SCALES["tiny"]).outline(torch.bfloat16)
    index, latent, picks, layers = 2 * 32, 2 * (64 + 16), 32, 4
    seen = context + 1
    (spec, *_) = specs = model.state_specs()
    assert sum(s.state_bytes(context) for s in specs) == layers * context * (index + latent)
    assert spec.scanned_bytes(context) == seen * index
    assert spec.gathered_bytes(context) == min(picks, seen) * latent
    cost = model.cost(Step(batch=batch, new_tokens=1, context=context))
    read = layers * batch * (seen * index + min(picks, seen) * latent)
    assert sum(op.state_read_bytes for op in cost.ops) == read
    written = layers * batch * (index + latent)
    assert sum(op.state_write_bytes for op in cost.ops) == written
    (scan,) = {op.matrix_flops for op in cost.ops if op.name == "index scan"}
    assert scan == 2 * batch * seen * 2 * (32 + 1)


def test_index_keys_have_a_format_of_their_own() -> None:
    model = ModelSpec(arch="dsa", scale=SCALES["tiny"]).build()
    before = {t.name: t.nbytes for t in model.state_specs()[0].rows}
    keep(model, StateFormat.named("index:fp8"))
    after = {t.name: t.nbytes for t in model.state_specs()[0].rows}
    assert after["latent"] == before["latent"] == 4 * 80
    assert (before["index"], after["index"]) == (4 * 32, 32 + 4)
    tokens = torch.randint(0, 4096, (1, 50))
    assert our_steps(model, tokens.split([44, 1, 5], 1)).isfinite().all()


def test_defaults_are_those_of_deepseek_v32_at_8b() -> None:
    config = SparseLatentConfig.at(SCALES["8b"], {})
    assert (config.index_heads, config.index_dim, config.picks) == (16, 128, 2048)
    assert (config.rank, config.q_rank, config.rope_dim) == (512, 1536, 64)
    assert SparseLatentConfig.at(SCALES["tiny"], {}).picks == 128 // 4


def test_a_backend_without_a_form_says_so() -> None:
    mixer = small().use("fla").layers[0].mixer
    with pytest.raises(NoFormError, match="choice of rows has no form for backend 'fla'; it has"):
        sparse.pick_rows(*[torch.zeros(1)] * 3, 1, backend=mixer.backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"picks": 0}, "picks=0 must"),
        ({"index_heads": 0}, "index_heads=0 must"),
        ({"index_dim": 12}, "index_dim=12 is less than rope_dim=16"),
        ({"index_eps": 0.0}, "index_eps=0.0 must be positive"),
    ],
)
def test_impossible_shapes_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseLatentConfig.at(SCALES["tiny"], option)


# -- the indexer's own loss --


@pytest.mark.parametrize("q_rank", [None, 12])
def test_the_indexer_learns_from_its_loss_alone(q_rank: int | None) -> None:
    model, shared = small(q_rank=q_rank), asking_losses()
    hidden = model.hidden_states(torch.randint(0, 101, (2, 20)), shared=shared)
    own = losses_left(shared)
    assert len(own) == 2 and all(loss > 0 for loss in own)
    named = dict(model.named_parameters())
    of_index = {name for name in named if ".index_" in name}
    found = torch.autograd.grad(
        torch.stack(own).sum(), list(named.values()), allow_unused=True, retain_graph=True
    )
    reached = {name for name, grad in zip(named, found, strict=True) if grad is not None}
    assert reached == of_index
    found = torch.autograd.grad(hidden.square().sum(), list(named.values()), allow_unused=True)
    reached = {name for name, grad in zip(named, found, strict=True) if grad is not None}
    assert reached == set(named) - of_index


def test_the_indexers_loss_falls_as_it_learns() -> None:
    """Of a model whose attention stays as it is; then its choice holds more of attention, too."""
    model = small(index_heads=4, index_dim=16).float()
    tokens = torch.randint(0, 101, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.layers:
            mixer = block.mixer
            assert isinstance(mixer, SparseLatentAttention)
            # Peaked attention, of which there is something to learn.
            mixer.down.weight[: 4 * 12] *= 4
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


def test_training_moves_the_indexer(tmp_path: Path) -> None:
    spec = ModelSpec(arch="dsa", scale=small_scale(4), overrides={"dsa": {"picks": 4}}, hidden=16)
    recipe = Recipe(steps=3, batch=2, seq_len=12, learning_rate=1e-2, checkpoint_every=0)

    class Same:
        def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
            ids = (torch.arange(13) * 7 % 101).expand(2, -1)
            return ids[:, :-1], ids[:, 1:]

    model, before = spec.build(), dict(spec.build().named_parameters())
    result = train(model, Same(), recipe, tmp_path, spec=spec)
    assert result.status == "ok"
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == []


def test_queries_of_one_token_may_start_anywhere() -> None:
    """Contiguous in memory that the kernel does not read 16 bytes at a time."""
    q = torch.randn(2 + 4 * 32)[2:].view(1, 1, 4, 32)
    assert q.is_contiguous() and q.data_ptr() % 16
    pages = Pages(
        pool=torch.randn(48, 32), table=torch.tensor([[2, 0]], dtype=torch.int32),
        past=torch.tensor([20], dtype=torch.int32), total=torch.tensor([21], dtype=torch.int32),
        new=None, page_size=16, window=None, sinks=0,
    )  # fmt: skip
    weights, found = torch.rand(1, 1, 4), []
    with interpreted():
        for backend in ("torch", "triton"):
            keys = PagedSeen(pages, 1, 21)
            found.append(sparse.pick_rows(q, weights, keys, 5, backend=backend))
    assert torch.equal(found[0].at, found[1].at) and found[1].valid.all()
