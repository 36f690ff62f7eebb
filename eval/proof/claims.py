"""The textbook's claims about decode, each computed from results or from the cost model.

A claim is supported, conditional (true under conditions that the evidence names), refuted, or not
measured. What comes out otherwise than the textbook is a finding. Numbers are those of the
project's list of claims; predictions use the 8b shapes on an H100 unless they say otherwise.
"""

from collections.abc import Callable
from functools import cache
from math import log2

import pandas as pd
import torch

from archs.backbone import Model
from archs.cost import Step
from archs.mla import LatentConfig
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.predict.accelerators import hardware_of
from eval.predict.roofline import predict_ops
from eval.proof.claims_compressed import few_bits
from eval.proof.claims_pruned import pruned_and_distilled
from eval.report.evidence import Claim, Evidence, Verdict
from eval.report.figures import Figures, exponent


@cache
def outline(arch: str, scale: str = "8b") -> Model:
    """A model without weights, for its declarations."""
    return ModelSpec(arch=arch, scale=get_scale(scale)).outline(torch.bfloat16)


def claims(long: pd.DataFrame) -> list[Claim]:
    """Every claim with its verdict on these results."""
    found = Evidence(long)
    return [Claim(number, text, *check(found)) for number, text, check in CHECKS]


Found = tuple[Verdict, str]


def _prefill_and_decode(_: Evidence) -> Found:
    step, prefill = Step(1, 1, 4096), Step(1, 4096, 0)
    ridge = hardware_of("h100").roofline.ridge_flop_per_byte
    archs = ("mha", "gqa", "mla", "gdn", "mamba2")
    low = max(outline(a).cost(step).intensity_flop_per_byte for a in archs)
    high = min(outline(a).cost(prefill).intensity_flop_per_byte for a in archs)
    mlp = _op("gqa", "mlp down", 1)["compute_bound_batch"]
    ok = low < ridge < high and abs(float(str(mlp)) - 295) < 1
    return (
        "supported" if ok else "refuted",
        f"batch 1, 4,096 tokens: decode at most {low:.1f} FLOP/byte, prefill at least {high:,.0f}, "
        f"ridge {ridge:.0f}; the MLP turns compute-bound at batch {mlp:.0f}",
    )


@cache
def _op(arch: str, op: str, batch: int) -> dict[str, object]:
    rows = predict_ops([arch], "8b", ["h100"], [batch], [16384])
    return next(row for row in rows if row["op"] == op)


def _intensity_with_batch(_: Evidence) -> Found:
    mlp = [float(str(_op("mha", "mlp down", b)["arith_intensity_pred"])) for b in (1, 64)]
    attention = {
        arch: [float(str(_op(arch, "attention", b)["arith_intensity_pred"])) for b in (1, 64)]
        for arch in ("mha", "gqa", "mqa")
    }
    flat = all(abs(a / b - 1) < 0.02 for a, b in attention.values())
    shown = ", ".join(f"{arch} {pair[0]:.1f}" for arch, pair in attention.items())
    grows = abs(mlp[1] / mlp[0] / 64 - 1) < 0.02
    return (
        "conditional" if flat and grows else "refuted",
        f"batch 1 to 64: MLP {mlp[0]:.0f} to {mlp[1]:.0f} FLOP/byte, attention unchanged; but it "
        f"is about 1 for MHA alone and grows with the query heads per KV head: {shown}",
    )


@cache
def _slopes() -> dict[tuple[int, bool], float]:
    """Exponents of the FLOPs of n tokens at n, with a cache and without one."""
    model = outline("mha", "1b")

    def total(n: int, cached: bool) -> float:
        # Step time is a polynomial of the context, for which Simpson's rule is exact enough.
        at = (1, n // 2, n)
        steps = [model.cost(Step(1, 1, c) if cached else Step(1, c, 0)).flops for c in at]
        return (steps[0] + 4 * steps[1] + steps[2]) * n / 6

    return {
        (n, cached): log2(total(2 * n, cached) / total(n, cached))
        for n in (1024, 2**22)
        for cached in (False, True)
    }


def _without_cache(found: Evidence) -> Found:
    slopes = _slopes()
    measured = _measured_exponents(found.figures)
    ok = abs(slopes[2**22, False] - 3) < 0.1 and abs(slopes[2**22, True] - 2) < 0.1
    return (
        "conditional" if ok else "refuted",
        f"FLOPs of n tokens, 1b shape: exponents {slopes[2**22, False]:.2f} and "
        f"{slopes[2**22, True]:.2f} at n = 4M, but {slopes[1024, False]:.2f} and "
        f"{slopes[1024, True]:.2f} at n = 1,024, where products with weights dominate{measured}",
    )


def _measured_exponents(figures: Figures) -> str:
    """Measured exponents of full attention without and with the state, and their ratio."""
    for setting in figures.settings:
        rows = figures.at(setting, "cached_tpot_ms", "nocache_tpot_ms")
        rows = rows[(rows["arch"] == "mha") & (rows["batch"] == rows["batch"].min())]
        rows = rows.sort_values("context")
        if rows.empty:
            continue
        contexts, last = list(rows["context"]), rows.iloc[-1]
        ratio = last["nocache_tpot_ms"] / last["cached_tpot_ms"]
        told = (
            f"; measured at {contexts[-1]:,} tokens ({setting}), {ratio:,.0f} times slower without"
        )
        if len(contexts) > 1:
            bare, kept = (
                exponent(contexts, list(rows[f"{kind}_tpot_ms"])) for kind in ("nocache", "cached")
            )
            told += f", from {contexts[0]:,} tokens on exponents of {bare:.2f} and {kept:.2f}"
        return told
    return ""


def _cache_grows(_: Evidence) -> Found:
    model = outline("mha")
    a, b = (model.state_bytes(c) for c in (4096, 8192))
    weights = sum(p.nbytes for p in model.parameters())
    tokens = weights / (b / 8192)
    return (
        "supported" if b == 2 * a else "refuted",
        f"mha 8b: {a / 4096 / 1e3:,.0f} kB per token and sequence; the cache exceeds the weights "
        f"({weights / 1e9:.1f} GB) from {tokens:,.0f} tokens on, over all sequences",
    )


def _grouped_queries(found: Evidence) -> Found:
    mha, gqa = (outline(a).state_bytes(1024) for a in ("mha", "gqa"))
    worse = found.ahead("bits_per_byte", "mha", "gqa")
    a, b = (found.quality("bits_per_byte", x) for x in ("mha", "gqa"))
    if a is None or b is None or worse is None:
        return "not measured", f"8b cache {mha / gqa:.0f} times smaller; no losses compared"
    apart = worse or found.ahead("bits_per_byte", "gqa", "mha")
    return (
        "conditional" if worse else "supported",
        f"8b cache {mha / gqa:.0f} times smaller, with {mha / gqa:.0f} query heads per KV head; "
        f"bits per byte {a[0]:.3f} (mha) and {b[0]:.3f} (gqa), "
        f"{'told apart' if apart else 'not told apart'}",
    )


def _latent(found: Evidence) -> Found:
    published = LatentConfig(
        n_heads=128, nope_dim=128, rope_dim=64, v_dim=128, rank=512, q_rank=1536
    )
    keys = published.n_heads * published.nope_dim
    worse = found.ahead("bits_per_byte", "mha", "mla")
    a, b = (found.quality("bits_per_byte", x) for x in ("mha", "mla"))
    sizes = f"DeepSeek-V3's shape: {keys:,} key dimensions to {published.rank} + 64"
    if a is None or b is None or worse is None:
        return "not measured", f"{sizes}; no losses compared"
    verdict: Verdict = "conditional" if worse else "supported"
    return verdict, f"{sizes}; bits per byte {a[0]:.3f} (mha) and {b[0]:.3f} (mla)"


def _cross_layer(_: Evidence) -> Found:
    step = Step(1, 1, 16384)
    gqa, cla = outline("gqa"), outline("cla")
    held = gqa.state_bytes(16384) / cla.state_bytes(16384)
    read = [
        sum(op.state_read_bytes for op in m.cost(step).ops if op.name == "attention")
        for m in (gqa, cla)
    ]
    return (
        "supported" if held == 2 and read[0] == read[1] else "refuted",
        f"groups of 2 layers: the state is {held:.0f} times smaller, a step reads "
        f"{read[1] / read[0]:.2f} times as much",
    )


def _window(found: Evidence) -> Found:
    model = outline("swa", "70m")
    flat = model.state_bytes(2**14) == model.state_bytes(2**20)
    full, near = (found.quality("accuracy", a, "mqar") for a in ("mha", "swa"))
    ahead = found.ahead("accuracy", "mha", "swa", "mqar")
    if full is None or near is None or ahead is None:
        return "not measured", "the state stays at the window; no recall compared"
    return (
        "supported" if flat and ahead else "refuted",
        f"state the same at 16k and 1M tokens; recall beyond the window {near[0]:.0%} against "
        f"{full[0]:.0%} of full attention",
    )


def _sparse(_: Evidence) -> Found:
    return "not measured", "no sparse mixer is registered yet"


def _speculation(found: Evidence) -> Found:
    rows = found.speculated
    if rows.empty:
        return "not measured", "no model speculated"
    told, gains, lengths, wasted = [], [], [], True
    for arch, own in rows.groupby("arch", sort=False):
        best = own.sort_values("speedup").iloc[-1]
        same = own[(own["draft"] == best["draft"]) & (own["batch"] == best["batch"])]
        same = same[same["context"] == best["context"]]
        longer = same[same["drafts"] > best["drafts"]]
        gains.append(float(best["speedup"]))
        lengths.append(int(best["drafts"]))
        wasted &= not longer.empty
        told.append(f"{arch} {best['speedup']:.2f} times by {best['draft']}, K {best['drafts']}")
    exact = found.lossless
    slower = int((rows["speedup"] < 1).sum())
    expected = min(gains) >= 2 and all(3 <= k <= 4 for k in lengths) and wasted
    verdict: Verdict = "supported" if expected and exact else "conditional"
    if max(gains) <= 1 or exact is False:
        verdict = "refuted"
    tokens = {True: "all tokens are plain decode's", False: "some tokens differ", None: "drawn"}
    return (
        verdict,
        f"{'; '.join(told)}; {slower} of {len(rows)} cells are slower than plain decode, down to "
        f"{rows['speedup'].min():.2f} times; {tokens[exact]}, ties apart",
    )


def _batch_trade(found: Evidence) -> Found:
    pairs = []
    for key, rows in found.timed.groupby("arch"):
        for at, same in rows.sort_values("batch").groupby("context"):
            times, batches = same["tpot_ms"].to_numpy(), same["batch"].to_numpy()
            slower = float(times[-1] / times[0])
            pairs.append((float(batches[-1] / batches[0]) / slower, slower, str(key), int(str(at))))
    gain, slower, arch, context = max(pairs, default=(1.0, 1.0, "", 0))
    if gain == slower:
        return "not measured", "it needs two batch sizes at one context"
    return (
        "supported" if gain > 1.2 and slower > 1 else "conditional",
        f"{arch} at {context:,} tokens: the larger batch gives {gain:.1f} times the throughput at "
        f"{slower:.1f} times the latency ({found.where})",
    )


def _serving(found: Evidence) -> Found:
    best = _best(found, "batching_gain")
    if best.empty:
        return "not measured", "it needs a [[serve]] with batching continuous and static"
    equal = found.served("batching_gain_equal_steps")["value"].max()
    slowest = best.min()
    throughput: Verdict = (
        "supported" if slowest >= 2 else "conditional" if best.max() > 1 else "refuted"
    )
    told = [
        f"throughput {throughput}: continuous over static batching {slowest:.2f} ({best.idxmin()}) "
        f"to {best.max():.2f} ({best.idxmax()}) times; steps of equal time would give {equal:.2f}"
    ]
    parts = [throughput, *(part(found, told) for part in (_paging, _prefixes, _copies))]
    alike = set(parts) == {"supported"}
    overall: Verdict = "supported" if alike else "conditional"
    return "refuted" if throughput == "refuted" else overall, "; ".join(told)


def _paging(found: Evidence, told: list[str]) -> Verdict:
    """Removed is what pages waste less than half as much as whole contexts on the same load."""
    paged, whole = (
        found.served(f"page_waste{more}").groupby(["arch", "options"])["value"].mean()
        for more in ("", "_contiguous")
    )
    paged = paged[[("batching=continuous" in options) for _, options in paged.index]]
    if paged.empty:
        told.append("fragmentation not measured")
        return "not measured"
    whole = whole[paged.index]
    removed = paged < whole / 2
    verdict: Verdict = (
        "supported" if removed.all() else "conditional" if removed.any() else "refuted"
    )
    arch, load = map(str, paged.index[int((paged / whole).to_numpy().argmax())])
    told.append(
        f"fragmentation {verdict}: pages waste {paged.min():.0%} to {paged.max():.0%} of their "
        f"rows, whole contexts {whole.min():.0%} to {whole.max():.0%}; pages save least on "
        f"{load.split()[0].removeprefix('workload=')} ({arch}): {paged[arch, load]:.0%} against "
        f"{whole[arch, load]:.0%}"
    )
    return verdict


def _prefixes(found: Evidence, told: list[str]) -> Verdict:
    hits = _best(found, "hit_rate")
    if hits.empty:
        told.append("prefixes not measured: that takes a [[serve]] with prefix_cache")
        return "not measured"
    what = "of the tokens of prompts were found computed"
    return _tell("prefixes", f"{_span(hits)} {what}", hits, told)


def _copies(found: Evidence, told: list[str]) -> Verdict:
    saved = _best(found, "shared_state")
    if saved.empty or saved.max() <= 0:
        told.append("copy-on-write not measured: that takes a workload with several answers")
        return "not measured"
    what = "of the state that copies would take"
    return _tell("copy-on-write", f"sharing saves {_span(saved)} {what}", saved, told)


def _best(found: Evidence, measure: str) -> "pd.Series[float]":
    """Of several workloads, and of several runs of one, the largest value of each architecture."""
    return found.served(measure).groupby("arch", sort=False)["value"].max()


def _span(best: "pd.Series[float]") -> str:
    return f"{best.min():.0%} ({best.idxmin()}) to {best.max():.0%} ({best.idxmax()})"


def _tell(part: str, what: str, best: "pd.Series[float]", told: list[str]) -> Verdict:
    """Supported where it holds for all: what remembers no rows, say, has none to share."""
    verdict: Verdict = "supported" if best.min() > 0 else "conditional"
    told.append(f"{part} {verdict}: {what}")
    return verdict


def _recurrent_gains(found: Evidence) -> Found:
    contexts = sorted(found.timed["context"].unique())
    if not contexts:
        return "not measured", "no decode was timed"
    longest = int(contexts[-1])
    full = found.tpot_ms("mha", 1, longest)
    ratios = {
        arch: full / other
        for arch in ("linear", "gdn", "mamba1", "mamba2")
        if full and (other := found.tpot_ms(arch, 1, longest))
    }
    if not ratios:
        return "not measured", "it needs mha and a recurrent mixer at one context"
    best = max(ratios, key=lambda arch: ratios[arch])
    m, r = outline("mha"), outline("mamba2")
    far = Step(16, 1, 131072)
    predicted = m.cost(far).bytes / r.cost(far).bytes
    return (
        "supported" if ratios[best] >= 10 else "conditional",
        f"{best} is {ratios[best]:.1f} times as fast as mha at {longest:,} tokens, batch 1 "
        f"({found.where}); predicted bytes at 8b, batch 16, 128k tokens: {predicted:.0f} times",
    )


def _arithmetic(_: Evidence) -> Found:
    tokens = 8.6e12 * 4
    verdict: Verdict = "supported" if tokens > 32e12 else "refuted"
    return verdict, f"8.6T tokens a day for 4 days are {tokens / 1e12:.1f}T"


CHECKS: tuple[tuple[int, str, Callable[[Evidence], Found]], ...] = (
    (
        1,
        "prefill is compute-bound, decode memory-bound (MLP: below batch 295)",
        _prefill_and_decode,
    ),
    (2, "MLP intensity grows with batch, attention's stays about 1", _intensity_with_batch),
    (3, "n tokens cost O(n³) without a cache, O(n²) with it", _without_cache),
    (4, "the KV cache grows linearly and can exceed the weights", _cache_grows),
    (5, "GQA shrinks the cache by the query heads per KV head at little loss", _grouped_queries),
    (6, "MLA shrinks it from 16,000 to 512 dimensions at comparable quality", _latent),
    (7, "cross-layer attention halves the cache, not the reads", _cross_layer),
    (8, "a sliding window bounds the cache and loses distant information", _window),
    (9, "sparse attention keeps only selected tokens", _sparse),
    (
        10,
        "quantization cuts memory and time by the ratio of precisions, loses at very few bits; "
        "qat recovers that, activation-aware codes lose less",
        few_bits,
    ),
    (
        11,
        "pruning half of something and distilling from the whole loses almost nothing",
        pruned_and_distilled,
    ),
    (
        12,
        "speculative decoding is lossless and gives 2 to 4 times, best at 3 to 4 drafts",
        _speculation,
    ),
    (13, "small batches give latency, large ones throughput", _batch_trade),
    (
        14,
        "continuous batching and paging give 2 to 3 times on uneven loads; paging removes "
        "fragmentation; prefixes are shared; copy-on-write serves several answers",
        _serving,
    ),
    (15, "recurrent mixers can give order-of-magnitude gains in decode", _recurrent_gains),
    (16, "8.6T tokens a day for 4 days exceed 32T", _arithmetic),
)
