"""The chunked head loss against torch's unchunked one, in values and in gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.loss import cross_entropy
from kernels.loss.cross_entropy import IGNORED, linear_cross_entropy, token_losses

CLASSES, DIM = 37, 12


def make(rows: int, dtype: torch.dtype = torch.float32, ignored: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, DIM, generator=generator, dtype=dtype)
    weight = torch.randn(CLASSES, DIM, generator=generator, dtype=dtype)
    targets = torch.randint(CLASSES, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return [hidden.requires_grad_(), weight.requires_grad_(), targets]


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float) -> list[Tensor]:
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(F.linear(h, w), targets)
    return [loss.detach(), *torch.autograd.grad(loss * factor, (h, w))]


@pytest.fixture(params=[False, True], ids=["one-chunk", "small-chunks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 5)
        monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("ignored", [0.0, 0.7], ids=["all-rows", "few-rows"])
@pytest.mark.parametrize("rows", [1, 63, 131])
@pytest.mark.usefixtures("chunking")
def test_equals_torch(rows: int, ignored: float) -> None:
    hidden, weight, targets = make(rows, ignored=ignored if rows > 1 else 0.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 3.0).backward()
    for ours, theirs in zip(
        (loss.detach(), hidden.grad, weight.grad),
        reference(hidden, weight, targets, 3.0),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunking")
def test_float64_stays_float64() -> None:
    hidden, weight, targets = make(13, torch.float64, ignored=0.3)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets)

    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


def test_hopeless_targets_have_exact_losses() -> None:
    # Probabilities of e^-400 underflow float32; their losses must not.
    hidden = torch.tensor([[200.0], [-200.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    targets = torch.tensor([1, 1])
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(200.0)
    assert token_losses(hidden, weight, targets).tolist() == pytest.approx([400.0, 0.0])


@pytest.mark.usefixtures("chunking")
def test_token_losses_are_torchs_with_zeros_where_ignored() -> None:
    hidden, weight, targets = make(63, ignored=0.4)
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    losses = token_losses(hidden, weight, targets)
    torch.testing.assert_close(losses, expected.detach())
    assert not losses.requires_grad


def test_autocast_rounds_products_only() -> None:
    hidden, weight, targets = make(63)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = reference(hidden, weight, targets, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert loss.item() != pytest.approx(exact[0].item(), abs=1e-6)
    for ours, theirs in zip((hidden.grad, weight.grad), exact[1:], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=2e-3, rtol=2e-2)


def test_no_target_gives_nan_as_torch_does() -> None:
    hidden, weight, targets = make(5)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    assert loss.isnan()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "names"),
    [
        ((4, 3), (9, 5), (4,), r"hidden \(4, 3\) and weight \(9, 5\)"),
        ((2, 2, 3), (9, 3), (4,), r"hidden \(2, 2, 3\)"),
        ((4, 3), (9, 3), (5,), r"targets \(5,\)"),
    ],
    ids=["width", "rank", "rows"],
)
def test_shapes_that_do_not_fit_raise(hidden, weight, targets, names) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=names):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64)
        )
