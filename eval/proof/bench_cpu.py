"""`make bench-cpu`: our speed on this CPU against `transformers`, as ratios in one process.

Both sides get equal weights where tokens are compared, run in alternation after a warm-up, and
are reported as the median ratio with its spread. Targets stand beside each figure; a missed one
is printed as missed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from archs.backbone import Model
from archs.layers import SwiGLU
from archs.registry import ModelSpec
from archs.sizes import Scale, get_scale
from eval.measure.decode import measure_decode
from eval.proof.bench_host import ARCH, BATCH, SCALE, host_work_ms, server_work_ms
from infer.engine import Engine
from kernels.loss.cross_entropy import linear_cross_entropy
from train.optim import Optimizer
from train.recipe import Recipe

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster ours is: median, lowest and highest over pairs of runs."""

    name: str
    median: float
    low: float
    high: float
    ours_ms: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.median >= self.target


def alternate(name: str, target: float, theirs: Work, ours: Work, *, pairs: int) -> Ratio:
    """Time both in alternation, ratio pair by pair, after one warm-up of each."""
    theirs(), ours()
    ratios, mine = [], []
    for _ in range(pairs):
        a, b = _timed_s(theirs), _timed_s(ours)
        ratios.append(a / b)
        mine.append(b * 1e3)
    return Ratio(
        name, statistics.median(ratios), min(ratios), max(ratios), statistics.median(mine), target
    )


def _timed_s(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -- Llama: decode and training --

#: A published 135M shape: 30 layers of 576, 9 query and 3 KV heads of 64.
SHAPE_135M = Scale(
    name="135m", d_model=576, n_layers=30, head_dim=64, vocab_size=49152, seq_len=2048
)


def llama_pair(spec: ModelSpec, kv_heads: int) -> tuple[Model, Any]:
    """Our model and a transformers Llama with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = spec.build(seed=0)
    s = spec.scale
    config = LlamaConfig(
        vocab_size=s.vocab_size, hidden_size=s.d_model, intermediate_size=ours.hidden,
        num_hidden_layers=s.n_layers, num_attention_heads=s.n_heads, rms_norm_eps=1e-5,
        num_key_value_heads=kv_heads, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    copy_llama(ours, theirs, s.n_heads, kv_heads, s.head_dim)
    return ours, theirs


@torch.no_grad()
def copy_llama(ours: Model, theirs: Any, heads: int, kv_heads: int, dim: int) -> None:
    """Our weights into a transformers Llama (pairs of rotary channels to halves)."""

    def halves(weight: Tensor, n: int) -> Tensor:
        return weight.view(n, dim // 2, 2, -1).transpose(1, 2).reshape(n * dim, -1)

    theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
    theirs.model.norm.weight.copy_(ours.norm.weight)
    for block, other in zip(ours.layers, theirs.model.layers, strict=True):
        mixer: Any = block.mixer
        q, k, v = mixer.qkv.weight.split((heads * dim, kv_heads * dim, kv_heads * dim))
        other.self_attn.q_proj.weight.copy_(halves(q, heads))
        other.self_attn.k_proj.weight.copy_(halves(k, kv_heads))
        other.self_attn.v_proj.weight.copy_(v)
        other.self_attn.o_proj.weight.copy_(mixer.out.weight)
        assert isinstance(block.mlp, SwiGLU) and block.norm_mlp is not None
        gate, up = block.mlp.gate_up.weight.chunk(2)
        other.mlp.gate_proj.weight.copy_(gate)
        other.mlp.up_proj.weight.copy_(up)
        other.mlp.down_proj.weight.copy_(block.mlp.down.weight)
        other.input_layernorm.weight.copy_(block.norm_mixer.weight)
        other.post_attention_layernorm.weight.copy_(block.norm_mlp.weight)


def bench_decode(
    name: str, spec: ModelSpec, kv_heads: int, target: float, *, new: int, compiled: bool = False
) -> Ratio:
    """Greedy decode of `new` tokens, batch 1, against `generate`; the tokens must be the same."""
    ours, theirs = llama_pair(spec, kv_heads)
    prompt = torch.randint(spec.scale.vocab_size, (1, 32), generator=_seeded())
    engine = Engine(ours, max_context=32 + new, compiled=compiled)
    found: dict[str, list[int]] = {}

    def run_theirs() -> None:
        with torch.inference_mode():
            out = theirs.generate(
                prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        found["theirs"] = out[0, 32:].tolist()

    def run_ours() -> None:
        found["ours"] = engine.generate(prompt.tolist(), new).tokens[0]

    ratio = alternate(name, target, run_theirs, run_ours, pairs=5)
    if found["ours"] != found["theirs"]:
        raise RuntimeError(f"{name}: tokens differ from transformers' (its speed means nothing)")
    return ratio


def bench_training(target: float) -> Ratio:
    """One training step (forward, backward, clip, AdamW) of the tiny Llama, 8 x 128 tokens."""
    spec = ModelSpec(arch="mha", scale=get_scale("tiny"))
    ours, theirs = llama_pair(spec, spec.scale.n_heads)
    theirs.train()
    tokens = torch.randint(spec.scale.vocab_size, (8, 129), generator=_seeded())
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    recipe = Recipe(steps=100, batch=8, seq_len=128)
    optimizer = Optimizer(ours, recipe)
    adamw = torch.optim.AdamW(theirs.parameters(), 4e-3, (0.9, 0.95), weight_decay=0.1, fused=True)

    def step_theirs() -> None:
        theirs(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    def step_ours() -> None:
        hidden = ours.hidden_states(inputs).flatten(0, 1)
        linear_cross_entropy(hidden, ours.embedding.weight, targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step(4e-3)
        optimizer.zero_grad()

    return alternate("training step, tiny Llama", target, step_theirs, step_ours, pairs=15)


# -- recurrent mixers: prefill --


def prefill_mamba1(d: int) -> tuple[Work, Work]:
    """Whole models without head, 4 layers, 2,048 tokens."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(hidden_size=d, num_hidden_layers=4, vocab_size=64, use_cache=False)
    return _prefill_pair("mamba1", d, MambaModel(config), MAMBA1_NAMES)


def prefill_mamba2(d: int) -> tuple[Work, Work]:
    """Whole models without head, 4 layers, 2,048 tokens; head 64, state 128."""
    from transformers import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        hidden_size=d, num_hidden_layers=4, vocab_size=64, num_heads=2 * d // 64, head_dim=64,
        state_size=128, n_groups=1, use_cache=False,
    )  # fmt: skip
    overrides = {"n_heads": 2 * d // 64, "head_dim": 64, "state_dim": 128}
    return _prefill_pair("mamba2", d, Mamba2Model(config), MAMBA2_NAMES, overrides)


MAMBA1_NAMES = {
    "x_z.weight": "in_proj.weight", "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias",
    "dt_b_c.weight": "x_proj.weight", "dt.weight": "dt_proj.weight", "dt_bias": "dt_proj.bias",
    "A_log": "A_log", "D": "D", "out.weight": "out_proj.weight",
}  # fmt: skip
MAMBA2_NAMES = {
    "z_x_b_c_dt.weight": "in_proj.weight", "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D",
    "norm_weight": "norm.weight", "out.weight": "out_proj.weight",
}  # fmt: skip


@torch.no_grad()
def _prefill_pair(
    arch: str, d: int, theirs: Any, names: dict[str, str], overrides: dict[str, Any] | None = None
) -> tuple[Work, Work]:
    scale = Scale(name="bench", d_model=d, n_layers=4, head_dim=64, vocab_size=64, seq_len=2048)
    spec = ModelSpec(arch=arch, scale=scale, hidden=0, overrides={arch: overrides or {}})
    ours = spec.build(seed=0)
    theirs.eval()
    theirs.embeddings.weight.copy_(ours.embedding.weight)
    for block, other in zip(ours.layers, theirs.layers, strict=True):
        own = dict(block.mixer.named_parameters())
        for mine, name in names.items():
            other.mixer.get_parameter(name).copy_(
                own[mine].unsqueeze(1) if name == "conv1d.weight" else own[mine]
            )
    return _prefills(ours, lambda ids: theirs(ids, use_cache=False).last_hidden_state)


def prefill_gdn(d: int) -> tuple[Work, Work]:
    """One Qwen3-Next gated-delta layer: key heads of 64, two value heads each, 2,048 tokens."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    keys, share, dim = d // 128, 2, 64
    config = Qwen3NextConfig(
        hidden_size=d, linear_num_key_heads=keys, linear_num_value_heads=keys * share,
        linear_key_head_dim=dim, linear_value_head_dim=dim, num_hidden_layers=1,
        layer_types=["linear_attention"], vocab_size=64,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    scale = Scale(name="bench", d_model=d, n_layers=1, head_dim=dim, vocab_size=64, seq_len=2048)
    shape = {"key_heads": keys, "value_heads": keys * share, "key_dim": dim, "value_dim": dim}
    ours = ModelSpec(arch="gdn", scale=scale, hidden=0, overrides={"gdn": shape}).build(seed=0)
    mixer: Any = ours.layers[0].mixer
    sizes = [dim, dim, share * dim, share * dim]
    offsets = mixer.q_k_v_z_b_a.weight.split(mixer.q_k_v_z_b_a.sizes)
    parts = [w.unflatten(0, (keys, -1)) for w in offsets]
    with torch.no_grad():
        assert [p.shape[1] for p in parts[:4]] == sizes
        theirs.in_proj_qkvz.weight.copy_(torch.cat(parts[:4], 1).flatten(0, 1))
        theirs.in_proj_ba.weight.copy_(torch.cat(parts[4:], 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(mixer.conv_weight.unsqueeze(1))
        theirs.A_log.copy_(mixer.A_log)
        theirs.dt_bias.copy_(mixer.dt_bias)
        theirs.out_proj.weight.copy_(mixer.out.weight)

    def their_model(ids: Tensor) -> Tensor:
        x = ours.embedding(ids)
        return ours.norm(x + theirs(ours.layers[0].norm_mixer(x)))

    return _prefills(ours, their_model)


def _prefills(ours: Model, theirs: Callable[[Tensor], Tensor]) -> tuple[Work, Work]:
    """Both sides over the same 2,048 tokens; raises when their outputs differ."""
    ids = torch.randint(64, (1, 2048), generator=_seeded())
    engine = Engine(ours, max_context=2048)

    def run_ours() -> Tensor:
        with torch.inference_mode():
            slot = engine.store.add()
            step = engine.store.begin([slot], ids.shape[1])
            hidden = ours.extend_hidden(ids, step.layers)
            engine.store.commit(step)
            engine.store.release(slot)
            return hidden

    def run_theirs() -> Tensor:
        with torch.inference_mode():
            return theirs(ids)

    torch.testing.assert_close(run_ours(), run_theirs(), rtol=1e-3, atol=1e-3)
    return run_theirs, run_ours


# -- flat decode --


def flatness(arch: str, scale: str, contexts: tuple[int, int]) -> tuple[float, int, int]:
    """TPOT at the long context over TPOT at the short one, and the state bytes at both.

    The two are timed in turn, so that a change of the machine's speed touches both.
    """
    model = ModelSpec(arch=arch, scale=get_scale(scale)).build(seed=0)
    ratios = []
    sizes = [0, 0]
    for _ in range(7):
        short, long = (
            measure_decode(model, batch=1, contexts=[c], steps=12, warmup=2)[0] for c in contexts
        )
        ratios.append(long.percentile_ms(50) / short.percentile_ms(50))
        sizes = [short.state_bytes, long.state_bytes]
    return statistics.median(ratios), sizes[0], sizes[1]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def main() -> None:
    """Run everything and print three tables."""
    console = Console()
    table = Table("what", "ratio", "spread", "ours ms", "target", "", title="against transformers")
    tiny = ModelSpec(arch="mha", scale=get_scale("tiny"))
    shape_135m = ModelSpec(
        arch="gqa", scale=SHAPE_135M, hidden=1536, overrides={"gqa": {"kv_heads": 3}}
    )
    jobs: list[Callable[[], Ratio]] = [
        lambda: bench_decode("decode, tiny, as written", tiny, 4, 4.0, new=128),
        lambda: bench_decode("decode, tiny, compiled", tiny, 4, 4.0, new=128, compiled=True),
        lambda: bench_decode("decode, 135M, as written", shape_135m, 3, 1.2, new=24),
        lambda: bench_training(1.3),
    ]
    for label, make, widths, target in (
        ("mamba1", prefill_mamba1, (256, 768), 3.0),
        ("mamba2", prefill_mamba2, (256, 768), 2.0),
        ("gdn", prefill_gdn, (256, 768), 2.0),
    ):
        for d in widths:
            jobs.append(
                lambda label=label, make=make, d=d, target=target: alternate(  # type: ignore[misc]
                    f"prefill 2,048, {label} (d {d})", target, *make(d), pairs=5
                )
            )
    for job in jobs:
        with console.status("measuring"):
            r = job()
        table.add_row(
            r.name, f"{r.median:.2f}x", f"{r.low:.2f}-{r.high:.2f}", f"{r.ours_ms:.1f}",
            f">= {r.target}x", "met" if r.met else "MISSED",
        )  # fmt: skip
    console.print(table)
    flat = Table(
        "arch", "contexts", "TPOT ratio", "state bytes", "", title="flat decode, 70m shape"
    )
    for arch, contexts in (
        *((a, (256, 16384)) for a in ("gdn", "mamba1", "mamba2", "linear")),
        ("swa", (2048, 16384)),
        ("mha", (256, 16384)),
    ):
        with console.status(f"measuring {arch}"):
            ratio, short, long = flatness(arch, "70m", contexts)
        wanted = "grows, as it must" if arch == "mha" else "met" if ratio <= 1.1 else "MISSED"
        flat.add_row(
            arch, f"{contexts[0]} -> {contexts[1]}", f"{ratio:.2f}x",
            f"{short:,} -> {long:,}", wanted,
        )  # fmt: skip
    console.print(flat)
    title = f"host work of a step, {BATCH} sequences, {ARCH} at {SCALE}"
    host = Table("rolls back", "median ms", "p99 ms", "target", "", title=title)
    found = {f"{lookback} tokens": host_work_ms(lookback) for lookback in (0, 4)}
    found["a server"] = server_work_ms(ahead=False)
    found["a server that looks ahead"] = server_work_ms(ahead=True)
    for what, (median, p99) in found.items():
        host.add_row(
            what, f"{median:.2f}", f"{p99:.2f}", "p99 <= 1 ms", "met" if p99 <= 1 else "MISSED",
        )  # fmt: skip
    console.print(host)


if __name__ == "__main__":
    main()
