"""Where speculation pays: predicted speed-up over batch, context and draft length.

A round drafts K tokens one by one and verifies K + 1 at once; at an acceptance α it yields
(1 - α^(K+1)) / (1 - α) tokens. Each step takes the roofline's time (`eval.predict.roofline`). At a
small batch verification reads the weights that a plain step reads and costs little more; at a large
one it is bound by compute, or each sequence's own state is, and drafts cost what they save.
"""

from collections.abc import Iterable, Sequence
from itertools import product

from archs.backbone import Model
from archs.checks import require_some
from archs.cost import Step
from archs.errors import UserError
from archs.heads import HEAD, HeadModel
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.spec import require_replay
from eval.predict.accelerators import hardware_of
from eval.predict.calls import StepCalls
from eval.predict.roofline import (
    Prediction,
    calls_on,
    outline_on,
    require_grid,
    resident_bytes,
    room,
    step_ms,
    stored_as,
)
from infer.draft_length import expected_tokens, require_drafts
from infer.speculate import require_lossless


def speculate(
    target: str, draft: str | None, *, scale: str, draft_scale: str | None = None,
    acceptance: float, hardware: Iterable[str] = ("h100",), batches: Iterable[int] = (1,),
    contexts: Iterable[int] = (4096,), drafts: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
    dtype: str = "bfloat16", launch_us: float | None = None, replay: int = 0, weights: str = "",
    state: str = "",
) -> list[Prediction]:  # fmt: skip
    """One row per part, batch and context: the K of the largest speed-up, or 0 where none pays.

    draft: an architecture at `draft_scale`; "mtp", a head of the target (`archs.heads`); None:
    drafts that cost nothing (the context).
    acceptance: the probability that a draft is right, behind right ones. replay: inputs in a ring
    from which recurrent states are computed anew; 0: a copy of each in reach is kept. weights,
    state: the target's, as `predict`'s; a draft is plain.
    `max_drafts` is the largest K that is at least as fast as plain decode. Weights and states of
    both must fit, states with what K tokens of rollback take. Raises UserError on unknown names and
    values that cannot be.

    A head's own launches are not counted on a CPU, where those of all else are.
    """
    if not 0 <= acceptance <= 1:
        raise UserError(f"acceptance={acceptance} must lie between 0 and 1")
    parts, batches, contexts = list(hardware), list(batches), list(contexts)
    require_grid(hardware=parts, batches=batches, contexts=contexts)
    require_some("drafts", drafts)
    require_drafts(drafts)
    require_replay(replay, max(drafts))
    stored, dtype = stored_as(weights, dtype)
    rows: list[Prediction] = []
    widths = {b * (k + 1) for b in batches for k in (0, *drafts)}
    for part in (hardware_of(key, dtype, sorted(widths), launch_us) for key in parts):
        spec = ModelSpec(arch=target, scale=get_scale(scale))
        part, model = outline_on(part, spec, stored, state)
        rates = part.roofline
        require_lossless(model)
        plainly, verified = (calls_on(part, spec, stored, state, n) for n in (0, replay))
        helper: Model | None = None
        drafted: StepCalls | None = None
        if draft == HEAD:
            helper = HeadModel(model, spec.head(rates.dtype))
            drafted = calls_on(part, spec, None, replay=replay, head=True)
        elif draft is not None:
            helper_scale = get_scale(draft_scale or scale)
            helper_spec = ModelSpec(arch=draft, scale=helper_scale)
            helper = helper_spec.outline(rates.dtype)
            drafted = calls_on(part, helper_spec, None, replay=replay)
            if helper.vocab_size != model.vocab_size:
                raise UserError(
                    f"the draft's vocabulary of {helper.vocab_size} tokens at scale "
                    f"{helper_scale.name} is not the target's of {model.vocab_size} at {scale}; "
                    "take scales of one vocabulary"
                )
        for batch, context in product(batches, contexts):
            plain_ms = step_ms(
                model.cost(Step(batch, 1, context)), rates, calls=_made(plainly, context, 1)
            )
            speedups: dict[int, float] = {}
            for k in sorted(drafts):
                cost = model.cost(Step(batch, k + 1, context, k, replay), all_logits=True)
                spent = step_ms(cost, rates, calls=_made(verified, context, k + 1))
                if helper is not None:
                    first, further = (
                        step_ms(
                            helper.cost(Step(batch, tokens, context, k, replay), all_logits=True),
                            rates,
                            calls=_made(drafted, context, tokens),
                        )
                        for tokens in (first_tokens(helper, k + 1), 1)
                    )
                    spent += first + (k - 1) * further
                speedups[k] = expected_tokens(acceptance, k) * plain_ms / spent
            best = max(speedups, key=lambda k: speedups[k])
            weight_bytes = resident_bytes(model)
            state_bytes = model.state_bytes(context, lookback=best, replay=replay)
            rollback = state_bytes - model.state_bytes(context)
            if helper is not None:
                weight_bytes += resident_bytes(helper, beside=model)
                state_bytes += helper.state_bytes(context, lookback=best, replay=replay)
            sequences = room(part, weight_bytes, state_bytes)
            fits = sequences is None or sequences >= batch
            pays = speedups[best] > 1
            rows.append(
                {
                    "arch": target, "scale": scale, "hardware": part.key, "batch": batch,
                    "context": context,
                    "weight_format": model.weight_format, "state_format": model.state_format,
                    "draft": _name(draft, draft_scale or scale),
                    "acceptance": acceptance, "drafts": best if pays else 0,
                    "tokens_per_verification": expected_tokens(acceptance, best),
                    "speedup_pred": speedups[best] if fits else None,
                    "max_drafts": max((k for k, s in speedups.items() if s >= 1), default=0),
                    "replay": replay, "rollback_bytes": rollback,
                    "plain_tpot_ms": plain_ms if fits else None,
                    "launches_from": part.launches_from, "fits": fits,
                    "note": "" if fits else "does not fit",
                }
            )  # fmt: skip
    return rows


def _made(calls: StepCalls | None, context: int, new_tokens: int) -> int | None:
    """Launches of a step, where they are counted."""
    return calls.at(context, new_tokens) if calls else None


def first_tokens(draft: Model, settled: int) -> int:
    """Tokens that the first step of a proposal reads: the two newest, or what the last round
    settled, which a head reads all.
    """
    return settled if isinstance(draft, HeadModel) else 2


def _name(draft: str | None, scale: str) -> str:
    return "context" if draft is None else draft if draft == HEAD else f"{draft}@{scale}"
