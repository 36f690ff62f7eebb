"""From logits to the next token: greedy, temperature and top-p, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.backends import choose, everywhere
from archs.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens with that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature} must be >= 0 and top_p={self.top_p} in (0, 1]"
            )


class Sampler:
    """Draws tokens by a `Sampling`; its generator makes a run repeatable.

    backend: torch, or any other for our kernels, which draw without a sort.
    """

    def __init__(self, sampling: Sampling, device: torch.device, *, backend: str = "torch") -> None:
        self.sampling = sampling
        self._draw = choose("sampling", backend, _DRAW)
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: [B, V] -> int64 [B]."""
        return self._draw(self, logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from. [B, V] -> [B, V] float32, rows sum to 1."""
        scaled = logits.float() / self.sampling.temperature
        probabilities = scaled.softmax(-1)
        if self.sampling.top_p == 1:
            return probabilities
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= self.sampling.top_p, 0.0)
        kept = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
        return kept / kept.sum(-1, keepdim=True)


def _torch(sampler: Sampler, logits: Tensor) -> Tensor:
    if sampler.sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = sampler.probabilities(logits)
    return torch.multinomial(probabilities, 1, generator=sampler.generator)[:, 0]


def _triton(sampler: Sampler, logits: Tensor) -> Tensor:
    from kernels import sample

    s = sampler.sampling
    if s.temperature == 0:
        return sample.greedy(logits)
    uniform = torch.rand(logits.shape[0], generator=sampler.generator, device=logits.device)
    return sample.top_p(logits, uniform, temperature=s.temperature, top_p=s.top_p)


_DRAW = everywhere(_torch, _triton)
