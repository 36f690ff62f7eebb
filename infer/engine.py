"""One decode engine for all architectures: prefill and decode are both `extend`.

The engine owns the loop (lengths, sampling, timing); the model sees only layer states. Every
token's time is taken, so percentiles are over steps. Timing synchronises the device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archs.backbone import Model, lay_out
from archs.errors import UserError
from infer.compiled import CompiledStep
from infer.sampling import Sampler, Sampling
from infer.store import StateStore


@dataclass(slots=True)
class Generation:
    """What one batch produced and how long it took.

    tokens: the new tokens of each sequence. step_ms: decode steps after the first token.
    """

    tokens: list[list[int]]
    ttft_ms: float
    step_ms: list[float] = field(default_factory=list)
    peak_state_bytes: int = 0

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first."""
        return sum(self.step_ms) / len(self.step_ms) if self.step_ms else float("nan")

    @property
    def output_tok_per_s(self) -> float:
        """Decode throughput over all sequences."""
        return len(self.tokens) * 1000 / self.tpot_ms


class Engine:
    """A model and the store that its sequences live in; lays the model's matrices out for it.

    compiled: compile the decode step at its first calls (`infer.compiled`; plain batches only).
    prefill_chunk: longest piece of a prompt processed at once (None: the whole prompt).
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int = 1,
        max_context: int = 2048,
        page_size: int = 64,
        lookback: int = 0,
        prefill_chunk: int | None = 2048,
        compiled: bool = False,
    ) -> None:
        self.model = lay_out(model.eval(), max_sequences)
        self.device = model.embedding.weight.device
        self.prefill_chunk = prefill_chunk
        self.store = StateStore(
            model.state_specs(),
            max_sequences=max_sequences,
            # Compiled code takes a view of all rows for another shape: keep it out of reach.
            max_context=max_context + compiled,
            page_size=min(page_size, max_context),
            lookback=lookback,
            device=self.device,
        )
        self.compiled = CompiledStep(self.model, lookback=lookback) if compiled else None

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], tokens: Tensor, new: Tensor | None = None) -> Tensor:
        """Logits [B, K, V] of K new tokens [B, K] per sequence (`new` [B] of them valid)."""
        step = self.store.begin(slots, tokens.shape[1], new)
        logits = self.model.extend(tokens, step.layers)
        self.store.commit(step)
        return logits

    @torch.inference_mode()
    def extend_last(
        self, slots: Sequence[int], tokens: Tensor, new: Tensor | None = None
    ) -> Tensor:
        """Logits [B, V] of each sequence's last valid token."""
        step = self.store.begin(slots, tokens.shape[1], new)
        if self.compiled is not None and tokens.shape[1] == 1:
            logits = self.compiled(tokens, step)
        else:
            logits = self.model.extend_last(tokens, step.layers)
        self.store.commit(step)
        return logits

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Extend empty or held sequences by their prompts; logits [B, V] of their last tokens.

        Prompts of different lengths are right-padded; long ones go in chunks.
        """
        lengths = [len(p) for p in prompts]
        if not lengths or min(lengths) == 0:
            raise UserError("a prompt is empty; give every sequence at least one token")
        chunk = self.prefill_chunk or max(lengths)
        logits: Tensor | None = None
        for start in range(0, max(lengths), chunk):
            pieces = [list(p[start : start + chunk]) for p in prompts]
            width = max(len(p) for p in pieces)
            counts = torch.tensor([len(p) for p in pieces], device=self.device)
            tokens = torch.tensor([p + [0] * (width - len(p)) for p in pieces], device=self.device)
            new = None if all(len(p) == width for p in pieces) else counts
            fresh = self.extend_last(slots, tokens, new)
            ends = counts > 0
            logits = fresh if logits is None else torch.where(ends[:, None], fresh, logits)
        assert logits is not None
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop: int | None = None,
        on_token: Callable[[int], object] | None = None,
    ) -> Generation:
        """Prefill, then token by token. Sequences end at `stop` or after `max_new_tokens`.

        Sequences that have ended leave the batch. Raises UserError where the context does not
        fit and StoreFullError where the slots do not.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        sampler = Sampler(sampling or Sampling(), self.device)
        slots = [self.store.add() for _ in prompts]
        out: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        try:
            began = self._now()
            chosen = sampler(self.prefill(slots, prompts))
            tokens = chosen.tolist()
            result = Generation(out, ttft_ms=(self._now() - began) * 1e3)
            while True:
                for i, token in zip(live, tokens, strict=True):
                    out[i].append(token)
                    if on_token is not None:
                        on_token(token)
                if len(out[live[0]]) == max_new_tokens:
                    break
                if stop is not None:
                    ended = [n for n, token in enumerate(tokens) if token == stop]
                    if ended:
                        kept = [n for n in range(len(live)) if n not in ended]
                        for n in ended:
                            self.store.release(slots[live[n]])
                        live = [live[n] for n in kept]
                        chosen = chosen[kept]
                    if not live:
                        break
                began = self._now()
                chosen = sampler(self.extend_last([slots[i] for i in live], chosen[:, None]))
                tokens = chosen.tolist()
                result.step_ms.append((self._now() - began) * 1e3)
        finally:
            for i in live:
                self.store.release(slots[i])
        result.peak_state_bytes = self.store.peak_bytes
        return result

    @torch.inference_mode()
    def generate_without_state(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> Generation:
        """Greedy generation that keeps nothing and recomputes every prefix: the baseline that
        shows what the state saves. Prompts must have equal lengths.
        """
        if len({len(p) for p in prompts}) != 1:
            raise UserError("generation without state needs prompts of one length")
        tokens = torch.tensor([list(p) for p in prompts], device=self.device)
        times = []
        for _ in range(max_new_tokens):
            began = self._now()
            hidden = self.model.hidden_states(tokens)[:, -1]
            tokens = torch.cat((tokens, self.model.logits(hidden).argmax(-1)[:, None]), 1)
            times.append((self._now() - began) * 1e3)
        new = tokens[:, len(prompts[0]) :].tolist()
        return Generation(new, ttft_ms=times[0], step_ms=times[1:])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
