"""The laws in their order, the cause before its consequences."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from archs.errors import UserError
from archs.registry import entry_of, layer_names
from eval.proof.conformance import declared, laws
from eval.proof.conformance.subject import CHECK_SCALE, Subject
from eval.proof.conformance.verdict import Check, explain


class Law(NamedTuple):
    """A law, and the laws without which it says nothing."""

    check: Callable[[Subject], Check]
    needs: tuple[str, ...] = ()


RUNS = ("forward", "declared state")
SPLITS = ("split law",)

LAWS: dict[str, Law] = {
    "forward": Law(declared.check_forward),
    "declared state": Law(declared.check_state, ("forward",)),
    "causality": Law(laws.check_causality, ("forward",)),
    "batch independence": Law(laws.check_batch, ("forward",)),
    "split law": Law(laws.check_split_law, (*RUNS, "causality", "batch independence")),
    "batch and padding invariance": Law(laws.check_padding, SPLITS),
    "fork, then diverge": Law(laws.check_fork, SPLITS),
    "rollback": Law(laws.check_rollback, SPLITS),
    "declared = allocated bytes": Law(declared.check_bytes, RUNS),
    "declared = counted cost": Law(declared.check_cost, RUNS),
    "state in few bits": Law(declared.check_kept, ("declared = allocated bytes",)),
    "undeclared memory": Law(declared.check_memory, RUNS),
    "gradients": Law(laws.check_gradients, ("forward",)),
    "bfloat16": Law(laws.check_bfloat16, SPLITS),
    "float16": Law(laws.check_float16, SPLITS),
    "triton equals torch": Law(laws.check_kernels, SPLITS),
}


def run_checks(arch: str, seed: int = 0) -> Iterator[Check]:
    """All laws for one architecture, in order.

    A law that raises is broken; one that needs a broken law is not judged (passed None).
    Raises UserError where there is no such architecture.
    """
    try:
        subject = Subject(arch, seed=seed)
    except UserError:
        raise
    except Exception as error:
        yield Check("build", False, explain(error, _files(arch)))
        yield from (Check(name, None, "not judged: the model cannot be built") for name in LAWS)
        return
    broken: dict[str, str] = {}
    for name, law in LAWS.items():
        cause = next((broken[n] for n in law.needs if n in broken), None)
        if cause is not None:
            broken[name] = cause
            yield Check(name, None, f"not judged: '{cause}' is broken, mend that first")
            continue
        verdict = judge(subject, name)
        if verdict.passed is False:
            broken[name] = name
        yield verdict


def judge(subject: Subject, name: str) -> Check:
    """One law's verdict; a mixer may fail in any way, and the verdict says where it did."""
    try:
        return LAWS[name].check(subject)
    except Exception as error:
        return Check(name, False, explain(error, subject.files))


def _files(arch: str) -> set[str]:
    """The source files of the mixers that an architecture names."""
    mixers = {entry_of(name).mixer for name in layer_names(arch, CHECK_SCALE.n_layers)}
    return {sys.modules[mixer.__module__].__file__ or "" for mixer in mixers}
