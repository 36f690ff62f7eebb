"""States of which a store drops rows: held to a plain rewrite, and to the laws of every state."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.errors import UserError
from archs.eviction import Eviction, EvictionError
from archs.gqa import Attention
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep, require_kernels_read
from eval.measure.site import about
from infer.engine import Engine
from infer.store import StateStore
from kernels.rope.torch import rope_table, rotate

NANO = get_scale("nano")


def model(state: str, arch: str = "gqa", dtype: torch.dtype = torch.float64) -> Model:
    built = ModelSpec(arch=arch, scale=NANO).build(dtype=dtype).eval()
    return keep(built, StateFormat.named(state))


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(4096, (batch, count), generator=torch.Generator().manual_seed(count))


def decoded(built: Model, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """Logits of all tokens, taken in pieces."""
    engine = Engine(built, max_sequences=len(ids), max_context=ids.shape[1], prefill_chunk=None)
    slots = [engine.store.add() for _ in ids]
    with torch.no_grad():
        return torch.cat([engine.extend(slots, piece) for piece in ids.split(list(pieces), 1)], 1)


class Rewrite:
    """One attention layer whose heads keep lists of rows, each a (position, key, value, sum)."""

    def __init__(self, mixer: Attention, rows: int, fade: float) -> None:
        self.mixer, self.rows, self.fade = mixer, rows, fade
        self.kept: list[list[list[object]]] = [[] for _ in range(mixer.config.kv_heads)]

    def __call__(self, x: Tensor, at: int) -> Tensor:
        c = self.mixer.config
        angles = rope_table(at + 1, c.head_dim, c.rope_theta, x.device)[at : at + 1]
        qkv = (self.mixer.qkv.weight @ x).view(1, 1, -1, c.head_dim)
        turned = c.n_heads + c.kv_heads
        qkv = torch.cat((rotate(qkv[..., :turned, :].clone(), angles), qkv[..., turned:, :]), 2)
        q, k, v = qkv[0, 0].split((c.n_heads, c.kv_heads, c.kv_heads))
        share, outs = c.n_heads // c.kv_heads, []
        for g, rows in enumerate(self.kept):
            if len(rows) == self.rows:
                old = [r for r in rows if r[0] <= at - self.rows // 2]
                rows.remove(min(old, key=lambda r: (r[3], self.place(rows, r))))
            rows.append([at, k[g], v[g], 0.0])
            for head in q[g * share : (g + 1) * share]:
                scores = torch.stack([(head * r[1]).sum() for r in rows]) * c.head_dim**-0.5
                weights = scores.softmax(0)
                outs.append(sum(w * r[2] for w, r in zip(weights, rows, strict=True)))
                for w, r in zip(weights, rows, strict=True):
                    r.append(float(w))
            for r in rows:
                r[3:] = [self.fade * r[3] + sum(r[4:])]
        return self.mixer.out.weight @ torch.cat(outs)

    def place(self, rows: list[list[object]], row: list[object]) -> int:
        return next(i for i, r in enumerate(rows) if r is row)


@pytest.mark.parametrize(("state", "fade"), [("kv:heavy8", 1.0), ("kv:recent8", 15 / 16)])
def test_rows_with_least_attention_go(state: str, fade: float) -> None:
    """A layer over random inputs, token by token, against lists in Python."""
    built = model(state)
    mixer = built.layers[0].mixer
    assert isinstance(mixer, Attention)
    x = torch.randn(40, NANO.d_model, dtype=torch.float64, generator=torch.Generator())
    store = StateStore([mixer.kept_spec()], max_sequences=1, max_context=40)
    slot, rewrite = store.add(), Rewrite(mixer, 8, fade)
    with torch.no_grad():
        for at, row in enumerate(x):
            with store.step([slot], 1) as step:
                out = mixer.extend(row[None, None], step.layers[0])
            torch.testing.assert_close(out[0, 0], rewrite(row, at), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("state", ["kv:heavy6", "kv:recent6", "kv:window5-sinks2"])
def test_a_split_changes_nothing(state: str) -> None:
    built, ids = model(state), tokens(2, 33)
    whole = decoded(built, ids, [33])
    for pieces in ([1] * 33, [7, 1, 1, 20, 4], [16, 17]):
        torch.testing.assert_close(decoded(built, ids, pieces), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state", ["kv:heavy6", "kv:recent6"])
def test_a_sequence_does_not_depend_on_its_company(state: str) -> None:
    built, ids = model(state), tokens(3, 30)
    engine = Engine(built, max_sequences=3, max_context=40)
    slots = [engine.store.add() for _ in range(3)]
    counts = torch.tensor([30, 11, 19])
    with torch.no_grad():
        engine.extend(slots, ids, new=counts)
        last = engine.extend_last(slots, ids[:, :1])
    for row, count in enumerate(counts.tolist()):
        alone = torch.cat((ids[row : row + 1, :count], ids[row : row + 1, :1]), 1)
        wanted = decoded(built, alone, [count + 1])[:, -1]
        torch.testing.assert_close(last[row : row + 1], wanted, rtol=1e-9, atol=1e-9)


def test_forks_and_rollbacks_are_those_of_recomputing() -> None:
    built, ids = model("kv:heavy6"), tokens(1, 24)
    engine = Engine(built, max_sequences=2, max_context=40, lookback=4)
    slot = engine.store.add()
    with torch.no_grad():
        engine.extend([slot], ids[:, :15])
        fork = engine.store.fork(slot)
        engine.extend([slot], ids[:, 15:20])
        engine.store.rollback(slot, 3)
        one = engine.extend([slot], ids[:, 20:22])
        two = engine.extend([fork], ids[:, 22:])
    kept = torch.cat((ids[:, :17], ids[:, 20:22]), 1)
    wanted = decoded(built, kept, [19])[:, -2:]
    torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9)
    wanted = decoded(built, torch.cat((ids[:, :15], ids[:, 22:]), 1), [17])[:, -2:]
    torch.testing.assert_close(two, wanted, rtol=1e-9, atol=1e-9)


def test_enough_rows_are_plain_attention() -> None:
    ids = tokens(2, 20)
    wanted = decoded(model(""), ids, [20])
    for state in ("kv:heavy20", "kv:recent32", "kv:window20"):
        torch.testing.assert_close(decoded(model(state), ids, [20]), wanted, rtol=1e-9, atol=1e-9)


def test_the_newest_rows_are_a_window() -> None:
    ids = tokens(2, 40)
    spec = ModelSpec(arch="gqa", scale=NANO, overrides={"gqa": {"window": 7, "sinks": 3}})
    wanted = decoded(spec.build(dtype=torch.float64).eval(), ids, [40])
    torch.testing.assert_close(decoded(model("kv:window7-sinks3"), ids, [40]), wanted)


@pytest.mark.parametrize("state", ["kv:heavy6", "kv:window6-sinks2"])
def test_bytes_are_those_that_are_held(state: str) -> None:
    built = model(state, "gqa:linear=1:1", torch.float32)
    store = StateStore(built.state_specs(), max_sequences=1, max_context=300, page_size=4)
    slot = store.add()
    store.fill([slot], 200)
    assert store.allocated_bytes == store.declared_bytes(200)
    assert built.state_bytes(200) == built.state_bytes(10_000)
    kept = built.layers[0].mixer.kept_spec()
    if kept.fixed:
        assert sum(pool[0].nbytes for pool in store.pools.layers[0].fixed.values()) == (
            kept.fixed_bytes
        )
        # Of the rows themselves a step reads all and writes one, and all that is known of them.
        row, told = kept.fixed[0].nbytes // 6, kept.fixed[1].nbytes
        assert (kept.read_bytes(50), kept.write_bytes(1)) == (6 * row + told, row + told)
    attention = next(op for op in built.cost(Step(1, 1, 200)).ops if op.name == "attention")
    mixer = built.layers[0].mixer
    assert isinstance(mixer, Attention)
    c, seen = mixer.config, 6 if kept.fixed else 8
    assert attention.matrix_flops == 4 * c.n_heads * c.head_dim * seen


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("kv:heavy1", "keeps 1 rows; keep 2 or more"),
        ("kv:heavy8-sinks2", "sinks are of a window; heavy8 finds them by itself"),
        ("kv:heavy", "Unknown state format 'heavy'"),
        ("memory:heavy8", "a store drops rows of attention alone; write kv:heavy8"),
    ],
)
def test_bad_policies_are_refused(state: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StateFormat.named(state)


@pytest.mark.parametrize(
    "arch", ["mla", "cla", "dsa", "nsa", "swa", "gta", "grouped_latent", "gqa(learned_sinks=true)"]
)
def test_rows_that_are_read_otherwise_are_refused(arch: str) -> None:
    for state in ("kv:heavy8", "kv:window8-sinks1"):
        with pytest.raises(EvictionError, match="leave it out for this architecture"):
            model(state, arch)


def test_kernels_do_not_choose() -> None:
    with pytest.raises(NoFormError, match="chooses among the rows"):
        require_kernels_read(model("kv:heavy8"), "triton")
    require_kernels_read(model("kv:window8-sinks2"), "triton")


def test_a_name_is_what_it_says() -> None:
    for name in ("heavy64", "recent8", "window64", "window64-sinks4"):
        assert str(Eviction.named(name)) == name


@pytest.mark.parametrize("state", ["kv:heavy8", "kv:window8-sinks2"])
def test_an_architecture_stays_what_it_is(state: str) -> None:
    spec = ModelSpec(arch="gqa", scale=NANO)
    assert about(spec, model(state)).family == about(spec, model("")).family == "softmax"
