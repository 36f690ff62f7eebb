"""How a server is opened, and the load it is put under: the plan of a serving measurement."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from archs.backbone import Model
from archs.backends import AUTO
from archs.checks import at_least, positive, some
from archs.errors import UserError
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from eval.measure.decode_plans import require_backend, require_untrained
from eval.measure.served import Limits, Log
from eval.measure.workload import Conversation, Users, Voice, Workload, load_workload
from infer.capacity import Capacity
from infer.memory import DoesNotFitError
from infer.policy import PAGED, Policy
from infer.scheduler import SCHEDULERS
from infer.sequence import Answer
from infer.server import Server, drive
from infer.turns import Executor

#: Shares of the largest throughput at which requests are sent, until it is too much.
SHARES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
#: Requests of a sweep for each sequence that may run at once, at least: fewer never queue up.
FILLS = 10
#: Of all requests, those waiting when the last one arrives, from which on a rate is too much.
TOO_MANY = 0.1
GIB = 2**30
#: Fields of a plan that stand in the rows' options where they are not the default.
APART = (
    "requests", "memory_gib", "max_context", "page_size", "token_budget", "prefix_cache",
    "checkpoint_every", "checkpoints", "drafts", "slo_ttft_ms", "slo_tpot_ms",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """Serving one workload at one scale, by one or several policies in turn.

    workload: the name of one that ships, a TOML file, or a trace; requests: of it, instead of its
      own number (0).
    memory_gib: of weights and state together; 0: state for all sequences at full length.
    max_sequences: that run at once, at most. max_context: 0: what the workload needs.
    batching, allocation, token_budget, prefix_cache, checkpoint_every: as `infer.policy.Policy`'s.
    checkpoints: of prefixes that are provided for beside what sequences hold that run.
    drafts: K, from n-grams of each answer's own context, verified in every step (0: none).
    repeats: of everything, policies taking turns; figures are medians over them.
    rates_per_s: instead of the workload's arrivals, Poisson ones at these mean rates.
    sweep: at shares of the largest throughput, until over it; with more requests where the
      workload's own number, and not `requests`, would never fill the server.
    slo_ttft_ms, slo_tpot_ms: what goodput asks of a request.
    weights, state: as `DecodePlan`'s.
    """

    scale: str
    workload: str = "chat"
    requests: int = 0
    memory_gib: float = 0.0
    max_sequences: int = 8
    max_context: int = 0
    page_size: int = 64
    token_budget: int = 256
    batching: tuple[str, ...] = ("continuous",)
    allocation: str = PAGED
    prefix_cache: bool = False
    checkpoint_every: int = 0
    checkpoints: int = 0
    drafts: int = 0
    repeats: int = 1
    rates_per_s: tuple[float, ...] = ()
    sweep: bool = False
    slo_ttft_ms: float = 1000.0
    slo_tpot_ms: float = 100.0
    backend: str = AUTO
    weights: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        get_scale(self.scale)
        require_backend(self.backend)
        require_untrained(self.weights)
        StateFormat.named(self.state)
        _ = self.load
        some(self, "batching")
        positive(self, "slo_ttft_ms", "slo_tpot_ms", "rates_per_s")
        at_least(self, 1, "max_sequences", "page_size", "repeats")
        at_least(self, 0, "memory_gib", "max_context", "requests", "checkpoints")
        for batching in self.batching:
            self.policy(batching)
        if self.sweep and self.repeats > 1:
            raise UserError(f"repeats={self.repeats} with sweep=true: each would find other rates")
        if self.rates_per_s and self.sweep:
            raise UserError("rates_per_s with sweep=true: a sweep finds its rates; give one")

    @property
    def load(self) -> Workload:
        """What users send. Raises UserError on anything that is off."""
        found = load_workload(self.workload)
        return replace(found, requests=self.requests) if self.requests else found

    @property
    def limits(self) -> Limits:
        """What goodput asks of a request."""
        return Limits(ttft_ms=self.slo_ttft_ms, tpot_ms=self.slo_tpot_ms)

    def words(self, batching: str = "", load: Workload | None = None) -> str:
        """What sets the figures of a run apart from others of the same model and scale."""
        words = [f"workload={Path(self.workload).name}"]
        words += [f"{name}={getattr(self, name):g}" for name in APART if self._differs(name)]
        words += [f"allocation={self.allocation}"] * (self.allocation != PAGED)
        words += [f"batching={batching}"] * bool(batching)
        if load is not None and load.rate_per_s:
            words.append(f"rate_per_s={load.rate_per_s:.4g}")
        return " ".join(words)

    def _differs(self, name: str) -> bool:
        defaults = {f.name: f.default for f in fields(self)}
        return bool(getattr(self, name) != defaults[name])

    def policy(self, batching: str) -> Policy:
        """One of the policies."""
        return Policy(
            batching=batching, token_budget=self.token_budget, allocation=self.allocation,
            prefix_cache=self.prefix_cache, checkpoint_every=self.checkpoint_every,
            drafts=self.drafts,
        )  # fmt: skip

    def shares(self, workload: Workload) -> bool:
        """Whether sequences hold pages that others computed."""
        return self.prefix_cache or workload.answers > 1

    def context(self, workload: Workload) -> int:
        """Tokens of a sequence at most, in whole pages."""
        # An answer near its end may be drafted beyond it.
        most = self.max_context or longest(workload) + self.drafts
        return -(-most // self.page_size) * self.page_size

    def capacity(self, model: Model, workload: Workload, weight_bytes: int) -> Capacity:
        """What the memory holds beside the weights. Raises DoesNotFitError."""
        left = None if not self.memory_gib else self.memory_gib * GIB - weight_bytes
        if left is not None and left <= 0:
            raise DoesNotFitError(
                f"memory_gib={self.memory_gib:g} does not hold the weights of "
                f"{weight_bytes / GIB:.3g} GiB; give more memory, or take a smaller scale"
            )
        return Capacity.of(
            model.state_specs(), max_sequences=self.max_sequences,
            max_context=self.context(workload), page_size=self.page_size, memory_bytes=left,
            typical_tokens=typical(workload), checkpoints=self.checkpoints,
            lookback=self.drafts,
        )  # fmt: skip


def longest(workload: Workload) -> int:
    """Tokens that the longest sequence of a workload holds."""
    return max(
        sum(map(sum, talk.turns)) + _opening(workload, talk) for talk in workload.conversations()
    )


def typical(workload: Workload) -> int:
    """Tokens that a sequence of a workload holds when half of its answer is made, on average."""
    held = []
    for talk in workload.conversations():
        past = _opening(workload, talk)
        for asked, answered in talk.turns:
            held.append(past + asked + answered // 2)
            past += asked + answered
    return round(sum(held) / len(held))


def _opening(workload: Workload, talk: Conversation) -> int:
    return workload.system_tokens if talk.system >= 0 else 0


@dataclass(frozen=True, slots=True)
class Served:
    """One run of a server: what came of every request, and of the server."""

    answers: list[Answer]
    log: Log
    saturated: bool


def serve(
    executor: Executor, capacity: Capacity, policy: Policy, workload: Workload, voice: Voice,
    *, keep_schedule: bool = False,
) -> Served:  # fmt: skip
    """Serve a workload once."""
    scheduler = SCHEDULERS[policy.batching](capacity, policy)
    log = Log(scheduler, keep_schedule)
    answers = drive(Server(scheduler, executor), Users(workload, voice), log)
    return Served(answers, log, _saturated(answers))


def _saturated(answers: Sequence[Answer]) -> bool:
    """Whether requests that come one by one had built up a queue when the last one arrived."""
    last_s = max(a.request.arrival_s for a in answers)
    if last_s == 0:
        return False
    asked = [a for a in answers if a.leader is None]
    waiting = sum(a.admitted_s is not None and a.admitted_s > last_s for a in asked)
    return waiting > max(1, TOO_MANY * len(asked))


def loads(
    plan: ServePlan, workload: Workload, run: Callable[[Workload], Served]
) -> Iterator[tuple[Workload, Served]]:
    """The workload as it is, at the plan's rates, or swept: each rate until one is too much."""
    if plan.rates_per_s:
        for rate in plan.rates_per_s:
            at_rate = workload.at_rate(rate)
            yield at_rate, run(at_rate)
        return
    if not plan.sweep:
        yield workload, run(workload)
        return
    if not plan.requests and not workload.trace:
        workload = replace(workload, requests=max(workload.requests, FILLS * plan.max_sequences))
    full = workload if workload.trace else replace(workload, arrivals="once")
    served = run(full)
    most = served.log.figures(served.answers, plan.limits).get("request_per_s")
    if most is None:
        why = next((a.note for a in served.answers if a.note), "nobody was answered")
        raise UserError(f"no request of the workload was served, so there is no rate: {why}")
    for share in SHARES:
        at_rate = workload.at_rate(share * most)
        found = run(at_rate)
        yield at_rate, found
        if found.saturated:
            return


def uneven(lengths: Sequence[int], batch: int) -> float:
    """E[max of B lengths] / E[length] over batches in order: what static batching loses."""
    batches = [max(lengths[i : i + batch]) for i in range(0, len(lengths) - batch + 1, batch)]
    if not batches:
        return float("nan")
    return sum(batches) / len(batches) / (sum(lengths) / len(lengths))


def batch_sizes(most: int) -> tuple[int, ...]:
    """Batches whose rates a server of so many sequences is predicted by."""
    return tuple(dict.fromkeys((*(1 << n for n in range(most.bit_length())), most)))
