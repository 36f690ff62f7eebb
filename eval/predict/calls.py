"""Count the torch operations that a call dispatches, and time one that has no work.

On a CPU each is a launch of its own, and how many a mixer makes is not declared: attention over
picked rows makes several times as many as attention over all. They are counted on a model of the
same depth and pattern that is too narrow to take long.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archs.backbone import Model, initialise
from archs.heads import HeadModel
from archs.layers import RMSNorm, SwiGLU
from archs.registry import ModelSpec
from archs.state_formats import StateFormat
from archs.storage import keep, store
from archs.weights import WeightFormat
from infer.engine import Engine

#: Width at which a norm and an MLP cost nothing but their calls.
NO_WORK = 16
#: Width of a head of a narrow model; groups of numbers that are stored together span 64 at most.
NARROW, CODED = 16, 64
#: A step at a longer context makes the calls of one at this.
LONGEST = 4096


class CountCalls(TorchDispatchMode):
    """A context in which `calls` counts the operations dispatched to torch."""

    calls = 0

    def __torch_dispatch__(
        self, call: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls += 1
        return call(*args, **(kwargs or {}))


class IdleLayer:
    """Norm, residual and MLP of one token, too narrow for bytes or FLOPs to matter.

    calls: the operations that running it dispatches.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._norm = RMSNorm(NO_WORK).to(dtype=dtype)
        self._mlp = SwiGLU(NO_WORK, NO_WORK).to(dtype=dtype)
        self._x = torch.ones(1, 1, NO_WORK, dtype=dtype)
        with CountCalls() as counted:
            self()
        self.calls = counted.calls

    @torch.inference_mode()
    def __call__(self) -> None:
        """Run it once, as a decode step written in torch does."""
        self._mlp.after(self._norm.before(self._x, self._x))


@dataclass(frozen=True)
class StepCalls:
    """Torch operations of one sequence's decode steps, counted once for each power of two.

    weights, state: formats in which they are stored and kept, None and "": plain. head: whether
    they are of the model's head that drafts for it (`archs.heads`), weights plain.
    """

    spec: ModelSpec
    weights: WeightFormat | None = None
    state: str = ""
    replay: int = 0
    head: bool = False
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    @cached_property
    def _model(self) -> Model:
        scale, plain = self.spec.scale, self.weights is None and not self.state
        dim = NARROW if plain else CODED
        shape = {"d_model": scale.n_heads * dim, "head_dim": dim, "vocab_size": NO_WORK}
        narrow = replace(self.spec, scale=scale.with_options(shape), hidden=CODED)
        model = narrow.build()
        if self.head:
            own = narrow.head().to_empty(device="cpu")
            initialise(own, 0, 1)
            model = HeadModel(model, own)
        model = keep(model.eval(), StateFormat.named(self.state))
        return model if self.weights is None else store(model, self.weights)

    def at(self, context: int, new_tokens: int = 1) -> int:
        """Of a step of so many tokens of a sequence that holds `context`."""
        held = 1 << min(context, LONGEST).bit_length() - 1 if context else 0
        if (held, new_tokens) not in self._known:
            self._known[held, new_tokens] = self._counted(held, new_tokens)
        return self._known[held, new_tokens]

    @torch.inference_mode()
    def _counted(self, held: int, new_tokens: int) -> int:
        engine = Engine(
            self._model, max_sequences=1, max_context=held + 2 * new_tokens,
            lookback=new_tokens - 1, replay=self.replay,
        )  # fmt: skip
        sequence = [engine.store.add()]
        if held:
            engine.store.fill(sequence, held)
        tokens = torch.zeros(1, new_tokens, dtype=torch.int64)
        width = self._model.embedding.weight.shape[1]
        hidden = torch.zeros(1, new_tokens, width) if self.head else None
        # The first step makes tables that later ones find.
        engine.extend_last(sequence, tokens, hidden=hidden)
        with CountCalls() as counted:
            engine.extend_last(sequence, tokens, hidden=hidden)
        return counted.calls
