"""Compare what a mixer declares with what it does: shapes, state, bytes, FLOPs, memory.

No count here is made from the declaration that it is compared with: bytes are those of tensors
that exist and that an operation reads, FLOPs those of operations that run.
"""

import gc
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archs.backbone import cast
from archs.cost import Cost, OpCost, Step, state_traffic
from archs.mixer import Mixer, Shared
from archs.spec import RECURRENT_LIMIT
from archs.state_formats import StateFormat
from archs.storage import keep
from eval.proof.conformance.recorded import Recorded, Use
from eval.proof.conformance.subject import Subject
from eval.proof.conformance.tally import Tally
from eval.proof.conformance.verdict import Check, StateFault, place_of, short
from infer.store import StateStore

#: Steps whose cost is counted: (batch, context, new tokens).
STEPS = ((2, 33, 1), (1, 20, 4), (2, 9, 40), (1, 0, 33))
#: Vector FLOPs are declared to first order: at most this factor from what is counted.
VECTOR_SLACK = 2.0
#: Single-token steps, none of which may leave more memory behind than the one before.
QUIET_STEPS = 6
#: Formats that every state takes.
KEPT = StateFormat.named("kv:int8,memory:int8,conv:int8")
#: Attributes that torch itself keeps on a module.
MODULE_TABLES = frozenset(vars(torch.nn.Module()))


def check_forward(subject: Subject) -> Check:
    """Every mixer's forward runs and keeps shape and dtype."""
    name, x = "forward", subject.inputs(2, 9)
    shared: Shared = {}
    with torch.inference_mode():
        for mixer in subject.mixers:
            y = mixer(x.clone(), shared)
            require_alike(mixer, "forward", y, x)
    return Check(name, True, f"[2, 9, {x.shape[-1]}] -> the same in {len(subject.mixers)} layers")


def check_state(subject: Subject) -> Check:
    """Every declared tensor is stored and read as declared, in float32 and bfloat16."""
    name = "declared state"
    narrow = Subject(subject.spec.arch, subject.spec.scale, subject.seed)
    cast(narrow.model, torch.bfloat16)
    tensors = 0
    for each in (subject, narrow):
        uses: list[dict[str, list[Use]]] = [{} for _ in each.mixers]
        for batch, context, new in ((2, 0, 9), *STEPS):
            for layer, (_, recorded) in enumerate(_layers(each, batch, context, new)):
                for tensor, use in recorded.uses.items():
                    uses[layer].setdefault(tensor, []).append(use)
        for layer, (mixer, used) in enumerate(zip(each.mixers, uses, strict=True)):
            lent = {t.name for t in mixer.state_spec().rows if t.owner is not None}
            for tensor, all_uses in used.items():
                owned = tensor not in lent
                tensors += owned
                fault = _unused(all_uses, owned)
                if fault:
                    detail = f"{subject.label(layer)} declares '{tensor}', which no step {fault}"
                    return Check(name, False, detail)
    return Check(name, True, f"{tensors // 2} tensors stored and read as declared")


def _unused(uses: list[Use], owned: bool) -> str | None:
    stored = any(u.stored for u in uses) or not owned
    read = any(u.read for u in uses)
    if stored and read:
        return None
    if not stored and not read:
        return "reads or stores; it costs memory for nothing: leave it out of state_spec"
    if read:
        return "stores: what it reads is always empty; append or put it in every extend"
    return "reads; read it, or leave it out of state_spec"


def check_bytes(subject: Subject) -> Check:
    """Declared bytes equal those of the store's tensors at every length and lookback."""
    name = "declared = allocated bytes"
    for lookback, replay in product((0, 3), subject.replays):
        for page_size in (1, 5, 16):
            engine = subject.engine(
                2, 64, page_size=page_size, lookback=lookback, replay=replay
            )  # fmt: skip
            slots = [engine.store.add(), engine.store.add()]
            tokens = subject.tokens(2, 48)
            start = 0
            for size in (1, 7, 16, 5, 15, 4):
                engine.extend(slots, tokens[:, start : start + size])
                start += size
                held = held_bytes(engine.store)
                declared = 2 * engine.store.declared_bytes(start)
                # A long step leaves fewer values to go back to than single tokens do.
                fewer = lookback > 0 and size > RECURRENT_LIMIT and held < declared
                if held != engine.store.allocated_bytes or not (held == declared or fewer):
                    detail = f"declared {declared}, tensors hold {held}, allocated_bytes "
                    detail += f"{engine.store.allocated_bytes} at {start} tokens, "
                    detail += f"page_size {page_size}, lookback {lookback}, replay {replay}"
                    return Check(name, False, detail)
    return Check(name, True, f"{subject.model.state_bytes(48)} bytes at 48 tokens")


def held_bytes(store: StateStore) -> int:
    """Bytes of the store's tensors that open sequences hold: pages in use, and slots."""
    total = 0
    for layer in store.pools.layers:
        for key, pool, _ in layer.rows.values():
            table = store.tables[key]
            total += pool.nbytes // (table.n_pages + 1) * sum(n > 0 for n in table.refs)
        for name, value in layer.fixed.items():
            held = store.rings if name in layer.inputs else store.slots
            assert held is not None
            total += value[0].nbytes * sum(n > 0 for n in held.refs)
        for inputs in layer.inputs.values():
            assert store.rings is not None
            total += inputs[0].nbytes * sum(n > 0 for n in store.rings.refs)
    return total


def check_cost(subject: Subject) -> Check:
    """Every field of `cost` against what a step is seen to do, layer by layer and in all."""
    name = "declared = counted cost"
    for batch, context, new in STEPS:
        at = Step(batch, new, context)
        where = f"batch {batch}, {new} new tokens after {context}"
        for layer, (tally, _) in enumerate(_layers(subject, batch, context, new)):
            found = _lies(subject.mixers[layer].cost(at), tally, new)
            if found:
                return Check(name, False, f"{subject.label(layer)}, {where}: {found}")
        found = _lies(subject.model.cost(at, all_logits=True), _whole(subject, at), new)
        if found:
            return Check(name, False, f"the whole model, {where}: {found}")
    return Check(name, True, f"bytes and matrix FLOPs equal in {len(STEPS)} steps")


def _lies(cost: Cost, tally: Tally, new: int) -> str:
    """The fields of a cost that differ from what was counted, as a sentence; empty: none."""
    weighted = [op for op in cost.ops if op.rows]
    pairs = {
        "weight_bytes": (cost.weight_bytes, tally.weight_bytes),
        "state_read_bytes": (sum(o.state_read_bytes for o in cost.ops), tally.state_read_bytes),
        "state_write_bytes": (sum(o.state_write_bytes for o in cost.ops), tally.state_write_bytes),
        "matrix_flops": (cost.matrix_flops, tally.matrix_flops),
        "matrix_flops of products with weights (those with rows)": (
            sum(op.matrix_flops for op in weighted), tally.weight_flops
        ),
        "rows (times matrix_flops)": (
            sum(op.matrix_flops * op.rows for op in weighted), tally.weight_flop_rows
        ),
    }  # fmt: skip
    found = [f"{n} {said:,}, counted {seen:,}" for n, (said, seen) in pairs.items() if said != seen]
    said, seen = sum(op.vector_flops for op in cost.ops), tally.vector_flops
    if not seen / VECTOR_SLACK <= said <= seen * VECTOR_SLACK:
        found.append(f"vector_flops {said:,}, counted about {seen:,}")
    return "" if not found else f"cost declares {'; '.join(found)}"


def check_kept(subject: Subject) -> Check:
    """A state in few bits is stored as declared, and its bytes are those that `cost` counts."""
    name, kept = "state in few bits", Subject(subject.spec.arch, subject.spec.scale, subject.seed)
    keep(kept.model, KEPT)
    for batch, context, new in STEPS:
        at = Step(batch, new, context)
        for layer, (mixer, same) in enumerate(zip(subject.mixers, kept.mixers, strict=True)):
            plain, stored = (
                OpCost(name="state", **state_traffic(spec, at)).bytes
                for spec in (mixer.state_spec(), same.kept_spec())
            )
            wanted = mixer.cost(at).state_bytes - plain + stored
            if (found := same.cost(at).state_bytes) != wanted:
                detail = (
                    f"{subject.label(layer)}: cost declares {found:,} bytes of a state kept as "
                )
                detail += f"{same.state_format}, which takes {wanted:,}; count by kept_spec()"
                return Check(name, False, detail)
    engine, tokens = kept.engine(2, 48), kept.tokens(2, 32)
    slots = [engine.store.add(), engine.store.add()]
    logits = [engine.extend(slots, part) for part in tokens.split([20, 1, 1, 10], 1)]
    held, declared = held_bytes(engine.store), 2 * engine.store.declared_bytes(32)
    if held != declared or not torch.cat(logits, 1).isfinite().all():
        detail = f"as {KEPT}: declared {declared} bytes, tensors hold {held}; or logits are not "
        return Check(name, False, detail + "finite")
    return Check(name, True, f"{kept.model.state_bytes(48)} bytes at 48 tokens as {KEPT}")


def check_memory(subject: Subject) -> Check:
    """A step leaves only its state behind: memory that grows with the context is declared."""
    name = "undeclared memory"
    engine = subject.engine(1, 9 + QUIET_STEPS)
    slots = [engine.store.add()]
    tokens = subject.tokens(1, 9 + QUIET_STEPS)
    left: list[int] = []
    with Leftovers() as leftovers:
        engine.extend(slots, tokens[:, :9])
        for at in range(9, 9 + QUIET_STEPS):
            engine.extend(slots, tokens[:, at : at + 1])
            # The first steps may fill caches; what grows after them is a state.
            if at in (10, 8 + QUIET_STEPS):
                gc.collect()
                left.append(leftovers.bytes)
    grown = left[1] - left[0]
    if grown <= 0:
        return Check(name, True, f"no growth over {QUIET_STEPS} tokens")
    holders = ((subject.label(i), _holder(mixer)) for i, mixer in enumerate(subject.mixers))
    where = next((f"{label}: {kept}" for label, kept in holders if kept), "outside the mixers")
    detail = f"{QUIET_STEPS - 2} tokens leave {grown:,} bytes behind ({where}), a state that grows "
    detail += "without bound; declare it in state_spec, and keep it by append or put"
    return Check(name, False, detail)


class Leftovers(TorchDispatchMode):
    """Storages made inside this mode that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []

    @property
    def bytes(self) -> int:
        """Bytes of the storages that somebody still holds."""
        self._made = [(ref, size) for ref, size in self._made if not ref.expired()]
        return sum({ref.cdata: size for ref, size in self._made}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made.append((StorageWeakRef(storage), storage.nbytes()))
        return out


def _holder(mixer: Mixer) -> str | None:
    """The attribute of a mixer, or of a module in it, that keeps the most bytes of tensors."""
    kept = {
        f"self.{f'{path}.{name}' if path else name}": sum(
            t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor)
        )
        for path, module in mixer.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_TABLES
    }
    most = max(kept, key=lambda name: kept[name], default=None)
    return most if most is not None and kept[most] else None


def _layers(
    subject: Subject, batch: int, context: int, new: int
) -> list[tuple[Tally, Recorded]]:  # fmt: skip
    """Each layer's mixer alone for one step: its tally and its state. Counted once for a subject:
    two laws look at the same steps.
    """
    at = (batch, context, new)
    if at not in subject.counted:
        subject.counted[at] = list(_counted(subject, *at))
    return subject.counted[at]


def _counted(
    subject: Subject, batch: int, context: int, new: int
) -> Iterator[tuple[Tally, Recorded]]:  # fmt: skip
    dtype = subject.model.embedding.weight.dtype
    x = subject.inputs(batch, new, dtype)
    with subject.step(batch, context, new) as step:
        for mixer, state in zip(subject.mixers, step.layers, strict=True):
            with Tally([*mixer.parameters(), *mixer.buffers()]) as tally:
                recorded = Recorded(state, mixer.state_spec(), tally, context=context, tokens=new)
                y = mixer.extend(x.clone(), recorded)
            require_alike(mixer, "extend", y, x)
            yield tally, recorded


def _whole(subject: Subject, at: Step) -> Tally:
    """The whole model run for one step, logits of every new token included."""
    model = subject.model
    with subject.step(at.batch, at.context, at.new_tokens) as step, Tally(model.parameters()) as t:
        states = [
            Recorded(state, mixer.state_spec(), t, context=at.context, tokens=at.new_tokens)
            for mixer, state in zip(subject.mixers, step.layers, strict=True)
        ]
        model.extend(subject.tokens(at.batch, at.new_tokens), states)
    return t


def require_alike(mixer: Mixer, method: str, y: Tensor, x: Tensor) -> None:
    """Raise StateFault unless an output has the shape and dtype of its input."""
    if y.shape == x.shape and y.dtype == x.dtype:
        return
    code = getattr(type(mixer), method).__code__
    raise StateFault(
        f"{place_of(code.co_filename, code.co_firstlineno)} in {method}: returns {list(y.shape)} "
        f"{short(y.dtype)} for x {list(x.shape)} {short(x.dtype)}; a mixer keeps both"
    )
