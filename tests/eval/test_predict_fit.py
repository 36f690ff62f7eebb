"""The largest batch under a limit: exact against brute force; one model on several GPUs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from archs.backbone import Model
from archs.cost import Step
from archs.errors import UserError
from archs.formats import Format
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.spec import RowSpec, StateSpec
from eval.cli import api
from eval.cli.options import parse_bytes, parse_latency_ms
from eval.predict.accelerators import hardware_of
from eval.predict.fit import fit, largest, rate_edges
from eval.predict.machine import ProductRate
from eval.predict.roofline import predict, resident_bytes
from eval.predict.split import Split, all_reduce_us, gather_us
from eval.results.accelerators import ACCELERATORS, Link
from tests.eval.conftest import Command

EVERY = (*REGISTRY, *HYBRIDS)


@cache
def outline(arch: str, scale: str) -> Model:
    return ModelSpec(arch=arch, scale=get_scale(scale)).outline(torch.bfloat16)


def split(arch: str, gpus: int, scale: str = "8b") -> Split:
    return Split(outline(arch, scale), hardware_of("h100"), gpus)


# -- the search --


@pytest.mark.parametrize(
    ("arch", "limit_ms", "context", "limited_by"),
    [("gqa", 40, 16384, "time"), ("mla", 200, 65536, "memory"), ("gdn", 4, 1, "time"),
     ("swa", 60, 8192, "time"), ("gqa", 1, 64, "time")],
)  # fmt: skip
def test_on_one_gpu_it_is_the_last_batch_that_predict_finds_good(
    arch: str, limit_ms: float, context: int, limited_by: str
) -> None:
    [row] = fit([arch], tpot_ms=limit_ms, scale="350m", hardware=["l4"], contexts=[context],
                gpus=1, reserve=0.0)  # fmt: skip
    tried = predict([arch], "350m", ["l4"], range(1, 200), [context])
    good = [r["batch"] for r in tried if r["fits"] and float(str(r["tpot_ms"])) <= limit_ms]
    assert len(good) < len(tried)
    assert row["batch"] == (good[-1] if good else None)
    assert row["limited_by"] == limited_by


def test_states_from_inputs_are_found_for_what_they_take() -> None:
    [row] = fit(["gdn"], tpot_ms=8, hardware=["h100"], contexts=[1], gpus=1, reserve=0.0, replay=16)
    tried = predict(["gdn"], "8b", ["h100"], range(1, 300), [1], replay=16)
    good = [r["batch"] for r in tried if r["fits"] and float(str(r["tpot_ms"])) <= 8]
    assert row["batch"] == good[-1] < 299
    [plain] = fit(["gdn"], tpot_ms=8, hardware=["h100"], contexts=[1], gpus=1, reserve=0.0)
    assert int(str(row["batch"])) > int(str(plain["batch"]))


@pytest.mark.parametrize("arch", EVERY)
def test_on_several_gpus_it_is_the_last_batch_that_holds(arch: str) -> None:
    [row] = fit([arch], tpot_ms=5.5, contexts=[131072], memory_bytes=40e9, gpus=8)
    if not row["meets"]:
        pytest.fail(f"{arch}: {row['note']}")
    here, batch = split(arch, int(str(row["gpus"]))), int(str(row["batch"]))
    usable = 40e9 * 0.9

    def holds(batch: int) -> bool:
        used = here.weight_bytes + batch * here.state_bytes(131072)
        return used <= usable and here.tpot_ms(batch, 131072) <= 5.5

    assert holds(batch) and not any(holds(batch + more) for more in (1, 2, 3, batch))
    assert row["used_bytes_per_gpu"] == here.weight_bytes + batch * here.state_bytes(131072)
    assert row["limited_by"] == (
        "memory" if here.weight_bytes + (batch + 1) * here.state_bytes(131072) > usable else "time"
    )
    assert row["tpot_ms"] == here.tpot_ms(batch, 131072)


def test_rates_that_change_with_rows_are_searched_apart() -> None:
    """Products of 8 rows at twice the bandwidth of one: a larger batch holds where 2 does not."""
    part = hardware_of("h100")
    products = (ProductRate(1, 1e12), ProductRate(8, 4e12), ProductRate(64, 1.5e12))
    part = replace(part, roofline=replace(part.roofline, products=products))
    assert rate_edges(part) == [2, 22]
    model = ModelSpec(arch="gqa", scale=get_scale("350m")).outline(torch.bfloat16)
    here = Split(model, part, 1)
    times = {batch: here.tpot_ms(batch, 1024) for batch in range(1, 65)}
    assert times[3] < times[2] and times[23] > times[22]
    for limit in sorted(times.values()):
        wanted = max((b for b, ms in times.items() if ms <= limit), default=0)
        found = largest(lambda batch: here.tpot_ms(batch, 1024) <= limit, 64, rate_edges(part))  # noqa: B023
        assert found == wanted


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("true_up_to", [0, 1, 5, 63, 64, 99])
def test_a_search_ends_at_its_bounds(most: int, true_up_to: int) -> None:
    assert largest(lambda batch: batch <= true_up_to, most, [3, 3, 90]) == min(most, true_up_to)


# -- one model on several GPUs --


@pytest.mark.parametrize("arch", EVERY)
def test_on_one_gpu_a_split_is_the_whole(arch: str) -> None:
    one = split(arch, 1, "1b")
    assert one.cost(Step(3, 1, 777)) == one.model.cost(Step(3, 1, 777))
    assert one.weight_bytes == resident_bytes(one.model)
    assert one.state_bytes(777) == one.model.state_bytes(777)
    [row] = predict([arch], "1b", ["h100"], [3], [777])
    assert one.tpot_ms(3, 777) == pytest.approx(float(str(row["tpot_ms"])))


@pytest.mark.parametrize("arch", EVERY)
@pytest.mark.parametrize("gpus", [2, 8])
def test_a_share_is_at_least_its_part_and_at_most_the_whole(arch: str, gpus: int) -> None:
    one, several = split(arch, 1), split(arch, gpus)
    step = Step(4, 1, 4096)
    for whole, share in (
        (one.weight_bytes, several.weight_bytes),
        (one.state_bytes(4096), several.state_bytes(4096)),
        (one.cost(step).flops, several.cost(step).flops),
        (one.cost(step).bytes, several.cost(step).bytes),
    ):
        assert whole / gpus * 0.999 <= share <= whole
    # Norms and biases alone are held by everyone.
    assert several.weight_bytes < 1.01 * one.weight_bytes / gpus


@pytest.mark.parametrize(
    ("arch", "part"),
    [
        *((arch, 1 / 8) for arch in ("mha", "gqa", "swa", "cla", "linear", "gdn", "mamba1")),
        ("mqa", 1.0),
        ("mla", 1.0),
    ],
)  # fmt: skip
def test_state_is_divided_by_heads_and_a_latent_is_everyones(arch: str, part: float) -> None:
    assert split(arch, 8).state_bytes(4096) == part * split(arch, 1).state_bytes(4096)


def test_heads_that_do_not_divide_leave_the_larger_part() -> None:
    (rows,) = split("gqa", 1).model.state_specs()[0].rows
    heads = replace(rows, shape=(2, 3, 4), shards=3)
    assert StateSpec(rows=(heads,)).split(2).rows[0].nbytes == 2 * 2 * 4 * 2
    with pytest.raises(UserError, match=r"'kv' of shape \[2, 3\] has no 4 equal shards"):
        RowSpec(name="kv", shape=(2, 3), format=Format.of(torch.float32), shards=4)


def test_collectives_take_a_rings_time() -> None:
    """4 GPUs, 1 MB at 100 GB/s: 6 hops of 0.25 MB, each 2.5 µs and 0.5 µs late; 10 µs to start."""
    link = Link(gbyte_per_s=100, hop_us=0.5, start_us=10, source="")
    assert all_reduce_us(link, 4, 1e6) == pytest.approx(10 + 6 * (0.5 + 2.5))
    assert gather_us(link, 4, 1e6) == pytest.approx(10 + 3 * (0.5 + 2.5))
    here = split("gqa", 4)
    here = replace(here, part=replace(here.part, link=link))
    rows_us = 2 * 32 + 1
    wanted = rows_us * all_reduce_us(link, 4, 7 * 4096 * 2) + gather_us(link, 4, 7 * 128256 * 2)
    assert here.link_ms(7) == pytest.approx(wanted / 1e3)
    assert split("gqa", 1).link_ms(7) == 0


@pytest.mark.parametrize("part", ACCELERATORS)
def test_every_part_has_a_documented_link(part: str) -> None:
    link = ACCELERATORS[part].link
    assert 30 < link.gbyte_per_s < 1000 and 0 < link.hop_us < 2 < link.start_us < 20
    assert "tuning table" in link.source


# -- answers --


def test_the_best_is_first_and_what_cannot_says_why() -> None:
    rows = fit(["mha", "gqa", "mla", "gdn"], tpot_ms=7.0, contexts=[32768], gpus=1)
    good = [row for row in rows if row["meets"]]
    rates = [float(str(row["output_tok_per_s_per_gpu"])) for row in good]
    assert [row["rank"] for row in good] == list(range(1, len(good) + 1))
    assert rates == sorted(rates, reverse=True) and good[0]["arch"] == "gdn"
    [mha] = [row for row in rows if row["arch"] == "mha"]
    [alone] = predict(["mha"], "8b", ["h100"], [1], [32768])
    over = float(str(alone["tpot_ms"])) / 7.0
    assert (mha["rank"], mha["batch"], mha["limited_by"]) == (None, None, "time")
    assert mha["over"] == pytest.approx(over) and over > 1
    assert f"at batch 1 on 1 GPU: {over:.3g} times the limit" in str(mha["note"])
    [small] = fit(["mha"], tpot_ms=7.0, contexts=[32768], memory_bytes=20e9, gpus=1)
    needed = split("mha", 1).weight_bytes + split("mha", 1).state_bytes(32768)
    assert (small["limited_by"], small["over"]) == ("memory", pytest.approx(needed / 18e9))


def test_gpus_are_as_few_as_can_be_or_as_pay_best() -> None:
    """Attention over 128k tokens of 8b needs two for a batch of one in 6 ms; more pay better."""
    [row] = fit(["mha"], tpot_ms=12.0, contexts=[131072])
    least, best = int(str(row["least_gpus"])), int(str(row["gpus"]))
    for count in (1, 2, 4, 8):
        [held] = fit(["mha"], tpot_ms=12.0, contexts=[131072], gpus=count)
        assert held["meets"] is (count >= least)
        if held["meets"]:
            rate = float(str(held["output_tok_per_s_per_gpu"]))
            assert rate <= float(str(row["output_tok_per_s_per_gpu"])) and best >= least > 1


def test_prices_rank_where_all_parts_have_one() -> None:
    at = {"tpot_ms": 20.0, "hardware": ["h100", "h200"], "contexts": [32768]}
    both = api.fit(["gqa", "gdn"], **at, price_per_hour={"h100": 1.0, "h200": 9.0})
    assert both["usd_per_million_tok"].is_monotonic_increasing
    first = both.iloc[0]
    per_hour = first["output_tok_per_s"] * 3600
    assert first["usd_per_million_tok"] == pytest.approx(first["gpus"] * 1.0 / per_hour * 1e6)
    some = api.fit(["gqa", "gdn"], **at, price_per_hour={"h100": 1.0})
    assert some["output_tok_per_s_per_gpu"].is_monotonic_decreasing
    assert set(api.fit(tpot_ms=50.0, contexts=[1024], gpus=1)["arch"]) == set(EVERY)


@pytest.mark.usefixtures("stub_roofline")
def test_this_machine_has_no_known_link() -> None:
    [row] = fit(["gqa"], tpot_ms=1e4, scale="tiny", hardware=["this-machine"], contexts=[64])
    assert (row["gpus"], row["link_from"]) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--fit", ("--fit needs the longest time per token", "--tpot 20ms")),
        ("--fit --tpot 20", ("'20'", "positive number of us, ms or s", "20ms")),
        ("--fit --tpot 20ms --memory 80", ("memory '80'", "80GB")),
        ("--fit --tpot 20ms --batch 4", ("--fit finds the batch", "leave out --batch")),
        ("--fit --tpot 20ms --gpus 16", ("gpus=16", "8 that a machine joins")),
        ("--fit --tpot 20ms --gpus 0", ("gpus=0 must be at least 1",)),
        ("--fit --tpot 20ms --reserve 1", ("reserve=1.0 must be a share",)),
        ("--fit --tpot 20ms --hardware h10", ("hardware 'h10'", "Did you mean 'h100'?")),
        ("--tpot 20ms", ("are of --fit", "add --fit")),
    ],
)
def test_questions_that_cannot_be_asked(
    decodebench: Command, arguments: str, fragments: tuple[str, ...]
) -> None:
    decodebench("predict", *arguments.split()).refuses(*fragments)


def test_the_command_answers_as_the_api(decodebench: Command) -> None:
    argv = ("predict", "--fit", "--tpot", "20ms", "--memory", "80GB", "--context", "32k")
    argv = (*argv, "--arch", "gqa", "--arch", "mla", "--gpus", "4", "--price", "2.5")
    rows = json.loads(decodebench(*argv, "--json").out)
    same = api.fit(["gqa", "mla"], tpot_ms=20, memory_bytes=80e9, contexts=[32768], gpus=4,
                   price_per_hour={"h100": 2.5})  # fmt: skip
    assert [row["batch"] for row in rows] == list(same["batch"])
    shown = decodebench(*argv).out
    assert "launches of h100: one H100, measured" in shown and "NVLink 4" in shown
    assert "kept free on h100: 8 GB of each GPU" in shown


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_latency_ms, "20ms", 20), (parse_latency_ms, "0.5 s", 500),
        (parse_latency_ms, "800us", 0.8), (parse_bytes, "80GB", 80e9),
        (parse_bytes, "1.5TiB", 1.5 * 2**40), (parse_bytes, "512 MB", 512e6),
    ],
)  # fmt: skip
def test_quantities_have_units(parse: Callable[[str], float], text: str, value: float) -> None:
    assert math.isclose(parse(text), value)
