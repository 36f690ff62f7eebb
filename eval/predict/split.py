"""One model on several GPUs of a machine (tensor parallel): memory, work and traffic of each.

Matrices are divided evenly, vectors are held whole, and state is divided into the shards that its
declaration names (`archs.spec.TensorSpec`): KV heads, heads, channels; every GPU holds and reads
whole what has none, like MLA's latent. Each block's mixer and MLP end in an all-reduce of the new
tokens' activations, as does the embedding, and the logits are gathered. Collectives run in a ring,
after the work that they wait for: nothing overlaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from archs.backbone import Block, Model
from archs.cost import Cost, OpCost, Step, state_traffic
from archs.ops.matrix import weights_of
from archs.spec import StateSpec
from eval.predict.accelerators import Hardware
from eval.predict.calls import StepCalls
from eval.predict.roofline import step_ms
from eval.results.accelerators import Link


@dataclass(frozen=True, slots=True)
class Split:
    """A model on `gpus` GPUs of one kind, a power of two up to its heads.

    replay: inputs in a ring from which recurrent states are computed anew; 0: none. calls: its
    launches, where they are counted (None: one for each operation).
    """

    model: Model
    part: Hardware
    gpus: int
    replay: int = 0
    calls: StepCalls | None = None

    @property
    def weight_bytes(self) -> int:
        """Weights in the memory of each."""
        return sum(
            ceil(w.nbytes / self.gpus) if len(w.shape) > 1 else w.nbytes
            for w in weights_of(self.model)
        )

    def state_bytes(self, context: int) -> int:
        """State of one sequence in the memory of each."""
        specs = self.model.state_specs()
        return sum(spec.split(self.gpus).state_bytes(context, replay=self.replay) for spec in specs)

    def cost(self, step: Step) -> Cost:
        """What each GPU moves and computes in a step."""
        before, after = (
            [self._share(op, 1.0) for op in end.ops] for end in self.model.cost_around(step)
        )
        return Cost.of(*before, *self._layer_ops(step), *after)

    def _layer_ops(self, step: Step) -> Iterator[OpCost]:
        for block in self.model.layers:
            held = self._state_share(block, step)
            yield from (self._share(op, held) for op in block.cost(step).ops)

    def _state_share(self, block: Block, step: Step) -> float:
        """The part of a layer's state traffic that one GPU has."""
        spec = block.mixer.kept_spec()
        moved = [_moved(s, step) for s in (spec, spec.split(self.gpus))]
        return moved[1] / moved[0] if moved[0] else 1.0

    def _share(self, op: OpCost, held: float) -> OpCost:
        """A product's weights and all work on heads are divided; norms are everyone's."""
        moves_state = op.state_read_bytes + op.state_write_bytes
        work = self.gpus if op.rows or moves_state else 1
        return replace(
            op,
            matrix_flops=ceil(op.matrix_flops / work),
            vector_flops=ceil(op.vector_flops / work),
            weight_bytes=ceil(op.weight_bytes / (self.gpus if op.rows else 1)),
            state_read_bytes=ceil(op.state_read_bytes * held),
            state_write_bytes=ceil(op.state_write_bytes * held),
        )

    def tpot_ms(self, batch: int, context: int) -> float:
        """Predicted time per token, collectives included."""
        cost = self.cost(Step(batch, 1, context, replay=self.replay))
        calls = self.calls.at(context) if self.calls else None
        return step_ms(cost, self.part.roofline, calls=calls) + self.link_ms(batch)

    def link_ms(self, batch: int) -> float:
        """Time of a step's collectives."""
        link = self.part.link
        if self.gpus == 1 or link is None:
            return 0.0
        vocabulary, d_model = self.model.embedding.weight.shape
        row_bytes = batch * self.model.norm.weight.element_size()
        reduces = 1 + sum(1 if block.mlp is None else 2 for block in self.model.layers)
        reduce_us = all_reduce_us(link, self.gpus, row_bytes * d_model)
        return (reduces * reduce_us + gather_us(link, self.gpus, row_bytes * vocabulary)) / 1e3


def all_reduce_us(link: Link, gpus: int, moved_bytes: float) -> float:
    """A ring's time to add up `moved_bytes` of each GPU: twice around, a share of them each hop."""
    hops = 2 * (gpus - 1)
    return link.start_us + hops * (link.hop_us + moved_bytes / gpus / (link.gbyte_per_s * 1e3))


def gather_us(link: Link, gpus: int, moved_bytes: float) -> float:
    """A ring's time to give every GPU all of `moved_bytes`, of which each has its share."""
    hops = gpus - 1
    return link.start_us + hops * (link.hop_us + moved_bytes / gpus / (link.gbyte_per_s * 1e3))


def _moved(spec: StateSpec, step: Step) -> int:
    """Bytes of state that a step reads and writes."""
    traffic = state_traffic(spec, step)
    return traffic["state_read_bytes"] + traffic["state_write_bytes"]
