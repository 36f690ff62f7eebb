"""What other code makes of one token of a recurrent update, on the same operands and states.

"torch" is the plain form that our kernels replace; the libraries get gates that are made already,
q and k that are turned already and states that lie in order, so their time holds none of these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Run, installed, lazily
from kernels.decay.torch import decay_step
from kernels.gated_delta.torch import gdn_step, last_product, product_steps
from kernels.norm import rows as norm_triton
from kernels.norm import torch as norm
from kernels.norm.torch import OutputNorm, l2_norm
from kernels.rope.torch import apply_rope
from kernels.selective.torch import selective_step

Inputs = dict[str, Tensor]
#: From the kernel's inputs, K = 1, and the states, of which sequence b has the b-th.
Baselines = Callable[[Inputs, Tensor], Mapping[str, Run]]


def ssm(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """Mamba-2's."""

    def by_torch() -> Tensor:
        dt = F.softplus(i["dt"].float() + i["dt_bias"])
        fed = i["x"] * dt[..., None].to(i["x"].dtype)
        y, _ = decay_step(i["c"], i["b"], fed, dt * -i["a_log"].float().exp(), pool)
        return torch.addcmul(y, i["x"], i["d"][:, None].to(y.dtype))

    def by_library() -> Run:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        heads, n, p = pool.shape[1:]
        x, b, c = (i[name][:, 0] for name in "xbc")
        dt, d, bias = (
            t[..., None].expand(*t.shape, p) for t in (i["dt"][:, 0], i["d"], i["dt_bias"])
        )
        rate = (-i["a_log"].float().exp())[:, None, None].expand(heads, p, n)
        state = pool.transpose(2, 3)
        return lambda: selective_state_update(
            state, x, dt, rate, b, c, D=d, dt_bias=bias, dt_softplus=True
        )[:, None]

    return {"torch": by_torch, **where_installed("mamba-ssm", by_library)}


def selective(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """Mamba's."""
    rate = -i["a_log"].float().exp()

    def by_torch() -> Tensor:
        dt = F.softplus(i["dt"].float() + i["dt_bias"])
        y, _ = selective_step(i["x"], dt, rate, i["b"], i["c"], i["d"], pool)
        return y * F.silu(i["z"])

    def by_library() -> Run:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        x, z, dt, b, c = (i[name][:, 0] for name in ("x", "z", "dt", "b", "c"))
        return lambda: selective_state_update(
            pool, x, dt, rate, b, c, D=i["d"], z=z, dt_bias=i["dt_bias"], dt_softplus=True
        )[:, None]

    return {"torch": by_torch, **where_installed("mamba-ssm", by_library)}


def _gates(i: Inputs) -> tuple[Tensor, Tensor]:
    rate = -i["a_log"].exp().view(-1, *[1] * (i["dt_bias"].dim() - 1))
    return F.softplus(i["a"].float() + i["dt_bias"]) * rate, i["b"].sigmoid()


def _delta_by_torch(i: Inputs, pool: Tensor) -> Tensor:
    q, k = l2_norm(i["q"]) * pool.shape[2] ** -0.5, l2_norm(i["k"])
    y, _ = gdn_step(*product_steps(q, k, i["v"], *_gates(i)), pool)
    return y[:, last_product(k)]


def gdn(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """The gated delta rule's."""
    scale = pool.shape[2] ** -0.5

    def by_library() -> Run:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        decay, beta = _gates(i)
        # The new states are float32 tensors of their own, whatever the old ones are.
        return lambda: fused_recurrent_gated_delta_rule(
            i["q"], i["k"], i["v"], g=decay, beta=beta, scale=scale, initial_state=pool,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    return {"torch": partial(_delta_by_torch, i, pool), **where_installed("fla", by_library)}


def delta_by_torch(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """The gated delta rule's with options that no library has: torch's alone."""
    return {"torch": partial(_delta_by_torch, i, pool)}


def kda(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """The gated delta rule's, decays by key channel."""
    scale = pool.shape[2] ** -0.5

    def by_library() -> Run:
        from fla.ops.kda import fused_recurrent_kda

        decay, beta = _gates(i)
        return lambda: fused_recurrent_kda(
            i["q"], i["k"], i["v"], g=decay, beta=beta, scale=scale, initial_state=pool,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    return {"torch": partial(_delta_by_torch, i, pool), **where_installed("fla", by_library)}


def linear(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """Retention's."""

    def by_torch() -> Tensor:
        return decay_step(i["q"], i["k"], i["v"], i["log_decay"][None, None], pool)[0]

    def by_library() -> Run:
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        decay = i["log_decay"].expand(*i["v"].shape[:3]).contiguous()
        return lambda: fused_recurrent_simple_gla(
            i["q"], i["k"], i["v"], g=decay, scale=1.0, initial_state=pool,
            output_final_state=True,
        )[0]  # fmt: skip

    return {"torch": by_torch, **where_installed("fla", by_library)}


def output_norm(i: Inputs, opened: str) -> OutputNorm:
    """Head by head and gated after; over all heads and gated before where the gate is flat."""
    return OutputNorm(
        gate=i["gate"], weight=i["weight"], eps=1e-5, gate_first=i["gate"].dim() == 3,
        opened=opened,
    )  # fmt: skip


def normed(others: Baselines, opened: str) -> Baselines:
    """The same with the output norm after it: torch's, and after a library our kernel's."""

    def make(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
        how = output_norm(i, opened)

        def after(name: str, run: Run) -> Run:
            form = norm.gated_rms_norm if name == "torch" else norm_triton.gated_rms_norm

            def both() -> Tensor:
                y = cast(Tensor, run())
                rows = y.reshape(how.gate.shape)
                done = form(
                    rows, how.gate, how.weight, how.eps, gate_first=how.gate_first,
                    opened=how.opened,
                )  # fmt: skip
                return done.reshape(y.shape)

            return both

        return {name: after(name, run) for name, run in others(i, pool).items()}

    return make


def turned(others: Baselines) -> Baselines:
    """The same on q and k that are turned first, for libraries outside their time."""

    def make(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
        def turn() -> Inputs:
            angles = torch.view_as_complex(i["cos_sin"])[i["past"].long()][:, None, None]
            return i | {name: apply_rope(i[name], angles) for name in "qk"}

        runs = others(turn(), pool)
        return {**runs, "torch": lambda: others(turn(), pool)["torch"]()}

    return make


def where_installed(name: str, make: Callable[[], Run]) -> dict[str, Run]:
    """A library's run, built when it is asked for, where there is the library."""
    return {name: lazily(make)} if installed(name) else {}
