"""`mamba3` equals the paper's recurrence, token by token in float64; splits, angles and options.

mamba-ssm's own step and forward disagree, so that the oracle here is written from the equations.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.errors import UserError
from archs.mamba3 import Mamba3, Mamba3Config
from archs.mixer import Place
from archs.registry import ModelSpec
from archs.sizes import get_scale
from kernels.trapezoid.torch import accumulated
from tests.archs.recurrent import mixer_steps

#: Absolute and relative, in float64.
TOLERANCE = 1e-9
D = 24
SHAPES = [
    pytest.param({}, id="siso"),
    pytest.param({"groups": 2, "rope_fraction": 1.0}, id="siso-groups-all-turn"),
    pytest.param({"rope_fraction": 0.0}, id="siso-none-turns"),
    pytest.param({"a_floor": 0.8}, id="siso-floor"),
    pytest.param({"rank": 2, "groups": 2}, id="rank-2-groups"),
    pytest.param({"rank": 4, "state_dim": 10}, id="rank-4"),
]


def mixer_of(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba3:
    """Every parameter random, those that start as constants included."""
    config = Mamba3Config(**{"n_heads": 4, "head_dim": 6, "state_dim": 8, **options})
    mixer = Mamba3(config, Place(d_model=D, n_layers=1, layer=0, siblings=(0,)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith(".weight"):
                parameter.normal_(0.0, 2 * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(0.3, 0.6, generator=generator)
    return mixer.to(dtype)


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, D, generator=generator, dtype=torch.float64).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@torch.no_grad()
def by_the_paper(mixer: Mamba3, x: Tensor) -> Tensor:
    """The recurrence of a complex state of one head and one token after another.

    A turning pair of states is a complex number that α and e^{iθ} multiply; here B and C are real
    and the state itself turns, where the mixer turns B and C.
    """
    c, w = mixer.config, dict(mixer.named_parameters())
    heads, n, p, rank, share = c.n_heads, c.state_dim, c.head_dim, c.rank, c.n_heads // c.groups
    inner, shared = heads * p, rank * c.groups * n
    projected = (x.double() @ w["inputs.weight"].double().T).split(
        [inner, inner, shared, shared, heads, heads, heads, mixer.sizes.angles], -1
    )
    ones = torch.ones(rank, inner, dtype=torch.float64)
    mimo_x, mimo_z, mimo_o = (w.get(f"mimo_{name}", ones).double() for name in "xzo")
    found = torch.zeros(*x.shape[:2], inner, dtype=torch.float64)
    for b in range(len(x)):
        z, u, key, query, dt, a, trap, theta = (part[b] for part in projected)
        for h in range(heads):
            state = torch.zeros(n, p, dtype=torch.float64)
            before = torch.zeros(n, p, dtype=torch.float64)
            channels = slice(h * p, (h + 1) * p)
            for t in range(x.shape[1]):
                step = F.softplus(dt[t, h] + w["dt_bias"][h].double())
                rate = -F.softplus(a[t, h]).clamp(min=c.a_floor)
                alpha, lam = (step * rate).exp(), torch.sigmoid(trap[t, h])
                turn = (math.pi * theta[t].tanh() * step).tolist()
                now = torch.zeros(n, p, dtype=torch.float64)
                columns = []
                for r in range(rank):
                    at = (r * c.groups + h // share) * n
                    k = norm(key[t, at : at + n], w["B_norm"]) + w["B_bias"][r, h]
                    q = norm(query[t, at : at + n], w["C_norm"]) + w["C_bias"][r, h]
                    v = u[t, channels] * mimo_x[r, channels]
                    now += k[:, None] * v
                    columns.append((q, v))
                carried = turned_back(alpha * (state + (1 - lam) * step * before), turn)
                state = carried + lam * step * now
                before = now
                for r, (q, v) in enumerate(columns):
                    y = q @ state + w["D"][h] * v
                    gate = z[t, channels] * mimo_z[r, channels]
                    found[b, t, channels] += mimo_o[r, channels] * y * F.silu(gate)
    return found @ w["out.weight"].double().T


def turned_back(state: Tensor, angles: list[float]) -> Tensor:
    """Pairs of rows of [N, P] turned by minus an angle each: Rᵀ of the paper's rotation."""
    state = state.clone()
    for i, angle in enumerate(angles):
        even, odd = state[2 * i].clone(), state[2 * i + 1].clone()
        cos, sin = math.cos(angle), math.sin(angle)
        state[2 * i], state[2 * i + 1] = cos * even + sin * odd, cos * odd - sin * even
    return state


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 21, 70])
@torch.inference_mode()
def test_forward_and_steps_equal_the_recurrence(options: dict[str, Any], tokens: int) -> None:
    """70 tokens are two chunks, and more with several columns."""
    mixer, x = mixer_of(seed=tokens, **options), inputs(2, tokens)
    expected = by_the_paper(mixer, x)
    close(mixer(x), expected)
    close(mixer_steps(mixer, x, [1] * tokens), expected)


@pytest.mark.parametrize("options", SHAPES)
@torch.inference_mode()
def test_float32_is_within_the_tolerance_of_published_code(options: dict[str, Any]) -> None:
    mixer = mixer_of(seed=3, dtype=torch.float32, **options)
    x = inputs(2, 40, torch.float32)
    expected = by_the_paper(mixer, x).float()
    close(mixer(x), expected, 1e-4)
    close(mixer_steps(mixer, x, [31, *[1] * 9]), expected, 1e-4)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize(
    "sizes",
    [[64, 36], [1, 9, 90], [10, 1, 1, 30, 9, 49], [99, 1], [5] * 20],
    ids=lambda s: "-".join(map(str, s[:6])),
)
@torch.inference_mode()
def test_any_split_equals_one_forward(options: dict[str, Any], sizes: list[int]) -> None:
    mixer, x = mixer_of(seed=5, **options), inputs(3, 100)
    close(mixer_steps(mixer, x, sizes), mixer(x))


@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_are_those_of_the_recurrence(rank: int) -> None:
    """Central differences of every kind of parameter, against the chunked form's backward."""
    mixer, x = mixer_of(seed=7, rank=rank), inputs(1, 9)
    weights = torch.randn(9, D, dtype=torch.float64)
    (mixer(x)[0] * weights).sum().backward()
    for name, parameter in mixer.named_parameters():
        direction = torch.randn_like(parameter)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                found.append(float((by_the_paper(mixer, x)[0] * weights).sum()))
                parameter -= sign * 1e-6 * direction
        assert parameter.grad is not None, name
        expected = (found[0] - found[1]) / 2e-6
        slope = float((parameter.grad * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@torch.inference_mode()
def test_angles_stay_right_over_fifty_thousand_tokens_of_large_ones() -> None:
    """Float32 angles of one pass and of many extends are those of an exact sum."""
    tokens, generator = 50_000, torch.Generator().manual_seed(1)
    theta = 1 + torch.randn(1, tokens, 2, generator=generator)
    step = 4 + 4 * torch.rand(1, tokens, 3, generator=generator)
    turns = (theta.tanh() / 2).unsqueeze(2) * step.unsqueeze(3)
    exact = turns.double().cumsum(1)
    assert float(exact.abs().max()) > 50_000

    def apart(found: Tensor) -> float:
        away = (found.double() - exact).remainder(1)
        return float(torch.minimum(away, 1 - away).max())

    whole = accumulated(theta, step, None)
    assert whole.dtype == torch.float32 and 0 <= float(whole.min()) <= float(whole.max()) <= 1
    assert apart(whole) < 1e-7
    pieces, held = [], None
    for at in range(0, tokens, 100):
        pieces.append(accumulated(theta[:, at : at + 100], step[:, at : at + 100], held))
        held = pieces[-1][:, -1]
    assert apart(torch.cat(pieces, 1)) < 5e-6
    assert apart(turns.cumsum(1)) > 1e-3


@torch.inference_mode()
def test_a_split_after_fifty_thousand_tokens_of_large_angles_is_right() -> None:
    """In float32: a long prefill, then pieces and single tokens, against one forward."""
    mixer = mixer_of(seed=9, dtype=torch.float32, n_heads=1, head_dim=4, state_dim=4)
    mixer.dt_bias.fill_(3.0)
    x = inputs(1, 50_040, torch.float32)
    expected = mixer(x)[:, -40:]
    got = mixer_steps(mixer, x, [50_000, 20, *[1] * 20])[:, -40:]
    close(got, expected, 1e-4)


def options_after(**options: Any) -> dict[str, Any]:
    spec = mixer_of(**options).state_spec()
    return {tensor.name: tensor.shape for tensor in spec.fixed}


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({}, {"ssm": (4, 8, 6), "last": (1, 56), "angle": (4, 2)}),
        ({"rope_fraction": 1.0}, {"ssm": (4, 8, 6), "last": (1, 56), "angle": (4, 4)}),
        ({"rope_fraction": 0.0}, {"ssm": (4, 8, 6), "last": (1, 56)}),
        ({"rank": 4}, {"ssm": (4, 8, 6), "last": (1, 152), "angle": (4, 2)}),
        ({"groups": 2}, {"ssm": (4, 8, 6), "last": (1, 56), "angle": (4, 2)}),
    ],
    ids=["siso", "all-turn", "none-turns", "rank-4", "groups"],
)
def test_what_is_remembered_follows_the_options(
    options: dict[str, Any], state: dict[str, Any]
) -> None:
    assert options_after(**options) == state


@torch.inference_mode()
def test_without_rotation_it_equals_one_whose_angles_are_zero() -> None:
    """And the angles matter where they are not."""
    turning, still = mixer_of(seed=2), mixer_of(seed=4, rope_fraction=0.0)
    x = inputs(2, 30)
    apart = turning(x)
    angles = turning.sizes.angles
    weights = dict(turning.named_parameters())
    weights["inputs.weight"][-angles:] = 0
    for name, parameter in still.named_parameters():
        source = weights[name]
        parameter.copy_(source[:-angles] if name == "inputs.weight" else source)
    close(still(x), turning(x))
    assert float((apart - turning(x)).abs().max()) > 0.1


@torch.inference_mode()
def test_one_column_is_several_that_are_alike() -> None:
    """Columns with x as equal shares and outputs as equal shares give what one of them gives."""
    one, many = mixer_of(seed=6), mixer_of(seed=8, rank=4)
    weights, s = dict(one.named_parameters()), one.sizes
    for name, parameter in many.named_parameters():
        if name.startswith("mimo"):
            parameter.fill_(1.0 if name == "mimo_z" else 0.25)
        elif name == "inputs.weight":
            z_x, b, c, rest = weights[name].split((2 * s.inner, s.n, s.n, 3 * s.heads + s.angles))
            parameter.copy_(torch.cat((z_x, *[b] * 4, *[c] * 4, rest)))
        else:
            parameter.copy_(weights[name])
    many.D.mul_(4)
    x = inputs(2, 30)
    close(many(x), one(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "n_heads=4 is not divisible by groups=3"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rope_fraction": 1.5}, r"rope_fraction=1\.5 is no share of the states; take 0 to 1"),
        ({"dt_min": 0.0}, r"dt_min=0\.0 must be"),
        ({"dt_min": 0.5}, r"dt_min=0\.5 is more than dt_max=0\.1"),
        ({"a_floor": 0.0}, r"a_floor=0\.0 must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mamba3Config(**{"n_heads": 4, "head_dim": 8, "state_dim": 8, **options})


def test_step_sizes_begin_where_they_are_told_to() -> None:
    for options, low, high in (({}, 1e-3, 0.1), ({"dt_min": 0.1, "dt_max": 1.0}, 0.1, 1.0)):
        model = ModelSpec(
            arch="mamba3", scale=get_scale("nano"), overrides={"mamba3": options}
        ).build(seed=1)
        found = torch.cat([F.softplus(block.mixer.dt_bias.detach()) for block in model.layers])
        assert float(found.min()) >= 0.99 * low and float(found.max()) <= 1.01 * high
        assert float(found.max()) > 2 * float(found.min())
