"""From logits to the next token: greedy, temperature, top-k and top-p, on the device."""

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
    """temperature 0 is greedy; top_k keeps that many of the likeliest tokens (0: all), and of their
    mass top_p keeps the smallest set with that share.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"temperature={self.temperature} must be finite and >= 0, top_p={self.top_p} in "
                f"(0, 1] and top_k={self.top_k} at least 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0

    @property
    def rule(self) -> tuple[float, float, int]:
        """What it makes of logits, whatever numbers are drawn: equal ones can go together."""
        return self.temperature, self.top_p, self.top_k


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
        """The distribution that is drawn from. [..., V] -> [..., V] float64, rows sum to 1."""
        s = self.sampling
        if s.top_k:
            logits = nucleus.top_k(logits, s.top_k)
        return nucleus.nucleus(logits, temperature=s.temperature, top_p=s.top_p)

    def uniforms(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tensor | None:
        """Numbers in [0, 1) for the draws of `tokens` tokens: [tokens, B]; None for greedy choice.

        They follow from the seed, the prompt and how many equal prompts precede it: neither other
        sequences of a batch nor the place in it change what is drawn.
        """
        if self.sampling.greedy:
            return None
        rows = [torch.rand(tokens, generator=stream) for stream in self.streams(prompts)]
        return torch.stack(rows, 1).to(self.device)

    def streams(self, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
        """The random numbers of each sequence: they follow from what `uniforms` says."""
        copies: Counter[tuple[int, ...]] = Counter()
        streams = []
        for prompt in prompts:
            key = tuple(prompt)
            streams.append(stream(self.sampling.seed, prompt, copies[key]))
            copies[key] += 1
        return streams


def stream(seed: int, prompt: Sequence[int], copy: int = 0) -> torch.Generator:
    """The random numbers of a sequence; copy: how many equal ones precede it."""
    text = repr((seed, copy, tuple(prompt)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    if s.top_k:
        logits = nucleus.top_k(logits, s.top_k)
    kept = nucleus.nucleus(logits, temperature=s.temperature, top_p=s.top_p)
    return nucleus.draw(kept, uniform)


def _triton(sampling: Sampling, logits: Tensor, uniform: Tensor | None) -> Tensor:
    from kernels.sampling import sample

    if uniform is None:
        return sample.greedy(logits)
    if sampling.top_k:
        logits = nucleus.top_k(logits, sampling.top_k)
    return sample.top_p(logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p)


_DRAW = everywhere("sampling", _torch, _triton)
