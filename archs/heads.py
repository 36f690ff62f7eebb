"""A head that predicts the token after the next one: a draft that reads the model's own states.

One block reads, at each position, the trunk's final hidden state and the embedding of the token
that came of it, each normed, joined by a matrix (multi-token prediction of depth one: DeepSeek-V3,
arXiv 2412.19437, equations 21 to 24; its hidden state here is the normed one). Embedding and head
are the trunk's. It is trained with the trunk (`train.heads`) and drafts for it
(`infer.head_drafts`); further tokens come of its own hidden states in the trunk's place.
"""

import torch
from torch import Tensor, nn

from archs.backbone import Block, Model
from archs.cost import Cost, OpCost, Step, linear_cost
from archs.errors import UserError
from archs.layers import Projection, RMSNorm
from archs.mixer import Mixer
from archs.ops.matrix import rows_of

#: What a head is called as a draft, as a trunk's part while both are trained, and in a checkpoint.
HEAD = "mtp"


class MultiTokenHead(nn.Module):
    """The head's own parameters. hidden: its MLP's width, 0 for none."""

    def __init__(self, d_model: int, mixer: Mixer, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_hidden = RMSNorm(d_model, norm_eps)
        self.norm_token = RMSNorm(d_model, norm_eps)
        self.join = Projection(2 * d_model, d_model)
        self.block = Block(d_model, mixer, hidden, norm_eps)
        self.norm = RMSNorm(d_model, norm_eps)


class HeadModel(Model):
    """A trunk and its head as a model of one layer; all weights are shared with them.

    Its tokens are those that follow the positions of the hidden states that are given with them.
    """

    def __init__(self, trunk: Model, head: MultiTokenHead) -> None:
        nn.Module.__init__(self)
        self.embedding, self.head = trunk.embedding, trunk.head
        self.norm_hidden, self.norm_token = head.norm_hidden, head.norm_token
        self.join = head.join
        self.blocks = nn.ModuleList([head.block])
        self.norm = head.norm
        self.vocab_size = trunk.vocab_size
        self.weight_format = trunk.weight_format
        mlp = head.block.mlp
        self._widths = [0 if mlp is None else mlp.hidden]
        self.use(trunk.backend)

    def embed(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """As `Model.embed`."""
        self.require_hidden(tokens, hidden)
        assert hidden is not None
        embedded = rows_of(self.embedding.weight, tokens)
        return self.join(torch.cat((self.norm_hidden(hidden), self.norm_token(embedded)), -1))

    def require_hidden(self, tokens: Tensor, hidden: Tensor | None) -> None:
        """As `Model.require_hidden`; they must be [B, K, D] for tokens [B, K]."""
        wanted = [*tokens.shape, self.embedding.weight.shape[1]]
        if hidden is None or list(hidden.shape) != wanted:
            given = "none" if hidden is None else list(hidden.shape)
            raise UserError(
                f"a head of {wanted} inputs got hidden states of shape {given}; give those of its "
                "own trunk, one for each token"
            )

    def cost(self, step: Step, *, all_logits: bool = False) -> Cost:
        """As `Model.cost`."""
        norms = (self.norm_hidden, self.norm_token)
        size = sum(n.weight.numel() for n in norms)
        own = OpCost(
            name="norms of the head's inputs", vector_flops=4 * step.tokens * size,
            weight_bytes=sum(n.weight.nbytes for n in norms),
        )  # fmt: skip
        join = linear_cost("join of hidden state and token", self.join, step.tokens)
        return super().cost(step, all_logits=all_logits) + Cost.of(own, join)
