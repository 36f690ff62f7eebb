"""A model under test and the tools that all laws share."""

import inspect
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from archs.backbone import replays
from archs.mixer import Mixer
from archs.registry import ModelSpec
from archs.sizes import Scale, get_scale
from eval.proof.conformance.recorded import Recorded
from eval.proof.conformance.tally import Tally
from infer.engine import PAGE_MULTIPLE, Engine
from infer.plan import StepPlan

#: Small enough to be quick, windowed well below the sequences that are checked.
CHECK_SCALE = replace(
    get_scale("tiny"), name="check", vocab_size=257, window=12, seq_len=48, mlp_multiple=8
)

#: Inputs in a ring where values are replayed: of two steps of five tokens, and some more.
RING = 16


class Subject:
    """A model under test.

    Raises UserError where the name or its shapes are not possible.
    """

    def __init__(
        self, arch: str, scale: Scale = CHECK_SCALE, seed: int = 0, backend: str = "torch",
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.spec = ModelSpec(arch=arch, scale=scale)
        self.model = self.spec.build(seed=seed, device=device)
        self.seed = seed
        self.backend = backend
        self.device = device
        #: Steps of each layer that laws have counted, by batch, context and new tokens.
        self.counted: dict[tuple[int, int, int], list[tuple[Tally, Recorded]]] = {}

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, layer by layer."""
        return [block.mixer for block in self.model.layers]

    def label(self, layer: int) -> str:
        """How a layer is named in a verdict."""
        return f"layer {layer} ({type(self.mixers[layer]).__name__})"

    @property
    def files(self) -> set[str]:
        """The source files of the mixers."""
        return {inspect.getfile(type(mixer)) for mixer in self.mixers}

    @torch.inference_mode()
    def expected(self, tokens: Tensor) -> Tensor:
        """The reference: the torch form of `forward`."""
        logits: Tensor = self.model.use("torch")(tokens)
        self.model.use(self.backend)
        return logits

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Random token ids, int64 [batch, length]."""
        vocab = self.spec.scale.vocab_size
        return torch.randint(vocab, (batch, length), generator=self._generator(seed)).to(
            self.device
        )

    def inputs(
        self, batch: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> Tensor:
        """Random inputs of a mixer, of unit scale as behind the norm: [batch, length, D]."""
        shape = (batch, length, self.spec.scale.d_model)
        return torch.randn(shape, generator=self._generator(seed)).to(self.device, dtype)

    def engine(
        self, sequences: int, context: int, *, page_size: int = 5, lookback: int = 0,
        replay: int = 0,
    ) -> Engine:  # fmt: skip
        """An engine with awkward page sizes, to meet every boundary."""
        if self.backend != "torch":
            page_size = -(-page_size // PAGE_MULTIPLE) * PAGE_MULTIPLE
        return Engine(
            self.model, max_sequences=sequences, max_context=context, page_size=page_size,
            lookback=lookback, replay=replay, backend=self.backend,
        )  # fmt: skip

    @property
    def replays(self) -> tuple[int, ...]:
        """Without rings of inputs, and with, where some value can be replayed."""
        return (0, RING) if replays(self.model, RING) else (0,)

    def run(self, engine: Engine, slots: list[int], tokens: Tensor, sizes: list[int]) -> Tensor:
        """Logits of `tokens` [B, T], extended piece by piece."""
        pieces, start = [], 0
        for size in sizes:
            pieces.append(engine.extend(slots, tokens[:, start : start + size]))
            start += size
        return torch.cat(pieces, 1)

    @contextmanager
    def step(self, batch: int, context: int, new: int) -> Iterator[StepPlan]:
        """An open step after `context` tokens; pages hold one token, so no row is read in vain."""
        engine = self.engine(batch, context + new, page_size=1)
        slots = [engine.store.add() for _ in range(batch)]
        if context:
            engine.extend(slots, self.tokens(batch, context))
        with torch.inference_mode(), closing(engine.store.begin(slots, new)) as step:
            yield step

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000 + seed)


def splits(length: int, seed: int) -> list[int]:
    """A random split of `length` into pieces, short and long ones."""
    chosen = random.Random(seed)
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, chosen.choice([1, 1, 2, 3, 4, 9, 17, 30])))
    return sizes
