"""What a suite asks of its models in decode: timed steps, speculation, weights in few bits."""

from dataclasses import dataclass

from archs.backends import AUTO, BACKENDS
from archs.checks import at_least, positive, some
from archs.errors import UserError, unknown_name
from archs.heads import HEAD
from archs.sizes import get_scale
from archs.spec import require_replay
from archs.state_formats import StateFormat
from archs.weights import WeightFormat
from infer.draft_length import require_drafts
from infer.sampling import Sampling
from train.distill import Distillation
from train.prune import Plan
from train.sparse import Sparsity, is_sparsity

#: The draft that is the context itself.
CONTEXT = "context"
#: Before a number: the draft that is the target's own first layers.
LAYERS = "layers:"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """Decode over batch × context at one scale.

    prompt: tokens of the prompts that time to first token is measured on (0: not measured).
    no_cache: new tokens generated without any state as the baseline (0: none).
    compiled: compile the decode step; takes a while per architecture, and pays at small sizes.
    backend: one of `archs.backends`, or auto.
    counters: also measure bytes and FLOPs of a step by the GPU's counters (`counters`).
    replay: inputs in a ring from which recurrent states are computed anew; 0: they are written at
      every step.
    weights: the format that weights are stored in (`archs.weights`); "": plain numbers, float32 on
      a CPU and bfloat16 on a GPU.
    state: the format that the state is kept in (`archs.state_formats`), as far as a model has it;
      "": as it is computed.
    """

    scale: str
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (256,)
    steps: int = 16
    prompt: int = 0
    no_cache: int = 0
    compiled: bool = False
    backend: str = AUTO
    counters: bool = False
    replay: int = 0
    weights: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        get_scale(self.scale)
        _require_replay(self, 0)
        StateFormat.named(self.state)
        require_untrained(self.weights)
        if self.counters and self.replay:
            raise UserError("counters=true counts steps that are alike, without replay; take one")
        require_backend(self.backend)
        some(self, "batches", "contexts")
        at_least(self, 1, "batches", "contexts", "steps")
        at_least(self, 0, "prompt", "no_cache")
        if self.no_cache == 1:
            raise UserError("no_cache=1 times no step; set 0 for none, or 2 and more")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculatePlan:
    """Speculative decoding of the trained models, on held-out text.

    draft: "context" (prompt lookup), "layers:N" (the target's own first N), "mtp" (the head that
      was trained with it), or ARCH@SCALE, a model that the suite trains, too.
    targets: architectures of the suite (none: all). drafts: K, one after the other.
    contexts: tokens of the prompts; new_tokens: after each. temperature 0 is greedy.
    adaptive: draft as many as the running acceptance pays for, at most K.
    compiled, backend, replay: as `DecodePlan`'s; 0: a copy of each state in reach is kept.
    state: as `DecodePlan`'s, of target and draft. A target whose recurrent state is rounded at
      every step is `unsupported`: verification would not give the tokens of decode.
    """

    draft: str = CONTEXT
    targets: tuple[str, ...] = ()
    drafts: tuple[int, ...] = (1, 2, 4, 8)
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (64,)
    new_tokens: int = 64
    temperature: float = 0.0
    adaptive: bool = False
    compiled: bool = False
    backend: str = AUTO
    replay: int = 0
    state: str = ""

    def __post_init__(self) -> None:
        require_backend(self.backend)
        StateFormat.named(self.state)
        some(self, "drafts", "batches", "contexts")
        _require_replay(self, max(self.drafts))
        at_least(self, 1, "drafts", "batches", "contexts")
        at_least(self, 2, "new_tokens")
        Sampling(temperature=self.temperature)
        _ = self.drafting
        require_drafts(self.drafts)

    @property
    def head(self) -> bool:
        """Whether the target's own head drafts."""
        return self.draft == HEAD

    @property
    def layers(self) -> int:
        """How many of the target's own layers draft; 0 where something else does."""
        count = self.draft.removeprefix(LAYERS)
        return int(count) if count != self.draft and count.isdecimal() else 0

    @property
    def drafting(self) -> tuple[str, str] | None:
        """Architecture and scale of the draft; None where the context or the target drafts."""
        if self.draft in (CONTEXT, HEAD) or self.layers:
            return None
        arch, _, scale = self.draft.rpartition("@")
        if not arch:
            raise UserError(
                f"draft='{self.draft}' is none of {CONTEXT}, {LAYERS}N, {HEAD} and ARCH@SCALE "
                "(gqa@tiny)"
            )
        get_scale(scale)
        return arch, scale


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressPlan:
    """The trained models with their weights stored, or their state kept, in each of these formats.

    weights: formats, with the way their codes are chosen (`archs.weights`); plain ones are what
      others are held against. state: of states (`archs.state_formats`), as far as a model has them.
    reach: trained lengths that positions go up to, of a state in few bits.
    tasks: of the suite, whose trained models answer in each format, too.
    prune: ways to make the models smaller (`train.prune.Plan`: layers:1,mlp:0.5) or sparse
      (`train.sparse.Sparsity`: 2:4-wanda).
    distil_steps: of training a pruned model on, with its parent, without it, and from scratch; 0:
      none. distil_rate: its learning rate, as a share of the model's own. distil_weight,
      distil_temperature: of the parent's word (`train.distill.Distillation`).
    archs: of the suite (none: all). calibration: sequences of training text, as long as those
      trained on, that codes are chosen by, where the way needs them. steps: timed decode steps of
      one sequence. backend: as `DecodePlan`'s.
    qat_steps, qat_rate: of training with rounded weights, and its learning rate as a share of the
      model's own; a model that goes on as long without rounding is what it is held against.
    """

    weights: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    reach: int = 16
    tasks: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    calibration: int = 64
    steps: int = 32
    backend: str = AUTO
    qat_steps: int = 100
    qat_rate: float = 0.1
    prune: tuple[str, ...] = ()
    distil_steps: int = 100
    distil_rate: float = 0.25
    distil_weight: float = 0.5
    distil_temperature: float = 1.0

    def __post_init__(self) -> None:
        require_backend(self.backend)
        if not (self.weights or self.state or self.prune):
            raise UserError("compress names nothing to do; set weights, state or prune")
        lists = ("weights", "state", "tasks", "prune")
        some(self, *(name for name in lists if getattr(self, name)))
        at_least(self, 0, "distil_steps")
        positive(self, "distil_rate")
        Distillation(temperature=self.distil_temperature, weight=self.distil_weight)
        for name in self.prune:
            _ = Sparsity.named(name) if is_sparsity(name) else Plan.named(name)
        at_least(self, 1, "calibration", "steps", "qat_steps", "reach")
        positive(self, "qat_rate")
        for name in self.weights:
            WeightFormat.named(name)
        for name in self.state:
            StateFormat.named(name)


def _require_replay(plan: "DecodePlan | SpeculatePlan", lookback: int) -> None:
    """Raise UserError for rings too short for so many tokens, or beside compiled steps."""
    require_replay(plan.replay, lookback)
    if plan.replay and plan.compiled:
        raise UserError(
            f"replay={plan.replay} with compiled=true: compiled steps keep copies; take one"
        )


def require_untrained(weights: str) -> None:
    """Raise UserError for a format of weights that random ones cannot be stored in."""
    if weights and (method := WeightFormat.named(weights).method):
        raise UserError(
            f"weights='{weights}': {method} chooses codes of a trained model, and these weights "
            "are random; leave it out"
        )


def require_backend(name: str) -> None:
    """Raise UserError unless `name` is a backend, or auto."""
    if name not in (AUTO, *BACKENDS):
        raise unknown_name("backend", name, (AUTO, *BACKENDS))
