"""One decode engine for all architectures: prefill and decode are both `extend`.

The engine owns the loop (lengths, sampling, timing); the model sees only layer states. Every
token's time is taken, so percentiles are over steps. On a GPU tokens stay there: unless somebody
looks at each one (`stop`, `on_token`), the host does not wait between decode steps.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archs.backbone import Model, Output, lay_out
from archs.errors import UserError
from archs.storage import require_kernels_read
from infer.clock import StepClock
from infer.compiled import CompiledStep
from infer.graphs import GraphedStep
from infer.memory import keep_freed
from infer.pages import TableKey
from infer.plan import StepPlan
from infer.sampling import Sampler, Sampling, fed, require_tokens
from infer.store import StateStore
from kernels.sampling.nucleus import greedy

#: Takes sequences, hidden states [B, K, D] of tokens they were extended by, and how many of each
#: count; valid during the call.
Reader = Callable[[Sequence[int], Tensor, Sequence[int]], None]
#: Rows of a page where nobody says otherwise.
PAGE_SIZE = 64
#: Rows of a page that kernels can read come in multiples of this; some libraries want more.
PAGE_MULTIPLE = 16
PAGE_MULTIPLES = {"flash-attn": 256}


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
        """Decode throughput: the tokens after each sequence's first over the time they took."""
        made = sum(len(tokens) - 1 for tokens in self.tokens)
        return 1e3 * made / sum(self.step_ms) if self.step_ms else float("nan")


class Engine:
    """A model and the store that its sequences live in; lays the model's matrices out for it.

    page_size: tokens of a page (None: what suits the backend).
    backend: which forms of the operations run (`archs.backends`), for this model from now on
      (None: those that it is set to).
    compiled: compile decode steps at their first calls (`infer.compiled`; adjacent sequences that
      share no rows, backend torch only).
    graphs: replay the decode step as a CUDA graph (None: on CUDA, but for backend torch).
    prefill_chunk: longest piece of a prompt processed at once (None: the whole prompt).
    pages, kept: as `StateStore`'s.
    Raises UserError on options that exclude each other and on pages and states that kernels cannot
    read.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int = 1,
        max_context: int = 2048,
        page_size: int | None = None,
        lookback: int = 0,
        replay: int = 0,
        prefill_chunk: int | None = 2048,
        kept: int = 0,
        pages: int | Mapping[TableKey, int] | None = None,
        backend: str | None = None,
        compiled: bool = False,
        graphs: bool | None = None,
    ) -> None:
        backend = backend or model.backend
        self.device = model.embedding.weight.device
        if self.device.type == "cpu":
            keep_freed()
        self.prefill_chunk = prefill_chunk
        self.backend = backend
        plain = backend == "torch"
        multiple = PAGE_MULTIPLES.get(backend, PAGE_MULTIPLE)
        if compiled and not plain:
            raise UserError(
                f"compiled=True compiles the torch forms, backend={backend} has its own kernels; "
                "take one of them"
            )
        if compiled and replay:
            raise UserError(
                f"compiled=True with replay={replay}: compiled steps keep copies; take replay=0"
            )
        if graphs and plain:
            raise UserError("graphs=True needs states on the device; take backend=triton")
        page_size = page_size or max(PAGE_SIZE, 1 if plain else multiple)
        if not plain and page_size % multiple:
            raise UserError(
                f"page_size={page_size} must be a multiple of {multiple} for backend {backend}; "
                f"take {max(64, multiple)}"
            )
        if not plain:
            require_kernels_read(model, backend)
        self.model = lay_out(model.eval(), max_sequences).use(backend)
        longest = max_context if plain else -(-max_context // multiple) * multiple
        page_size = min(page_size, longest)
        self.store = StateStore(
            model.state_specs(),
            max_sequences=max_sequences,
            # Compiled code takes a view of all rows for another shape: keep it out of reach.
            max_context=max_context + compiled,
            page_size=page_size,
            lookback=lookback,
            replay=replay,
            kept=kept,
            pages=pages,
            device=self.device,
            kernels=not plain,
        )
        self.compiled = CompiledStep(self.model) if compiled else None
        self.graphed: GraphedStep | None = None
        wanted = self.device.type == "cuda" if graphs is None else graphs
        if wanted and not plain:
            self.graphed = GraphedStep(self.model, self.store)

    @property
    def kernel_backend(self) -> str:
        """What runs the decode step, as it stands in results."""
        return self.backend if self.compiled is None else "torch-compile"

    def _step(
        self, sequences: Sequence[int], tokens: Tensor, new: Tensor | None, hidden: Tensor | None
    ) -> AbstractContextManager[StepPlan]:
        """A step of the store for these tokens; checks what can be checked without waiting."""
        if self.model.backend != self.backend:
            raise UserError(
                f"the model was put on backend {self.model.backend} after this engine was opened "
                f"on {self.backend}; open a new engine"
            )
        if tokens.dim() != 2 or len(tokens) != len(sequences):
            raise UserError(
                f"tokens of shape {list(tokens.shape)} for {len(sequences)} sequences; give "
                "[B, K], a row for each sequence"
            )
        self.model.require_hidden(tokens, hidden)
        if tokens.numel() and not tokens.is_cuda:
            lowest, highest = tokens.aminmax()
            self._check_ids(int(lowest), int(highest))
        return self.store.step(sequences, tokens.shape[1], new)

    def _check_ids(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.model.vocab_size:
            raise UserError(
                f"token ids from {lowest} to {highest} do not lie in 0..{self.model.vocab_size - 1}"
                "; take the tokenizer that the model was trained with"
            )

    @torch.inference_mode()
    def extend(
        self, sequences: Sequence[int], tokens: Tensor, new: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, K, V] of K new tokens [B, K] per sequence (`new` [B] of them valid).

        hidden: [B, K, D], for a head (`archs.heads`). Where it fails the sequences are as before,
        or lost (`StateStore.abort`). Raises UserError on shapes, counts and contexts that do not
        fit and on ids beyond the vocabulary (ids on a GPU are not looked at), StoreFullError
        without pages.
        """
        with self._step(sequences, tokens, new, hidden) as step:
            return self.model.step(tokens, step.layers, hidden, every_token=True).logits

    @torch.inference_mode()
    def verify(
        self, sequences: Sequence[int], tokens: Tensor, new: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Logits [B, K, V] and hidden states of a few drafted tokens [B, K] each; as `extend`.

        Those of a replayed graph are valid until the next step.
        """
        with self._step(sequences, tokens, new, hidden) as step:
            if self.compiled is not None:
                return self.compiled(tokens, step, hidden, every_token=True)
            if self.graphed is not None and self.graphed.serves(step):
                return self.graphed(tokens, step, hidden, every_token=True)
            return self.model.step(tokens, step.layers, hidden, every_token=True)

    def extend_last(
        self, sequences: Sequence[int], tokens: Tensor, new: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, V] of each sequence's last valid token; otherwise as `extend`.

        Those of a replayed graph are valid until the next step.
        """
        return self._last(sequences, tokens, new, hidden).logits

    @torch.inference_mode()
    def _last(
        self, sequences: Sequence[int], tokens: Tensor, new: Tensor | None,
        hidden: Tensor | None = None,
    ) -> Output:  # fmt: skip
        single = tokens.shape[1:] == (1,)
        with self._step(sequences, tokens, new, hidden) as step:
            if self.compiled is not None and single:
                return self.compiled(tokens, step, hidden, every_token=False)
            if self.graphed is not None and single and self.graphed.serves(step):
                return self.graphed(tokens, step, hidden, every_token=False)
            return self.model.step(tokens, step.layers, hidden, every_token=False)

    def prefill(
        self,
        sequences: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        read: Reader | None = None,
    ) -> Tensor:
        """Extend empty or held sequences by their prompts; logits [B, V] of their last tokens.

        Prompts of different lengths are right-padded; long ones go in chunks, and where the store
        has no page for a chunk, those before it stay. read: gets each chunk's hidden states.
        Raises as `extend`, ids on a GPU included.
        """
        lengths = [len(p) for p in prompts]
        if not lengths or min(lengths) == 0:
            raise UserError("a prompt is empty; give every sequence at least one token")
        self._check_ids(min(map(min, prompts)), max(map(max, prompts)))
        self.store.check_context(sequences, lengths)
        chunk = self.prefill_chunk or max(lengths)
        logits: Tensor | None = None
        for start in range(0, max(lengths), chunk):
            pieces = [list(p[start : start + chunk]) for p in prompts]
            width = max(len(p) for p in pieces)
            counts = torch.tensor([len(p) for p in pieces])
            tokens = torch.tensor([p + [0] * (width - len(p)) for p in pieces], device=self.device)
            new = None if all(len(p) == width for p in pieces) else counts
            fresh, hidden = self._last(sequences, tokens, new)
            if read is not None:
                read(sequences, hidden, counts.tolist())
            ends = (counts > 0).to(self.device)
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

        Sequences that have ended leave the batch, or stay in it unread where decode is compiled,
        for batches as they are. Raises UserError where the context does not fit and StoreFullError
        where the sequences do not.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        sampler = Sampler(sampling or Sampling(), self.device, backend=self.backend)
        uniforms = sampler.uniforms(prompts, max_new_tokens)
        watched = stop is not None or on_token is not None
        out: list[list[int]] = [[] for _ in prompts]
        unseen: list[Tensor] = []
        clock = StepClock(self.device)
        with self.store.sequences(len(prompts)) as sequences:
            # Which sequence each row of the batch is; `sequences` keeps only theirs.
            rows, ended = list(range(len(prompts))), set[int]()
            clock.mark()
            logits = self.prefill(sequences, prompts)
            chosen = sampler(logits, None if uniforms is None else uniforms[0])
            for made in range(1, max_new_tokens + 1):
                if watched:
                    tokens = chosen.tolist()
                    require_tokens(tokens)
                    for i, token in zip(rows, tokens, strict=True):
                        if i in ended:
                            continue
                        out[i].append(token)
                        if on_token is not None:
                            on_token(token)
                else:
                    unseen.append(chosen)
                clock.mark()
                if made == max_new_tokens:
                    break
                if stop is not None and stop in tokens:
                    ended |= {i for i, token in zip(rows, tokens, strict=True) if token == stop}
                    kept = [n for n, i in enumerate(rows) if i not in ended]
                    if not kept:
                        break
                    if self.compiled is None:
                        for n in reversed(range(len(rows))):
                            if rows[n] in ended:
                                self.store.release(sequences.pop(n))
                        rows = [rows[n] for n in kept]
                        chosen = chosen[kept]
                        uniforms = None if uniforms is None else uniforms[:, kept]
                logits = self.extend_last(sequences, fed(chosen))
                chosen = sampler(logits, None if uniforms is None else uniforms[made])
        if unseen:
            out = _read(unseen)
        ttft_ms, *step_ms = clock.spans_ms()
        return Generation(out, ttft_ms, step_ms, self.store.peak_bytes)

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
        made: list[Tensor] = []
        clock = StepClock(self.device)
        clock.mark()
        for _ in range(max_new_tokens):
            hidden = self.model.hidden_states(tokens)[:, -1]
            made.append(greedy(self.model.logits(hidden)))
            tokens = torch.cat((tokens, fed(made[-1])), 1)
            clock.mark()
        new = _read(made)
        ttft_ms, *step_ms = clock.spans_ms()
        return Generation(new, ttft_ms, step_ms)


def _read(chosen: Sequence[Tensor]) -> list[list[int]]:
    """The tokens of each sequence from those of each step [B]; waits for the device.

    Raises NoTokenError.
    """
    steps = torch.stack(list(chosen)).tolist()
    for tokens in steps:
        require_tokens(tokens)
    return [list(row) for row in zip(*steps, strict=True)]
