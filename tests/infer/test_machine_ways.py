"""Any history once more where steps are compiled, and where kernels run and graphs are replayed."""

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from torch import Tensor

from archs.errors import UserError
from infer.counted import Counted
from infer.engine import Engine
from infer.graphs import GraphedStep
from tests.infer.recorded import Again
from tests.infer.test_machine import CONTEXT, KEPT, KINDS, SLOTS, Machine, drive
from tests.kernels.interpreter import interpreted


class CompiledMachine(Machine):
    """Steps of one token and of three go through compiled code, but where rows lie apart."""

    #: Numbers of new tokens that are compiled.
    compiled = (1, 3)

    engines: ClassVar[dict[str, Engine]] = {}
    lookback = 2

    def engine_of(self, data: st.DataObject) -> Engine:
        # One for all histories of a kind: compiling takes seconds.
        if self.kind not in self.engines:
            self.engines[self.kind] = Engine(
                self.model, max_sequences=SLOTS, max_context=CONTEXT, page_size=4,
                lookback=self.lookback, kept=KEPT, compiled=True,
            )  # fmt: skip
        store = self.engines[self.kind].store
        # Which page is taken next must not depend on the histories before: it decides what a
        # failed step has overwritten.
        for table in store.tables.values():
            table._pages = Counted(table.n_pages)
        if store.slots is not None:
            store.slots._slots = Counted(len(store.slots.refs) - 1, first=1)
        return self.engines[self.kind]

    def run(self, slots: list[int], tokens: Tensor, counts: list[int]) -> list[Tensor]:
        if tokens.shape[1] not in self.compiled or set(counts) != {tokens.shape[1]}:
            return super().run(slots, tokens, counts)
        before = self.books()
        try:
            return list(self.engine.verify(slots, tokens).logits.clone())
        except UserError as error:
            assert "lie apart" in str(error) and self.books() == before
            return super().run(slots, tokens, counts)


class DeviceMachine(Machine):
    """The store as kernels read it, in Triton's interpreter; short steps are recorded and replayed
    in batches padded to a bucket.
    """

    backend = "triton"
    page_sizes = st.sampled_from([16, 32, 64])

    def engine_of(self, data: st.DataObject) -> Engine:
        engine = super().engine_of(data)
        if data.draw(st.booleans(), "graphs"):
            engine.graphed = GraphedStep(engine.model, engine.store, recorder=Again)
        return engine

    def run(self, slots: list[int], tokens: Tensor, counts: list[int]) -> list[Tensor]:
        if set(counts) != {tokens.shape[1]}:
            return super().run(slots, tokens, counts)
        return list(self.engine.verify(slots, tokens).logits.clone())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("fast_algorithms")
@pytest.mark.parametrize(
    ("kind", "lookback"),
    [("rows", 0), ("window 3, sinks 1", 2), ("delta rule", 0), ("state and window", 2)],
)
def test_compiled_steps_give_what_recomputing_gives(kind: str, lookback: int) -> None:
    class OfKind(CompiledMachine):
        kinds = (kind,)
        engines: ClassVar[dict[str, Engine]] = {}

    OfKind.lookback = lookback

    drive(OfKind, 30, 25)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_what_recomputing_gives(kind: str) -> None:
    class OfKind(DeviceMachine):
        kinds = (kind,)

    with interpreted():
        drive(OfKind, 3, 10)
