"""Any history of steps, forks, rollbacks, releases and failures against recomputing from scratch.

A machine drives one engine and keeps, beside it, nothing but the tokens of each sequence. After
every step the logits of all valid tokens must be those of one `forward` over the whole sequence.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.spec import RECURRENT_LIMIT
from infer.engine import Engine
from infer.kept import Kept, forget, keep, resume
from infer.pages import StoreFullError
from infer.store import StateStore

VOCAB, CONTEXT, SLOTS, KEPT = 31, 56, 4, 2
SCALE = get_scale("tiny").with_options(
    {"d_model": 64, "head_dim": 32, "n_layers": 2, "vocab_size": VOCAB, "seq_len": 16}
)
DATA = Path(__file__).parents[1] / "data"
#: Everything that may be remembered: all rows, a window of them with and without sinks, a latent
#: row, another layer's rows, rows of several tokens, picked rows, recurrent states with a
#: convolution's tail, and mixtures.
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "rows": ("gqa", {}),
    "window 1": ("swa", {"window": 1}),
    "window 3, sinks 1": ("swa", {"window": 3, "sinks": 1}),
    "window 5, sinks 6": ("swa", {"window": 5, "sinks": 6}),
    "window 9": ("swa", {"window": 9}),
    "latent": ("mla", {}),
    "shared rows": ("cla", {}),
    "pooled rows": (str(DATA / "pooled_rows.py"), {}),
    "picked rows": (str(DATA / "picked_rows.py"), {}),
    "picked blocks": ("nsa", {"block": 2, "picks": 3, "window": 3}),
    "retention": ("linear", {}),
    "delta rule": ("gdn", {}),
    "low rank": ("rwkv7", {}),
    "scan": ("mamba1", {}),
    "state and window": ("gdn:swa=1:1", {"window": 4, "sinks": 2}),
    "state and rows": ("mamba2:gqa=1:1", {}),
}


def model_of(kind: str) -> Model:
    """On torch, whatever the last engine of this process put it on."""
    return built(kind).use("torch")


@cache
def built(kind: str) -> Model:
    arch, options = KINDS[kind]
    name = "swa" if "swa" in arch else arch
    overrides = {name: options} if options else {}
    spec = ModelSpec(arch=arch, scale=SCALE, overrides=overrides, hidden=16)
    return spec.build(seed=7).eval()


class Failed(Exception):
    """What an injected failure raises."""


class Machine(RuleBasedStateMachine):
    """One engine, and what its sequences have been told."""

    backend = "torch"
    kinds = tuple(KINDS)
    page_sizes = st.integers(1, 8) | st.sampled_from([1, 13, 16, 56, 64])

    @initialize(data=st.data())
    def open(self, data: st.DataObject) -> None:
        self.kind = data.draw(st.sampled_from(self.kinds), "kind")
        self.model = model_of(self.kind)
        self.engine = self.engine_of(data)
        self.store = self.engine.store
        self.told: dict[int, list[int]] = {}
        #: The shortest length that a rollback must reach.
        self.floor: dict[int, int] = {}
        #: Parts of pasts that were kept, and their tokens.
        self.kept: list[tuple[list[Kept], list[int]]] = []
        self.bounded = any(
            s.fixed or any(t.window is not None for t in s.rows) for s in self.store.specs
        )
        self.seed = 0

    def engine_of(self, data: st.DataObject) -> Engine:
        page_size = data.draw(self.page_sizes, "page_size")
        lookback = data.draw(st.sampled_from([0, 1, 2, 4, 4]), "lookback")
        replay = data.draw(st.sampled_from([0, 2 * (lookback + 1), 16]), "replay")
        engine = Engine(
            self.model, max_sequences=SLOTS, max_context=CONTEXT, page_size=page_size,
            lookback=lookback, replay=replay, kept=KEPT, backend=self.backend,
        )  # fmt: skip
        if self.backend == "torch" and data.draw(st.booleans(), "small pool"):
            most = 2 * -(-CONTEXT // page_size)
            engine.store = StateStore(
                self.model.state_specs(), max_sequences=SLOTS, max_context=CONTEXT,
                page_size=page_size, lookback=lookback, replay=replay, kept=KEPT,
                pages=data.draw(st.integers(1, most), "pages"),
            )  # fmt: skip
        return engine

    # -- sequences ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.told) < SLOTS)
    @rule(prompt=st.integers(0, 30))
    def add(self, prompt: int) -> None:
        slot = self.store.add()
        assert slot not in self.told
        self.told[slot], self.floor[slot] = [], 0
        tokens = torch.randint(VOCAB, (1, prompt), generator=torch.Generator().manual_seed(prompt))
        if prompt:
            self.extend([slot], tokens, [prompt])

    @precondition(lambda self: 0 < len(self.told) < SLOTS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.told)))
        child = self.store.fork(slot)
        assert child not in self.told
        self.told[child], self.floor[child] = list(self.told[slot]), self.floor[slot]

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.told)))
        self.store.release(slot)
        del self.told[slot], self.floor[slot]

    @precondition(lambda self: self.told)
    @rule(data=st.data(), back=st.integers(1, 4) | st.integers(0, 20))
    def rollback(self, data: st.DataObject, back: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.told)))
        length = len(self.told[slot]) - back
        if not self.goes_back(slot, back):
            assert length < (self.floor[slot] if self.bounded else 0)
        else:
            self.told[slot] = self.told[slot][:length]
            self.go_on(slot)

    @precondition(lambda self: self.told and len(self.kept) < 2 * KEPT)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.told)))
        end = len(self.told[slot])
        cut = data.draw(st.integers(0, end // self.store.page_size)) * self.store.page_size
        parts = [
            keep(self.store, slot, 0, cut, whole=False),
            keep(self.store, slot, cut, end, whole=True),
        ]
        self.kept.append((parts, list(self.told[slot])))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        parts, _ = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        for part in parts:
            forget(self.store, part)

    @precondition(lambda self: self.kept and len(self.told) < SLOTS)
    @rule(data=st.data(), early=st.booleans())
    def resume(self, data: st.DataObject, early: bool) -> None:
        """From all of a past, or from its full pages where these are all that is needed."""
        parts, told = data.draw(st.sampled_from(self.kept))
        if early:
            parts = parts[:1]
            end = parts[0].end
            full = all(t.rows(end) % t.page_size == 0 for t in self.store.tables.values())
            if self.bounded or not full:
                with pytest.raises(UserError, match="end with a whole part"):
                    resume(self.store, parts)
                return
        slot = resume(self.store, parts)
        assert slot not in self.told
        self.told[slot] = told[: parts[-1].end]
        self.floor[slot] = parts[-1].end
        self.go_on(slot)

    # -- steps -------------------------------------------------------------------------------

    def some(self, data: st.DataObject) -> tuple[list[int], Tensor, list[int]]:
        """Some sequences in any order, their next tokens [B, K], and how many of them count."""
        slots = data.draw(st.permutations(sorted(self.told)))
        slots = slots[: data.draw(st.integers(1, len(slots)), "batch")]
        room = CONTEXT - max(len(self.told[s]) for s in slots)
        assume(room > 0)
        tokens = min(room, data.draw(st.sampled_from([1, 1, 1, 2, 3, 5, 9, 17]), "tokens"))
        counts = [tokens] * len(slots)
        if data.draw(st.booleans(), "ragged"):
            counts = [data.draw(st.integers(0, tokens), "count") for _ in slots]
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return slots, torch.randint(VOCAB, (len(slots), tokens), generator=generator), counts

    def run(self, slots: list[int], tokens: Tensor, counts: list[int]) -> list[Tensor]:
        """Logits of each sequence's valid tokens."""
        ragged = set(counts) != {tokens.shape[1]}
        logits = self.engine.extend(slots, tokens, torch.tensor(counts) if ragged else None)
        return [row[:count] for row, count in zip(logits, counts, strict=True)]

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        slots, tokens, counts = self.some(data)
        self.extend(slots, tokens, counts)

    def extend(self, slots: list[int], tokens: Tensor, counts: list[int]) -> None:
        """A step that is compared, or that finds the pool full and changes nothing."""
        before = self.books()
        try:
            logits = self.run(slots, tokens, counts)
        except StoreFullError:
            assert self.books() == before
            return
        self.tell(slots, tokens, counts)
        for slot, got in zip(slots, logits, strict=True):
            self.compare(slot, got)

    def go_on(self, slot: int) -> None:
        """One more token for a sequence, where there is room."""
        if len(self.told[slot]) < CONTEXT:
            self.extend([slot], torch.tensor([[len(self.told[slot]) % VOCAB]]), [1])

    def tell(self, slots: list[int], tokens: Tensor, counts: list[int]) -> None:
        lookback, width = self.store.lookback, tokens.shape[1]
        most = RECURRENT_LIMIT if self.store.rings is None else lookback + 1
        kept = lookback if width <= most else 0
        for slot, row, count in zip(slots, tokens.tolist(), counts, strict=True):
            self.told[slot] = self.told[slot] + row[:count]
            if count:
                self.floor[slot] = max(self.floor[slot], len(self.told[slot]) - kept)

    def compare(self, slot: int, got: Tensor) -> None:
        """got: logits [n, V] of the newest n tokens."""
        if len(got):
            with torch.inference_mode():
                expected = self.model.use("torch")(torch.tensor([self.told[slot]]))[0, -len(got) :]
            self.model.use(self.backend)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), layer=st.integers(0, 1), late=st.booleans(), back=st.integers(0, 4))
    def failing_step(self, data: st.DataObject, layer: int, late: bool, back: int) -> None:
        """A step whose layer fails, before or after its work; then perhaps a rollback."""
        slots, tokens, counts = self.some(data)
        mixer = self.model.layers[layer].mixer
        extend = mixer.extend

        def failing(*given: Any) -> Tensor:
            if late:
                extend(*given)
            raise Failed

        mixer.extend = failing  # type: ignore[method-assign]
        try:
            Machine.run(self, slots, tokens, counts)
        except (Failed, StoreFullError):
            pass
        finally:
            del mixer.extend
        for slot in slots:
            self.floor[slot] = len(self.told[slot])
            if self.is_lost(slot):
                assert self.may_be_lost(tokens.shape[1])
                self.store.release(slot)
                del self.told[slot], self.floor[slot]
            elif back and len(self.told[slot]) >= back and self.goes_back(slot, back):
                self.told[slot] = self.told[slot][:-back]
        for slot in set(slots) & set(self.told):
            self.go_on(slot)

    def goes_back(self, slot: int, back: int) -> bool:
        try:
            self.store.rollback(slot, back)
        except UserError:
            return False
        return True

    def is_lost(self, slot: int) -> bool:
        try:
            self.store.rollback(slot, 0)
        except UserError as error:
            assert "was lost in a step that failed" in str(error)
            return True
        return False

    def may_be_lost(self, width: int) -> bool:
        """Where no copy is kept: recurrent states beyond lookback, or those that are replayed;
        windows beyond their ring.
        """
        specs, lookback = self.store.specs, self.store.lookback
        if self.store.rings is not None:
            return True
        fixed = any(s.fixed for s in specs) and width > lookback
        return fixed or (any(t.window for s in specs for t in s.rows) and width > lookback + 1)

    # -- what always holds ---------------------------------------------------------------------

    def books(self) -> object:
        tables = self.store.tables.values()
        return (
            list(self.store.lengths), list(self.store.oldest), self.store.allocated_bytes,
            [([dict(t) for t in table.tables], list(table.refs), list(table.at_home))
             for table in tables],
        )  # fmt: skip

    @invariant()
    def pages_are_held_once_for_each_who_holds_them(self) -> None:
        if not hasattr(self, "store"):
            return
        for table in self.store.tables.values():
            refs = [0] * table.n_pages
            for held in table.tables:
                assert len(set(held.values())) == len(held)
                for page in held.values():
                    refs[page] += 1
            for part in (part for parts, _ in self.kept for part in parts):
                for page in part.pages.get(table.key, {}).values():
                    refs[page] += 1
            assert refs == table.refs
            assert table.used == sum(n > 0 for n in refs)
            for slot, told in self.told.items():
                # No holes: all that a sequence may still see, back to where it may be cut.
                rows, first = table.rows(len(told)), table.first_page[slot]
                pages = -(-rows // table.page_size)
                sunk = range(min(table.sink_pages, pages))
                assert set(table.tables[slot]) == {*sunk, *range(first, pages)}
                assert not self.bounded or (
                    table.every * table.reach(slot) <= self.store.oldest[slot] <= len(told)
                )
        assert {s for s in range(SLOTS) if self.store._open[s]} == set(self.told)
        assert all(self.store.lengths[s] == len(t) for s, t in self.told.items())
        held = [*self.told.values(), *(told for _, told in self.kept)]
        most = sum(self.store.declared_bytes(len(t)) for t in held)
        assert self.store.allocated_bytes <= min(most, self.store.peak_bytes)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for slot in list(self.told):
            self.go_on(slot)
            self.store.release(slot)
        self.told.clear()
        for parts, _ in self.kept:
            for part in parts:
                forget(self.store, part)
        assert self.store.allocated_bytes == 0


def drive(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_any_history_gives_what_recomputing_gives() -> None:
    drive(Machine, 60, 25)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_any_long_history_gives_what_recomputing_gives(kind: str) -> None:
    class OfKind(Machine):
        kinds = (kind,)

    drive(OfKind, 60, 60)
