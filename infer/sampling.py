"""From logits to the next token: greedy, temperature and top-p, on the device."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archs.backends import everywhere
from archs.errors import UserError
from kernels.sampling import nucleus
from kernels.sampling.nucleus import NO_TOKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens with that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature} must be finite and >= 0, "
                f"and top_p={self.top_p} in (0, 1]"
            )


class NoTokenError(ArithmeticError):
    """A sequence's logits are NaN, or where one is drawn infinite: no token follows from them."""


class Sampler:
    """Draws tokens by a `Sampling`, each sequence by random numbers of its own.

    backend: torch, or any other for our kernels, which draw without a sort.
    """

    def __init__(self, sampling: Sampling, device: torch.device, *, backend: str = "torch") -> None:
        self.sampling = sampling
        self.device = device
        self._draw = _DRAW[backend]

    def __call__(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """logits: [B, V] -> int64 [B], `NO_TOKEN` where the logits decide none.

        uniform: float32 [B], from `uniforms`; greedy choice takes none.
        """
        return self._draw(self.sampling, logits, uniform)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from. [B, V] -> [B, V] float64, rows sum to 1."""
        s = self.sampling
        return nucleus.nucleus(logits, temperature=s.temperature, top_p=s.top_p)

    def uniforms(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tensor | None:
        """Numbers in [0, 1) for the draws of `tokens` tokens: [tokens, B]; None for greedy choice.

        They follow from the seed, the prompt and how many equal prompts precede it: neither other
        sequences of a batch nor the place in it change what is drawn.
        """
        if self.sampling.temperature == 0:
            return None
        copies: Counter[tuple[int, ...]] = Counter()
        rows = []
        for prompt in prompts:
            key = tuple(prompt)
            text = repr((self.sampling.seed, copies[key], key))
            copies[key] += 1
            stream = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
            rows.append(torch.rand(tokens, generator=torch.Generator().manual_seed(stream)))
        return torch.stack(rows, 1).to(self.device)


def fed(tokens: Tensor) -> Tensor:
    """Chosen tokens [B] as the next step's [B, 1].

    Any stands for one that is missing: its sequence is refused when its tokens are read.
    """
    return tokens.clamp(min=0)[:, None]


def require_tokens(tokens: Sequence[int]) -> None:
    """Raises NoTokenError where a sequence has no next token."""
    for i, token in enumerate(tokens):
        if token == NO_TOKEN:
            raise NoTokenError(
                f"the logits of sequence {i} are NaN or infinite: no token follows from them; "
                "check its weights, or decode in a dtype of wider range"
            )


def _torch(sampling: Sampling, logits: Tensor, uniform: Tensor | None) -> Tensor:
    if uniform is None:
        return nucleus.greedy(logits)
    s = sampling
    kept = nucleus.nucleus(logits, temperature=s.temperature, top_p=s.top_p)
    return nucleus.draw(kept, uniform)


def _triton(sampling: Sampling, logits: Tensor, uniform: Tensor | None) -> Tensor:
    from kernels.sampling import sample

    if uniform is None:
        return sample.greedy(logits)
    return sample.top_p(logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p)


_DRAW = everywhere("sampling", _torch, _triton)
