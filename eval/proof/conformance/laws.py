"""The laws that compare what a mixer computes in two ways.

The split law: any split of a sequence into `extend` calls gives the outputs and the state of one
`forward`. Then causality, batches, padding, fork, rollback, gradients and 16-bit weights. A law
that is broken names the first wrong position and its likely cause.
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from archs.backbone import Model, cast
from archs.backends import NoFormError, resolve_backend
from archs.mixer import Shared, asking_losses, losses_left
from archs.registry import ModelSpec
from eval.measure.agreement import agreement
from eval.proof.conformance.subject import Subject, splits
from eval.proof.conformance.verdict import (
    TOLERANCE,
    Check,
    Comparison,
    Wrong,
    error_of,
    position_errors,
    short,
)
from infer.engine import Engine

#: The position of the changed token.
CHANGED = 23


def check_causality(subject: Subject) -> Check:
    """Changing a token changes nothing before it, and something from it on."""
    name, x = "causality", subject.inputs(2, 41)
    changed = x.clone()
    changed[:, CHANGED] = -changed[:, CHANGED]
    shared: tuple[Shared, Shared] = ({}, {})
    worst = 0.0
    with torch.inference_mode():
        for layer, mixer in enumerate(subject.mixers):
            a, b = (mixer(t.clone(), s) for t, s in zip((x, changed), shared, strict=True))
            errors = position_errors(a, b)
            ahead = (errors[:, :CHANGED] > TOLERANCE).any(0).nonzero()
            if len(ahead):
                first = int(ahead[0])
                detail = f"{subject.label(layer)}: changing token {CHANGED} changes token {first} "
                detail += f"by {float(errors[:, first].max()):.1e}; forward looks "
                detail += f"{CHANGED - first} tokens ahead: mask or shift what it reads"
                return Check(name, False, detail)
            worst = max(worst, float(errors[:, :CHANGED].max()))
    tokens = subject.tokens(2, 41)
    other = tokens.clone()
    other[:, CHANGED] = (other[:, CHANGED] + 1) % subject.spec.scale.vocab_size
    after = error_of(*(subject.expected(t)[:, CHANGED + 1 :] for t in (tokens, other)))
    detail = f"change before: {worst:.1e}, after: {after:.1e}"
    if not after:
        detail += "; no later token sees what a token says: the mixer mixes nothing"
    return Check(name, after > 0, detail)


def check_batch(subject: Subject) -> Check:
    """forward gives each sequence of a batch what it gives the sequence alone."""
    tokens = subject.tokens(3, 31)
    held = Comparison()
    alone = torch.cat([subject.expected(tokens[b : b + 1]) for b in range(3)])
    held.see(subject.expected(tokens), alone, "a batch of 3")
    return held.verdict("batch independence", lambda _: "forward mixes sequences of the batch")


def check_split_law(subject: Subject) -> Check:
    """Random splits of odd lengths give the outputs of forward and the state of one extend."""
    name, held = "split law", Comparison()
    state, fault = Comparison(), ""
    for seed, (batch, length) in enumerate([(2, 31), (1, 67), (3, 48), (1, 1)]):
        tokens = subject.tokens(batch, length, seed)
        expected = subject.expected(tokens)
        whole = subject.engine(batch, length)
        slots = [whole.store.add() for _ in range(batch)]
        if not held.see(whole.extend(slots, tokens), expected, f"extend by {length} at once"):
            break
        for split_seed in range(3):
            sizes = splits(length, split_seed)
            engine = subject.engine(batch, length, page_size=(1, 4, 16)[split_seed])
            slots = [engine.store.add() for _ in range(batch)]
            logits = subject.run(engine, slots, tokens, sizes)
            case = f"extend by {'+'.join(map(str, sizes))}"
            if held.see(logits, expected, case) and not fault:
                fault = _state_fault(subject, state, engine, whole, slots, case)
    if held.wrong is None and fault:
        return Check(name, False, fault)
    held.worst = max(held.worst, state.worst)
    return held.verdict(name, _split_cause)


def _state_fault(
    subject: Subject, held: Comparison, got: Engine, expected: Engine, slots: list[int], case: str
) -> str:
    """The first difference between two engines' states of the same sequences; empty if none."""
    for slot in slots:
        pairs = zip(got.store.snapshot(slot), expected.store.snapshot(slot), strict=True)
        for layer, (mine, theirs) in enumerate(pairs):
            for tensor, value in theirs.items():
                error = error_of(mine[tensor], value) if value.numel() else 0.0
                held.worst = max(held.worst, error)
                if error > held.limit:
                    return (
                        f"{case}: outputs agree, but {subject.label(layer)} remembers another "
                        f"'{tensor}' than after one extend: off by {error:.1e}"
                    )
    return ""


def _split_cause(wrong: Wrong) -> str:
    sizes = [int(n) for n in wrong.case.split()[2].split("+")]
    if len(sizes) == 1:
        return "extend computes something else than forward, even on all tokens at once"
    ends = list(accumulate(sizes))
    piece = next(i for i, end in enumerate(ends) if wrong.token < end)
    start, size = ends[piece] - sizes[piece], sizes[piece]
    where = f"piece {piece + 1} (tokens {start} to {start + size - 1})"
    if piece == 0:
        return f"extend of {size} tokens from empty, {where}, is not what forward gives"
    if wrong.token > start:
        return f"within {where} extend differs from forward"
    alone = "its form for single tokens, or " if size == 1 else ""
    return (
        f"it opens {where}: {alone}what the pieces before left in the state (a fixed tensor or a "
        "convolution's tail that is not put, positions that start again at 0)"
    )


def check_padding(subject: Subject) -> Check:
    """A ragged, right-padded batch gives each sequence what it gets alone, empty ones included."""
    name, held, state, fault = "batch and padding invariance", Comparison(), Comparison(), ""
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
    for b, n in enumerate(total):
        alone = subject.engine(len(lengths), n)
        slots_alone = [alone.store.add() for _ in lengths]
        expected = alone.extend(slots_alone[b : b + 1], tokens[b : b + 1, :n])
        case = f"sequence {b} of 5, {lengths[b]} and then {more[b]} tokens beside longer ones"
        if held.see(torch.cat(got[b])[None], expected, case) and not fault:
            fault = _state_fault(subject, state, engine, alone, slots[b : b + 1], case)
    if held.wrong is None and fault:
        return Check(name, False, f"{fault}; {PADDING_CAUSE}")
    held.worst = max(held.worst, state.worst)
    return held.verdict(name, lambda _: PADDING_CAUSE)


PADDING_CAUSE = (
    "extend lets padded tokens into the state, or sequences into each other: "
    "leave out what state.valid says is padding"
)


def check_fork(subject: Subject) -> Check:
    """A fork shares its past, then diverges; neither disturbs the other."""
    name, held = "fork, then diverge", Comparison()
    prefix, left, right = (subject.tokens(1, n, n) for n in (23, 18, 19))
    engine = subject.engine(3, 64)
    parent = engine.store.add()
    engine.extend([parent], prefix)
    child = engine.store.fork(parent)
    got_left = subject.run(engine, [parent], left, [1, 3, 14])
    got_right = subject.run(engine, [child], right, [2, 1, 16])
    grandchild = engine.store.fork(child)
    both = torch.cat((left[:, :5], right[:, :5]))
    got_both = engine.extend([child, grandchild], both)
    for case, past, tokens, got in (
        ("the parent, after the fork", prefix, left, got_left),
        ("the child", prefix, right, got_right),
        ("the child, forked again", torch.cat((prefix, right), 1), left[:, :5], got_both[:1]),
        ("the grandchild", torch.cat((prefix, right), 1), right[:, :5], got_both[1:]),
    ):
        expected = subject.expected(torch.cat((past, tokens), 1))[:, past.shape[1] :]
        held.see(got, expected, f"{case}, tokens from {past.shape[1]} on")
    for slot in (parent, child, grandchild):
        engine.store.release(slot)
    leaked = engine.store.allocated_bytes
    verdict = held.verdict(
        name, lambda _: "something of a sequence is kept outside its state (an attribute, a global)"
    )
    return replace(
        verdict,
        passed=bool(verdict.passed) and leaked == 0,
        detail=f"{verdict.detail}, {leaked} bytes left after release",
    )


def check_rollback(subject: Subject) -> Check:
    """Rejected tokens leave no trace: after rollback the state goes on as if never extended."""
    held = Comparison()
    # By replay two of the cases will do, and more single tokens: inputs are folded among them.
    plain = [(*case, 0, [1, 2, 18]) for case in ((4, 4), (4, 1), (3, 2), (1, 1))]
    ringed = [(*case, n, [1, *[1] * 12, 18]) for case in ((4, 4), (3, 2))
              for n in subject.replays if n]  # fmt: skip
    for taken, back, replay, sizes in plain + ringed:
        engine = subject.engine(2, 96, lookback=4, replay=replay)
        slots = [engine.store.add(), engine.store.add()]
        prefix, drafts, rest = (subject.tokens(2, n, n) for n in (29, taken, sum(sizes)))
        engine.extend(slots, prefix)
        engine.extend(slots, drafts)
        for slot in slots:
            engine.store.rollback(slot, back)
        got = subject.run(engine, slots, rest, sizes)
        kept = torch.cat((prefix, drafts[:, : taken - back], rest), 1)
        expected = subject.expected(kept)[:, -rest.shape[1] :]
        case = f"{taken} tokens drafted after 29, {back} rolled back, then"
        held.see(got, expected, f"{case} by replay of {replay}" if replay else case)
    return held.verdict(
        "rollback",
        lambda _: (
            "`each` of put is not the value after every single token, in their order; or, by "
            "replay, the inputs that state_spec declares do not give it anew"
        ),
    )


def check_gradients(subject: Subject) -> Check:
    """Every parameter gets a finite gradient, and not all of it zero, of the next token's loss or
    of one that a mixer leaves.
    """
    model = subject.spec.build(seed=subject.seed)
    tokens, shared = subject.tokens(2, 33), asking_losses()
    logits = model.logits(model.hidden_states(tokens[:, :-1], shared=shared))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.stack([loss, *losses_left(shared)]).sum().backward()
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    return Check("gradients", not bad, f"missing or not finite: {', '.join(bad) or 'none'}")


def check_bfloat16(subject: Subject) -> Check:
    """A model of bfloat16 answers as float32 does on the same weights, forward and extend, up to
    what these weights are worth: `_rounding`. Where rows are picked this is judged over the
    tokens that pick them all.
    """
    return _narrow(subject, torch.bfloat16)


def check_float16(subject: Subject) -> Check:
    """As bfloat16, in a format that ends at 65504: nothing overflows."""
    return _narrow(subject, torch.float16)


def _narrow(subject: Subject, dtype: torch.dtype) -> Check:
    name = short(dtype)
    model = cast(subject.spec.build(seed=subject.seed), dtype)
    wide = cast(_copy(model, subject.spec), torch.float32)
    overflow = _overflow(subject, model, wide, dtype)
    if overflow:
        return Check(name, False, overflow)
    tokens = subject.tokens(2, _unpicked(model))
    with torch.inference_mode():
        expected = wide(tokens)
        forward = model(tokens)
    engine = Engine(model, max_sequences=2, max_context=41, page_size=5)
    slots = [engine.store.add(), engine.store.add()]
    logits = subject.run(engine, slots, tokens, _pieces(tokens.shape[1]))
    errors = [_rms_error(forward, expected), _rms_error(logits, expected)]
    limit = _rounding(subject, model, tokens, expected)
    detail = (
        f"rms error forward {errors[0]:.1e}, extend {errors[1]:.1e} (limit {limit:.1e}, that of "
        "float32 with weights and activations rounded once)"
    )
    return Check(name, max(errors) <= limit, detail)


#: Models with weights that are off; the limit in 16 bits is the root mean square of their errors.
DRAWS = 4


@torch.inference_mode()
def _rounding(subject: Subject, model: Model, tokens: Tensor, expected: Tensor) -> float:
    """The rms error in float32 where every 16-bit weight is off by up to half a unit in its last
    place, as rounding leaves it, times √2: activations are rounded as well, and err apart.

    What rounding makes of an answer depends on the architecture and on its weights: a norm
    enlarges errors of a small vector without bound, and a state with strengths near 2 keeps them.
    So the model itself says how exact an answer can be.
    """
    generator, squares = torch.Generator().manual_seed(subject.seed), []
    for _ in range(DRAWS):
        other = cast(_copy(model, subject.spec), torch.float32)
        for weight, held in zip(other.parameters(), model.parameters(), strict=True):
            if held.dtype != torch.float32:
                off = torch.rand(weight.shape, generator=generator) - 0.5
                weight.mul_(1 + torch.finfo(held.dtype).eps * off)
        squares.append(_rms_error(other(tokens), expected) ** 2)
    return (2 * sum(squares) / DRAWS) ** 0.5


def _unpicked(model: Model, most: int = 41) -> int:
    """Tokens up to which no mixer has a choice among rows. In half precision other rows are picked:
    a choice is not continuous, so beyond these no error follows from rounding alone.
    """
    tensors = [t for block in model.layers for t in block.mixer.state_spec().rows]
    return min([most, *(t.picks * t.every for t in tensors if t.picks is not None)])


def _pieces(length: int) -> list[int]:
    """A split of so many tokens with single ones, short and long pieces."""
    sizes, left = [], length
    for size in (length // 2, 1, 1, 3, length):
        sizes.append(min(size, left))
        left -= sizes[-1]
    return [size for size in sizes if size]


def _overflow(subject: Subject, model: Model, wide: Model, dtype: torch.dtype) -> str:
    """The first layer and token whose output is not finite in `dtype`; empty: there is none."""
    x = subject.inputs(2, 41, dtype)
    shared: tuple[Shared, Shared] = ({}, {})
    with torch.inference_mode():
        for layer, (block, other) in enumerate(zip(model.layers, wide.layers, strict=True)):
            y = block.mixer(x.clone(), shared[0])
            truth = other.mixer(x.float(), shared[1])
            bad = (~y.isfinite()).flatten(2).any(-1).any(0).nonzero()
            if len(bad):
                return (
                    f"{subject.label(layer)}: forward is not finite from token {int(bad[0])} on "
                    f"(float32 gives at most {float(truth.abs().max()):.1e}); likely cause: a sum, "
                    f"square or exponential beyond {torch.finfo(dtype).max:.0f}; take float32 there"
                )
    return ""


def _copy(model: Model, spec: ModelSpec) -> Model:
    other = spec.build(seed=0)
    other.load_state_dict(model.state_dict())
    return other


def _rms_error(got: Tensor, expected: Tensor) -> float:
    wide = expected.double()
    error = ((got.double() - wide).square().mean() / wide.square().mean()).sqrt()
    return float(error) if torch.isfinite(error) else float("inf")


def check_kernels(subject: Subject) -> Check:
    """On a GPU our kernels, prefill and graphs included, give what the torch forms give."""
    name = "triton equals torch"
    if not torch.cuda.is_available():
        return Check(name, None, "not measured: this machine has no CUDA device")
    model = subject.spec.build(seed=subject.seed, device="cuda", dtype=torch.bfloat16)
    try:
        found = agreement(model, backend=resolve_backend("triton", torch.device("cuda")))
    except NoFormError as why:
        # A form that refuses the shape is one that the law is about.
        if why.__cause__ is not None:
            raise
        return Check(name, None, f"not measured: {why}")
    detail = f"largest relative error {found.error:.1e} in bfloat16 (limit {found.limit:.1e})"
    return Check(name, found.holds, detail)
