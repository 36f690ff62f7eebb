"""The conformance kit: what every mixer must obey, checked on any registry name or file.

The split law first: any split of a sequence into `extend` calls gives the outputs and the state
of one `forward`. Then causality, batch and padding invariance, fork, rollback, declared against
allocated bytes, declared against counted FLOPs, gradients, and bfloat16.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.backbone import Model, cast
from archs.backends import resolve_backend
from archs.cost import Step
from archs.registry import ModelSpec
from archs.sizes import Scale, get_scale
from eval.agreement import agreement
from infer.engine import PAGE_MULTIPLE, Engine
from kernels.attention import FLOP_FORMULAS

#: Largest allowed difference relative to the largest reference value, by dtype. Never softened.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Small enough to be quick, windowed well below the sequences that are checked.
CHECK_SCALE = replace(
    get_scale("tiny"), name="check", vocab_size=257, window=12, seq_len=48, mlp_multiple=8
)


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict: the rule's name, whether it held, and the figure that says so.

    passed: None where this machine cannot tell.
    """

    name: str
    passed: bool | None
    detail: str


class Subject:
    """A model under test and the tools that all checks share."""

    def __init__(
        self, arch: str, scale: Scale = CHECK_SCALE, seed: int = 0, backend: str = "torch",
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.spec = ModelSpec(arch=arch, scale=scale)
        self.model = self.spec.build(seed=seed, device=device)
        self.seed = seed
        self.backend = backend
        self.device = device

    @torch.inference_mode()
    def expected(self, tokens: Tensor) -> Tensor:
        """The reference: the torch form of `forward`."""
        logits: Tensor = self.model.use("torch")(tokens)
        self.model.use(self.backend)
        return logits

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Random token ids, int64 [batch, length]."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        vocab = self.spec.scale.vocab_size
        return torch.randint(vocab, (batch, length), generator=generator).to(self.device)

    def engine(
        self, sequences: int, context: int, *, page_size: int = 5, lookback: int = 0
    ) -> Engine:
        """An engine with awkward page sizes, to meet every boundary."""
        if self.backend != "torch":
            page_size = -(-page_size // PAGE_MULTIPLE) * PAGE_MULTIPLE
        return Engine(
            self.model, max_sequences=sequences, max_context=context, page_size=page_size,
            lookback=lookback, backend=self.backend,
        )  # fmt: skip

    def run(self, engine: Engine, slots: list[int], tokens: Tensor, sizes: list[int]) -> Tensor:
        """Logits of `tokens` [B, T], extended piece by piece."""
        pieces, start = [], 0
        for size in sizes:
            pieces.append(engine.extend(slots, tokens[:, start : start + size]))
            start += size
        return torch.cat(pieces, 1)


def error_of(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest reference value; infinite for NaN."""
    difference = (got.double() - expected.double()).abs().max()
    relative = difference / expected.double().abs().max().clamp(min=1e-12)
    return float(relative) if torch.isfinite(relative) else float("inf")


def splits(length: int, seed: int) -> list[int]:
    """A random split of `length` into pieces, short and long ones."""
    chosen = random.Random(seed)
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, chosen.choice([1, 1, 2, 3, 4, 9, 17, 30])))
    return sizes


def state_error(got: Engine, slot: int, expected: Engine, other: int) -> float:
    """Largest relative difference between what two sequences remember."""
    worst = 0.0
    pairs = zip(got.store.snapshot(slot), expected.store.snapshot(other), strict=True)
    for mine, theirs in pairs:
        for name in theirs:
            if theirs[name].numel():
                worst = max(worst, error_of(mine[name], theirs[name]))
    return worst


def check_split_law(subject: Subject) -> Check:
    """Random splits of odd lengths give the outputs of forward and the state of one extend."""
    worst = 0.0
    for seed, (batch, length) in enumerate([(1, 1), (2, 31), (1, 67), (3, 48)]):
        tokens = subject.tokens(batch, length, seed)
        expected = subject.expected(tokens)
        whole = subject.engine(batch, length)
        slots = [whole.store.add() for _ in range(batch)]
        worst = max(worst, error_of(whole.extend(slots, tokens), expected))
        for split_seed in range(3):
            engine = subject.engine(batch, length, page_size=(1, 4, 16)[split_seed])
            slots = [engine.store.add() for _ in range(batch)]
            logits = subject.run(engine, slots, tokens, splits(length, split_seed))
            worst = max(worst, error_of(logits, expected))
            for slot in slots:
                worst = max(worst, state_error(engine, slot, whole, slot))
    return _within("split law", worst)


def check_causality(subject: Subject) -> Check:
    """Changing a token changes nothing before it, and something from it on."""
    tokens = subject.tokens(2, 41)
    changed = tokens.clone()
    changed[:, 23] = (changed[:, 23] + 1) % subject.spec.scale.vocab_size
    with torch.inference_mode():
        a, b = subject.model(tokens), subject.model(changed)
    before = error_of(a[:, :23], b[:, :23])
    after = error_of(a[:, 24:], b[:, 24:])
    detail = f"change before: {before:.1e}, after: {after:.1e}"
    return Check("causality", before <= TOLERANCE[torch.float32] and after > 0, detail)


def check_padding(subject: Subject) -> Check:
    """A ragged, right-padded batch gives each sequence what it gets alone, empty ones included."""
    lengths = [7, 1, 19, 0, 33]
    more = [3, 11, 0, 5, 1]
    total = [a + b for a, b in zip(lengths, more, strict=True)]
    tokens = subject.tokens(len(lengths), max(total))
    engine = subject.engine(len(lengths), max(total))
    slots = [engine.store.add() for _ in lengths]
    got: list[list[Tensor]] = [[] for _ in lengths]
    starts = [0] * len(lengths)
    for counts in (lengths, more):
        width = max(counts)
        piece = torch.stack(
            [
                torch.nn.functional.pad(tokens[b, s : s + n], (0, width - n))
                for b, (s, n) in enumerate(zip(starts, counts, strict=True))
            ]
        )
        logits = engine.extend(slots, piece, torch.tensor(counts))
        for b, n in enumerate(counts):
            got[b].append(logits[b, :n])
            starts[b] += n
    worst = 0.0
    for b, n in enumerate(total):
        alone = subject.engine(1, n)
        slot = alone.store.add()
        expected = alone.extend([slot], tokens[b : b + 1, :n])[0]
        worst = max(worst, error_of(torch.cat(got[b]), expected))
        worst = max(worst, state_error(engine, slots[b], alone, slot))
    return _within("batch and padding invariance", worst)


def check_fork(subject: Subject) -> Check:
    """A fork shares its past, then diverges; neither disturbs the other."""
    prefix, left, right = (subject.tokens(1, n, n) for n in (23, 18, 19))
    engine = subject.engine(3, 64)
    parent = engine.store.add()
    engine.extend([parent], prefix)
    child = engine.store.fork(parent)
    worst = 0.0
    got_left = subject.run(engine, [parent], left, [1, 3, 14])
    got_right = subject.run(engine, [child], right, [2, 1, 16])
    grandchild = engine.store.fork(child)
    both = torch.cat((left[:, :5], right[:, :5]))
    got_both = engine.extend([child, grandchild], both)
    for past, tokens, got in (
        (prefix, left, got_left),
        (prefix, right, got_right),
        (torch.cat((prefix, right), 1), left[:, :5], got_both[:1]),
        (torch.cat((prefix, right), 1), right[:, :5], got_both[1:]),
    ):
        expected = subject.expected(torch.cat((past, tokens), 1))[:, past.shape[1] :]
        worst = max(worst, error_of(got, expected))
    for slot in (parent, child, grandchild):
        engine.store.release(slot)
    leaked = engine.store.allocated_bytes
    verdict = _within("fork, then diverge", worst)
    return replace(
        verdict,
        passed=bool(verdict.passed) and leaked == 0,
        detail=f"{verdict.detail}, {leaked} bytes left after release",
    )


def check_rollback(subject: Subject) -> Check:
    """Rejected tokens leave no trace: after rollback the state goes on as if never extended."""
    worst = 0.0
    for taken, back in ((4, 4), (4, 1), (3, 2), (1, 1)):
        engine = subject.engine(2, 96, lookback=4)
        slots = [engine.store.add(), engine.store.add()]
        prefix, drafts, rest = (subject.tokens(2, n, n) for n in (29, taken, 21))
        engine.extend(slots, prefix)
        engine.extend(slots, drafts)
        for slot in slots:
            engine.store.rollback(slot, back)
        got = subject.run(engine, slots, rest, [1, 2, 18])
        kept = torch.cat((prefix, drafts[:, : taken - back], rest), 1)
        expected = subject.expected(kept)[:, -rest.shape[1] :]
        worst = max(worst, error_of(got, expected))
    return _within("rollback", worst)


def check_bytes(subject: Subject) -> Check:
    """Declared bytes equal allocated bytes at every length, with and without lookback."""
    for lookback in (0, 3):
        for page_size in (1, 5, 16):
            engine = subject.engine(2, 64, page_size=page_size, lookback=lookback)
            slots = [engine.store.add(), engine.store.add()]
            tokens = subject.tokens(2, 48)
            start = 0
            for size in (1, 7, 16, 1, 20, 3):
                engine.extend(slots, tokens[:, start : start + size])
                start += size
                allocated = engine.store.allocated_bytes
                declared = 2 * engine.store.declared_bytes(start)
                if allocated != declared:
                    detail = f"declared {declared}, allocated {allocated} at {start} tokens, "
                    detail += f"page_size {page_size}, lookback {lookback}"
                    return Check("declared = allocated bytes", False, detail)
    model = subject.model
    detail = f"{model.state_bytes(48)} bytes at 48 tokens"
    return Check("declared = allocated bytes", True, detail)


def check_flops(subject: Subject) -> Check:
    """Declared matrix FLOPs equal those that torch counts, prefill and decode, exactly."""
    for batch, context, new in ((1, 0, 33), (2, 0, 48), (2, 33, 1), (1, 20, 4), (1, 9, 40)):
        engine = subject.engine(batch, context + new, page_size=1)
        slots = [engine.store.add() for _ in range(batch)]
        if context:
            engine.extend(slots, subject.tokens(batch, context))
        step = engine.store.begin(slots, new)
        with (
            torch.inference_mode(),
            FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
        ):
            subject.model.extend(subject.tokens(batch, new), step.layers)
        declared = subject.model.cost(Step(batch, new, context), all_logits=True).matrix_flops
        counted = counter.get_total_flops()
        if declared != counted:
            detail = f"declared {declared}, counted {counted} for batch {batch}, "
            detail += f"{new} new tokens after {context}"
            return Check("declared = counted FLOPs", False, detail)
    return Check("declared = counted FLOPs", True, "equal in 5 steps")


def check_gradients(subject: Subject) -> Check:
    """Every parameter gets a finite gradient, and not all of it zero."""
    model = subject.spec.build(seed=subject.seed)
    tokens = subject.tokens(2, 33)
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    return Check("gradients", not bad, f"missing or not finite: {', '.join(bad) or 'none'}")


def check_bfloat16(subject: Subject) -> Check:
    """bfloat16 weights stay within the table of the same weights in float32; so does extend."""
    model = cast(subject.spec.build(seed=subject.seed), torch.bfloat16)
    wide = cast(_copy(model, subject.spec), torch.float32)
    tokens = subject.tokens(2, 41)
    with torch.inference_mode():
        expected = wide(tokens)
        forward = model(tokens)
    engine = Engine(model, max_sequences=2, max_context=41, page_size=5)
    slots = [engine.store.add(), engine.store.add()]
    logits = subject.run(engine, slots, tokens, [20, 1, 1, 3, 16])
    errors = [_rms_error(forward, expected), _rms_error(logits, expected)]
    worst = max(errors)
    detail = f"rms error forward {errors[0]:.1e}, extend {errors[1]:.1e}"
    return Check("bfloat16", worst <= TOLERANCE[torch.bfloat16], detail)


def _copy(model: Model, spec: ModelSpec) -> Model:
    other = spec.build(seed=0)
    other.load_state_dict(model.state_dict())
    return other


def _rms_error(got: Tensor, expected: Tensor) -> float:
    wide = expected.double()
    error = ((got.double() - wide).square().mean() / wide.square().mean()).sqrt()
    return float(error) if torch.isfinite(error) else float("inf")


def _within(name: str, worst: float) -> Check:
    limit = TOLERANCE[torch.float32]
    return Check(name, worst <= limit, f"largest relative error {worst:.1e} (limit {limit:.0e})")


def check_kernels(subject: Subject) -> Check:
    """On a GPU our kernels, prefill and graphs included, give what the torch forms give."""
    if not torch.cuda.is_available():
        return Check("triton equals torch", None, "not measured: this machine has no CUDA device")
    model = subject.spec.build(seed=subject.seed, device="cuda", dtype=torch.bfloat16)
    found = agreement(model, backend=resolve_backend("triton", torch.device("cuda")))
    detail = f"largest relative error {found.error:.1e} in bfloat16 (limit {found.limit:.1e})"
    return Check("triton equals torch", found.holds, detail)


CHECKS: dict[str, Callable[[Subject], Check]] = {
    "split-law": check_split_law,
    "causality": check_causality,
    "padding": check_padding,
    "fork": check_fork,
    "rollback": check_rollback,
    "bytes": check_bytes,
    "flops": check_flops,
    "gradients": check_gradients,
    "bfloat16": check_bfloat16,
    "kernels": check_kernels,
}


def run_checks(arch: str, seed: int = 0) -> Iterator[Check]:
    """All checks of one architecture, in order; a check that raises has failed."""
    subject = Subject(arch, seed=seed)
    for name, check in CHECKS.items():
        try:
            yield check(subject)
        except Exception as error:
            # A user's mixer may fail in any way; the kit reports it and goes on.
            yield Check(name, False, f"{type(error).__name__}: {error}")
