"""Models, drafts and engines that tests of speculation share."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch

from archs.backbone import Model, first_layers
from archs.heads import HeadModel, MultiTokenHead
from infer.drafts import Drafter, ModelDrafter, PromptLookup
from infer.engine import Engine
from infer.head_drafts import HeadDrafter
from tests.infer.test_machine import model_of

MOST = 8
CPU = torch.device("cpu")


def engine_of(model: Model, *, sequences: int = 3, context: int = 96, **more: int) -> Engine:
    return Engine(model, max_sequences=sequences, max_context=context, **{"lookback": MOST, **more})


def lively(model: Model) -> Model:
    """The same in float64 with larger matrices: as built, greedy choice soon repeats one token."""
    model = deepcopy(model).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not ("embedding" in name or "conv" in name):
                weight *= 2
    return model


def near(model: Model, noise: float = 0.1) -> Model:
    """A draft that is right often, not always: the same model with noise on its matrices."""
    draft = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                scale = noise * weight.std()
                weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return draft


@cache
def headed(model: Model) -> HeadModel:
    """A head of the model's last layer, with the embedding let through beside the hidden state: it
    is right now and then, untrained as it is.
    """
    width = model.embedding.weight.shape[1]
    block = deepcopy(model.layers[0])
    head = MultiTokenHead(width, block.mixer, 0, 1e-5).to(model.embedding.weight.dtype)
    head.block = block
    with torch.no_grad():
        eye = torch.eye(width)
        head.join.weight.copy_(torch.cat((0.3 * eye, eye), 1))
    return HeadModel(model, head)


def random_prompts(count: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab, (1 + 5 * i,), generator=generator).tolist() for i in range(count)]


@cache
def double(kind: str) -> Model:
    return lively(model_of(kind))


DRAFTERS: dict[str, Callable[[Model, int], Drafter]] = {
    "a model": lambda model, n: ModelDrafter(engine_of(near(model), sequences=n)),
    "its first layer": lambda model, n: ModelDrafter(
        engine_of(first_layers(model, 1), sequences=n)
    ),
    "the context": lambda model, n: PromptLookup(device=CPU),
    "its head": lambda model, n: HeadDrafter(engine_of(headed(model), sequences=n)),
}


class Cycling:
    """Each length in turn, so that sequences of a batch draft unlike numbers."""

    def __init__(self, first: int) -> None:
        self.length = first

    def next(self) -> int:
        self.length = self.length % (MOST + 1) + 1
        return self.length - 1

    def saw(self, drafted: int, kept: int) -> None:
        pass
