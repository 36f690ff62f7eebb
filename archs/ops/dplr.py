"""Recurrences whose transition is diagonal plus a product of two vectors, by backend."""

from torch import Tensor

from archs.backends import Forms
from archs.recurrent import masked
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.dplr.torch import dplr_chunk, dplr_step


def diagonal_plus_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """S_t = diag(e^{g_t}) S_{t-1} + b_t a_tᵀ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

    q, k, a, b, log_decay (g <= 0): [B, K, H, N]; v: [B, K, H, P].
    Returns y [B, K, H, P] and advances the state [H, N, P] called `name`; without one it starts at
    zero and is not kept: training, which is torch's under every backend. Raises NoFormError for a
    backend that has no form of it.
    """
    return _FORMS["torch" if state is None else backend](q, k, v, log_decay, a, b, state, name)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        return dplr_chunk(q, k, v, log_decay, a, b)[0]
    memory, each = state.get(name), None
    k, log_decay, b = (masked(t, state.valid) for t in (k, log_decay, b))
    if v.shape[1] <= RECURRENT_LIMIT:
        y, each = dplr_step(q, k, v, log_decay, a, b, memory, each=state.each)
    else:
        y, memory = dplr_chunk(q, k, v, log_decay, a, b, memory)
    state.put(name, memory, each)
    return y


_FORMS = Forms("diagonal plus low rank", {"torch": _torch})
