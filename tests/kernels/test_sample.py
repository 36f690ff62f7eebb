"""Greedy and top-p tokens against float64 oracles in the interpreter, and compiled ahead."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.sampling.sample as module
from infer.sampling import Sampler, Sampling
from kernels.sampling import nucleus
from kernels.sampling.nucleus import NO_TOKEN
from kernels.sampling.sample import greedy_ref, nucleus_ref, top_p_ref
from tests.kernels.interpreter import interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: How near to a boundary of the distribution function a uniform number may err.
TOLERANCE = 1e-6


def embedded(logits: Tensor) -> Tensor:
    """The same logits as a view whose surroundings are NaN."""
    wide = torch.full((logits.shape[0], logits.shape[1] + 19), torch.nan, dtype=logits.dtype)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


def draw(logits: Tensor, uniform: Tensor, **how: float) -> Tensor:
    with interpreted():
        got = module.top_p(logits, uniform, **how)
    assert got.dtype == torch.int64 and got.shape == uniform.shape
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 63, 1000, 4096, 10001])
def test_greedy_finds_the_largest(vocabulary: int, dtype: torch.dtype) -> None:
    logits = embedded((torch.randn(3, vocabulary) - 4).to(dtype))
    with interpreted():
        got = module.greedy(logits)
    assert got.dtype == torch.int64
    assert torch.equal(got, greedy_ref(logits)) and torch.equal(got, logits.argmax(-1))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.full((6, 9000), -2.0)
    logits[0, [8999, 4097, 5000]] = 3.0
    logits[1] = float("-inf")
    logits[2, 7], logits[2, 9] = -0.0, 0.0
    logits[3, [4095, 4096]] = float("inf")
    logits[4, 8999] = -1.5
    logits[5, 1:] = float("-inf")
    with interpreted():
        assert module.greedy(logits).tolist() == [4097, 0, 7, 4095, 8999, 0]


NUCLEI = [(0.7, 0.9), (1.3, 0.5), (1.0, 1.0), (0.2, 0.999), (5.0, 0.05)]


def assert_exactly_the_nucleus_is_kept(logits: Tensor, **how: float) -> list[int]:
    """Just inside both ends of each kept token's share, so that no other may have any."""
    share = nucleus_ref(logits, **how)[0]
    kept = torch.nonzero(share > 8 * TOLERANCE)[:, 0]
    ends = share.cumsum(0)[kept]
    inside = torch.cat((ends - share[kept] + 2 * TOLERANCE, ends - 2 * TOLERANCE))
    got = draw(logits.expand(len(inside), -1), inside.float(), **how)
    assert got.tolist() == kept.tolist() * 2
    return kept.tolist()


@pytest.mark.parametrize(("temperature", "top_p"), NUCLEI)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exactly_the_nucleus_is_kept(temperature: float, top_p: float, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(1, 18)).to(dtype)
    assert_exactly_the_nucleus_is_kept(logits, temperature=temperature, top_p=top_p)


@pytest.mark.parametrize(("temperature", "top_p"), NUCLEI[:3])
@pytest.mark.parametrize("vocabulary", [1, 65, 1000, 5003, 9008])
def test_draws_what_the_oracle_draws(vocabulary: int, temperature: float, top_p: float) -> None:
    how = {"temperature": temperature, "top_p": top_p}
    logits = embedded(3 * torch.randn(3, vocabulary) - 1)
    if vocabulary % 16 == 0:
        logits = logits.contiguous()
    uniform = torch.rand(3)
    bounds = nucleus_ref(logits, **how).cumsum(-1)
    near = (bounds - uniform[:, None]).abs().amin(-1) < TOLERANCE
    expected = top_p_ref(logits, uniform, **how)
    assert not near.all()
    assert torch.equal(draw(logits, uniform, **how)[~near], expected[~near])


@pytest.mark.parametrize(
    ("logits", "top_p", "kept"),
    [
        ([0.0] * 4, 0.75, [0, 1, 2]),
        ([0.0] * 4, 0.76, [0, 1, 2, 3]),
        ([0.0, -0.0] * 4, 0.5, [0, 1, 2, 3]),
        ([1.0, 5.0, 1.0, 5.0, 5.0, 1.0], 0.5, [1, 3]),
        ([-1.0, 5.0, -1.0, -1.0], 0.992, [1]),
        ([-1.0, 5.0, -1.0, -1.0], 0.994, [0, 1]),
        ([-1.0, -1.0, -1.0, 5.0], 0.994, [0, 3]),
        ([2.0, 9.0, 9.0], 1e-12, [1]),
    ],
    ids=str,
)
def test_of_equal_tokens_the_first_are_kept(
    logits: list[float], top_p: float, kept: list[int]
) -> None:
    rows = torch.tensor([logits])
    assert assert_exactly_the_nucleus_is_kept(rows, temperature=1.0, top_p=top_p) == kept


def test_equal_tokens_across_many_turns_of_the_loop() -> None:
    # The last token has half of the mass; of the others the first 3000 have 3/8 of what is kept.
    logits = torch.zeros(4, 5001)
    logits[:, -1] = math.log(5000)
    uniform = torch.tensor([0.0, 0.30005, 0.37495, 0.37505])
    got = draw(logits, uniform, temperature=1.0, top_p=0.79995)
    assert got.tolist() == [0, 2400, 2999, 5000]
    assert torch.equal(got, top_p_ref(logits, uniform, temperature=1.0, top_p=0.79995))


def test_frequencies_match_the_probabilities() -> None:
    how = {"temperature": 0.9, "top_p": 0.85}
    logits, draws = torch.randn(1, 12), 40
    # Evenly spaced numbers: no frequency is then off by more than a draw.
    uniform = (torch.arange(draws) + 0.5) / draws
    got = draw(logits.expand(draws, -1), uniform, **how)
    frequency = torch.bincount(got, minlength=12) / draws
    expected = nucleus_ref(logits, **how)[0]
    assert (frequency - expected).abs().max() <= 1 / draws + TOLERANCE
    assert (frequency[expected == 0] == 0).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("vocabulary", [50, 4000])
def test_the_torch_form_keeps_and_draws_what_the_oracle_does(vocabulary: int, top_p: float) -> None:
    logits, uniform = 2 * torch.randn(3, vocabulary), torch.rand(3)
    how = {"temperature": 0.8, "top_p": top_p}
    kept, expected = nucleus.nucleus(logits, **how), nucleus_ref(logits, **how)
    assert torch.equal(kept > 0, expected > 0)
    torch.testing.assert_close(kept, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(nucleus.draw(kept, uniform), top_p_ref(logits, uniform, **how))


def test_rounding_keeps_no_token() -> None:
    for order in ([0.3, 0.1, 0.1, 0.5], [0.1, 0.5, 0.1, 0.3], [0.5, 0.3, 0.1, 0.1]):
        rows = torch.tensor([order]).log()
        how = {"temperature": 1.0, "top_p": 0.8}
        kept = assert_exactly_the_nucleus_is_kept(rows, **how)
        assert sorted(order[v] for v in kept) == [0.3, 0.5]
        assert torch.nonzero(nucleus.nucleus(rows, **how)[0])[:, 0].tolist() == kept


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocabulary", [5, 5000])
def test_where_logits_decide_no_token_there_is_none(vocabulary: int, bad: float) -> None:
    logits, uniform = torch.randn(3, vocabulary), torch.rand(3)
    logits[1, vocabulary - 2] = bad
    how = {"temperature": 0.9, "top_p": 0.9}
    if bad == -math.inf:
        logits[1] = bad
    drawn = [draw(logits, uniform, **how), nucleus.draw(nucleus.nucleus(logits, **how), uniform)]
    for tokens in drawn:
        assert (tokens == NO_TOKEN).tolist() == [False, True, False]
    with interpreted():
        chosen = [module.greedy(logits), nucleus.greedy(logits), greedy_ref(logits)]
    for tokens in chosen:
        assert (tokens == NO_TOKEN).tolist() == [False, math.isnan(bad), False]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.7), (1e-40, 0.9), (1e-40, 1.0), (1e37, 1.0)]
)
def test_extremes(temperature: float, top_p: float) -> None:
    how, inf = {"temperature": temperature, "top_p": top_p}, float("inf")
    logits = torch.tensor([[-inf, 3.0, -inf, 2.0], [-inf, -inf, -inf, -3e38], [3e38, 0, -3e38, 0]])
    last = torch.full((3,), 1 - 2**-24)
    assert torch.equal(draw(logits, last, **how), top_p_ref(logits, last, **how))


def test_an_empty_batch_launches_nothing() -> None:
    with interpreted():
        assert module.greedy(torch.zeros(0, 5)).shape == (0,)
        got = module.top_p(torch.zeros(0, 5), torch.zeros(0), temperature=1.0, top_p=0.5)
        assert got.shape == (0,)


Change = Callable[[dict[str, Any]], dict[str, Any]]
LOGITS: dict[str, tuple[str, Change]] = {
    "rank": (r"logits=.*\[B, V\]", lambda a: {"logits": a["logits"][0]}),
    "dtype": ("logits=.*bfloat16", lambda a: {"logits": a["logits"].double()}),
    "strides": ("logits=.*last stride 1", lambda a: {"logits": torch.zeros(9, 2).T}),
    "no tokens": ("V=0 must be 1 to 262144", lambda a: {"logits": torch.zeros(2, 0)}),
    "vocabulary": ("V=262145 must be 1", lambda a: {"logits": torch.zeros(1, 1).expand(2, 262145)}),
}
REFUSALS = LOGITS | {
    "uniform shape": (r"uniform=.*\[2\]", lambda a: {"uniform": torch.zeros(1)}),
    "uniform dtype": ("uniform=.*float32", lambda a: {"uniform": torch.zeros(2).double()}),
    "uniform strides": ("uniform=.*contiguous", lambda a: {"uniform": torch.zeros(4)[::2]}),
    "uniform device": ("uniform=.* on cpu", lambda a: {"uniform": torch.zeros(2, device="meta")}),
    "temperature 0": ("temperature=0.0 .*`greedy`", lambda a: {"temperature": 0.0}),
    "temperature": ("temperature=-1.0 must", lambda a: {"temperature": -1.0}),
    "temperature nan": ("temperature=nan must", lambda a: {"temperature": float("nan")}),
    "top_p 0": ("top_p=0 must lie", lambda a: {"top_p": 0}),
    "top_p": ("top_p=1.1 must lie", lambda a: {"top_p": 1.1}),
}


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"logits": torch.zeros(2, 9), "uniform": torch.zeros(2)}
    message, change = REFUSALS[case]
    changed = given | {"temperature": 1.0, "top_p": 0.9} | change(given)
    with interpreted():
        monkeypatch.setattr(type(module.top_p_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.top_p(**changed)
        if case in LOGITS:
            with pytest.raises(ValueError, match=message):
                module.greedy(changed["logits"])


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.greedy(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.top_p(torch.zeros(1, 4), torch.zeros(1), temperature=1.0, top_p=0.5)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_top_k_keeps_what_a_stable_sort_puts_first(k: int) -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, -2.0, 3.0, 0.0], [0.0] * 6, [5.0, -1.0, 2.0, 2.0, -math.inf, 2.0]]
    )
    kept = nucleus.top_k(logits, k)
    for row, own in zip(logits.tolist(), kept.tolist(), strict=True):
        first = sorted(range(6), key=lambda v: -row[v])[:k]
        assert own == [x if v in first else -math.inf for v, x in enumerate(row)]


def test_top_k_leaves_nan_to_be_seen() -> None:
    logits = torch.tensor([[1.0, math.nan, 2.0, 0.0], [math.nan, math.nan, 2.0, 0.0]])
    sampler = Sampler(Sampling(temperature=1.0, top_k=1), torch.device("cpu"))
    assert sampler(logits, torch.tensor([0.5, 0.5])).tolist() == [NO_TOKEN, NO_TOKEN]


def test_kernels_draw_among_the_top_k() -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(temperature=1.5, top_p=0.9, top_k=3)
    with interpreted():
        drawn = Sampler(sampling, torch.device("cpu"), backend="triton")(logits, uniform)
    assert torch.equal(drawn, Sampler(sampling, torch.device("cpu"))(logits, uniform))
    best = logits.topk(3).indices
    assert (best == drawn[:, None]).any(1).all()
    assert (drawn != best[:, 0]).any()
