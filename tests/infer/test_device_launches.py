"""How many kernels a mixer launches for a token, on our kernels in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from archs.registry import REGISTRY
from archs.state import LayerState
from eval.proof.conformance import Subject
from tests.infer.test_device import ARCHS, DELTA_OPTIONS, subject_of
from tests.kernels.interpreter import interpreted


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


class Launches(TorchDispatchMode):
    """Kernels launched, by us or by torch, but for matrix products; views and memory take none."""

    NONE = frozenset({"empty", "new_empty", "linear", "matmul", "mm", "bmm", "addmm"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.NONE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of `InterpretedFunction.run`, whose copies for the host are not a GPU's."""
        self.seen.append(kernel.fn.__name__)
        with _disable_current_modes():
            return RUN(kernel, *args, **kwargs)


RUN = InterpretedFunction.run
#: Picked rows: scales of head weights, latents and index keys written, queries copied to where 16
#: bytes begin, the scan, the selection, which of its rows are seen and where they lie, attention.
#: Blocks: rows and means written, the scan, the selection, the pages of its blocks, two
#: attentions, gates and the sum of three.
#: A convolution between gates: one before it, one after.
#: Low-rank projections, opened between their halves, and the gate of the outputs. Gates of values
#: by channel: a sigmoid and a product.
#: Pooled rows: the norm of the queries' latent, all that is written, attention; of picked ones head
#: weights, index keys, the scan, the selection, and which of its rows are seen, too.
MORE_LAUNCHES = {
    "dsa": 17, "nsa": 13, "shortconv": 3, "rwkv7": 5, "kda(channel_gates=true)": 4, "hca": 3,
    "csa": 9,
}  # fmt: skip


@pytest.mark.parametrize("arch", [*(arch for arch in ARCHS if arch in REGISTRY), *DELTA_OPTIONS])
def test_a_mixer_takes_two_launches_beside_its_products_in_decode(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = launches_in_decode(subject_of(arch), monkeypatch)
    assert 1 <= len(launches) <= MORE_LAUNCHES.get(arch, 2), launches


def launches_in_decode(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of the last layer's mixer beside its products, for one token of two sequences."""
    engine, tokens = subject.engine(2, 32), subject.tokens(2, 3)
    slots = [engine.store.add(), engine.store.add()]
    engine.extend(slots, tokens[:, :2])
    launches, mixer = Launches(), subject.model.layers[-1].mixer
    extend = mixer.extend

    def watched(x: Tensor, state: LayerState) -> Tensor:
        with launches, monkeypatch.context() as patched:
            patched.setattr(
                InterpretedFunction, "run", lambda kernel, *a, **k: launches.launch(kernel, *a, **k)
            )
            return extend(x, state)

    monkeypatch.setattr(mixer, "extend", watched)
    engine.extend(slots, tokens[:, 2:])
    return launches.seen


@pytest.mark.parametrize("arch", ["gqa", "swa"])
def test_learned_sinks_take_no_launch(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(**options: Any) -> list[str]:
        subject = subject_of(arch)
        subject.spec = replace(subject.spec, overrides={arch: options})
        subject.model = subject.spec.build()
        return launches_in_decode(subject, monkeypatch)

    assert launches(learned_sinks=True) == launches()
