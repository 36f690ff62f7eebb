"""Suites: those that ship load, and whatever is off in a user's copy is named."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY
from eval.measure.decode_plans import DecodePlan
from eval.measure.suite import available_suites, load_suite
from train.corpus import load_corpus

GQA = 'archs = ["gqa"]\n'
TRAIN = """
[train]
scale = "tiny"
steps = 3
batch = 2
seq_len = 32
learning_rates = [1]
"""
DECODE = """
[[decode]]
scale = "70m"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


#: What the suite of minutes leaves to longer ones: its time is promised.
NOT_IN_MINUTES = {
    "csa", "dsa", "grouped_latent", "gta", "hca", "kda", "mamba3", "nsa", "rwkv7", "shortconv",
}  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_shipped_suites_compare_everything(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    left_out = NOT_IN_MINUTES if name == "tiny" else set()
    assert set(REGISTRY) - left_out <= set(suite.archs)
    assert not left_out & set(suite.archs)
    assert {h.partition(":")[0] for h in HYBRIDS} <= {a.partition(":")[0] for a in suite.archs}
    assert suite.train and suite.quality and suite.tasks and len(suite.decode) >= 2
    assert set(suite.scales) >= {suite.train.scale, suite.decode[-1].scale}
    assert suite.trained_scales == [suite.train.scale]


def test_the_ladder_trains_three_sizes_with_rates_for_their_width() -> None:
    train = load_suite("ladder").train
    assert train and train.scales == ("tiny", "nano", "micro")
    assert load_suite("ladder").trained_scales == list(train.scales)
    assert train.rates_at("tiny") == train.learning_rates
    slower = [r / 1.5**0.5 for r in train.learning_rates]
    assert train.rates_at("mini") == pytest.approx(slower)


def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    text = 'archs = ["gqa"]\n[[decode]]\nscale = "tiny"\nbackend = "tritn"\n'
    with pytest.raises(UserError, match=r"Unknown backend 'tritn'.*'triton'"):
        load_suite(write(tmp_path, text))


def test_every_shipped_suite_is_known() -> None:
    assert set(available_suites()) == {"tiny", "small", "gpu", "base", "ladder", "parity", "serve"}


def test_a_suite_survives_being_written(tmp_path: Path) -> None:
    suite = load_suite("small")
    assert load_suite(write(tmp_path, tomli_w.dumps(suite.as_toml()))) == suite
    assert tomllib.loads(tomli_w.dumps(suite.as_toml()))["name"] == "small"


def test_the_hash_follows_all_but_name_and_architectures(tmp_path: Path) -> None:
    suite = load_suite("tiny")
    assert suite.config_hash == load_suite("tiny").config_hash
    assert len(suite.config_hash) == 12
    assert suite.train is not None
    assert suite.config_hash == replace(suite, archs=("gqa",), name="mine").config_hash
    others = [
        replace(suite, train=replace(suite.train, steps=121)),
        replace(suite, corpus=replace(suite.corpus, vocab_size=4097)),
        replace(suite, decode=suite.decode[:1]),
        replace(suite, overrides={"gqa": {"kv_heads": 1}}),
    ]
    assert len({s.config_hash for s in (suite, *others)}) == 5


def test_defaults_and_whole_numbers_for_floats(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, f'archs = ["gqa"]\n{TRAIN}{DECODE}'))
    assert suite.name == "mine"
    assert suite.train is not None
    assert suite.train.learning_rates == (1.0,)
    assert suite.decode == (DecodePlan(scale="70m"),)
    assert suite.quality is None


def test_overrides_of_a_file_are_allowed(tmp_path: Path) -> None:
    outside = Path(__file__).parents[1] / "data" / "decayed_sum.py"
    text = f"archs = ['{outside}']\n{DECODE}\n[overrides.'{outside}']\ndecay = 0.5"
    assert load_suite(write(tmp_path, text)).overrides == {str(outside): {"decay": 0.5}}


#: A suite file, and what is said about it.
OFF = [
    (GQA + "sped = 1", r"Unknown key in .*mine.toml 'sped'"),
    (GQA + "[corpus]\nvocabsize = 300", r"mine.toml: corpus 'vocabsize'.*'vocab_size'"),
    (GQA + "[train]\nstep = 3", r"mine.toml: train 'step'. Did you mean 'steps'"),
    (GQA + '[[decode]]\nscale="tiny"\ncontext=[8]', "Did you mean 'contexts'"),
    ("name = 'x'", r"mine.toml lacks 'archs'; add it"),
    (GQA + '[train]\nscale = "tiny"', r"mine.toml: train lacks 'steps'; add it"),
    ("archs = []" + DECODE, "mine.toml: archs is empty; it needs at least one"),
    (GQA, "suite mine measures nothing; add train, tasks, decode or serve"),
    ('archs = "gqa"' + DECODE, r"archs must be a list, not 'gqa'"),
    ('archs = ["gqa", 3]' + DECODE, r"archs must be of type str, not 3"),
    ('archs = ["gqaa"]' + DECODE, r"arch 'gqaa'. Did you mean 'gqa'"),
    ('archs = ["gdn:gqa=3"]' + DECODE, r"pattern 'gdn:gqa=3' needs one positive count"),
    (GQA + DECODE + "[overrides.gqaa]\nkv_heads = 1", r"arch 'gqaa'. Did you"),
    (GQA + "overrides = 3" + DECODE, r"overrides must be a table, not 3"),
    (GQA + "overrides = {gqa = 3}" + DECODE, r"overrides.gqa must be a table"),
    (GQA + "[tasks.mqr]\nsteps = 2", r"Unknown task 'mqr'. Did you mean 'mqar'"),
    (GQA + "[tasks.mqar]\npair = 2", r"Unknown key in tasks.mqar 'pair'. Did you mean 'pairs'"),
    (GQA + "[tasks.mqar.overrides.swaa]\nwindow = 4", r"arch 'swaa'. Did you mean 'swa'"),
    (GQA + TRAIN.replace('"tiny"', '"tinny"'), r"scale 'tinny'.*'tiny'"),
    (GQA + TRAIN.replace("= 3", "= 3.5"), r"steps must be of type int, not 3.5"),
    (GQA + TRAIN.replace("= 3\n", "= true\n"), r"steps must be of type int, not True"),
    (GQA + TRAIN.replace("[1]", "[]"), "train: learning_rates is empty"),
    (GQA + TRAIN.replace("[1]", "[1, 2]"), "need sweep_steps >= 1"),
    (GQA + TRAIN.replace("[1]", "[1, 1]"), "learning_rates names 1.0 twice"),
    (GQA + TRAIN.replace("[1]", "[nan]"), "learning_rate=nan must be positive"),
    (GQA + TRAIN.replace("[1]", "[-1]"), "learning_rate=-1.0 must be positive"),
    (GQA + TRAIN.replace("steps = 3", "steps = -4"), "train: .*steps=-4 must be at least 1"),
    (GQA + TRAIN.replace("batch = 2", "batch = 0"), "train: .*batch=0 must be at least 1"),
    (GQA + TRAIN.replace("seq_len = 32", "seq_len = 0"), "seq_len=0 must be at least 1"),
    (GQA + TRAIN + "grad_accum = 3", "batch=2 is not divisible by grad_accum=3"),
    (GQA + TRAIN + "checkpoint_every = -1", "checkpoint_every=-1 must be at least 0"),
    (GQA + TRAIN + 'optimizer = "adam"', "'adam'. Did you mean 'adamw'"),
    (GQA + TRAIN + 'schedule = "wds"', "'wds'. Did you mean 'wsd'"),
    (GQA + TRAIN + 'autocast = "fp8"', "'fp8'"),
    (GQA + TRAIN + "seeds = []", "seeds is empty"),
    (GQA + TRAIN + "seeds = [0, 0]", "seeds names 0 twice"),
    (GQA + TRAIN + "seeds = [-1]", "seed=-1 must be at least 0"),
    (GQA + TRAIN + "sweep_steps = -1", "sweep_steps=-1 must be at least 0"),
    (GQA + TRAIN + 'ladder = ["nan"]', "scale 'nan'. Did you mean 'nano'"),
    (GQA + DECODE + "[corpus]\nvocab_size = 256", "corpus: vocab_size=256 must be at least 257"),
    (GQA + DECODE + '[corpus]\nspec = "sotu:zzz"', "corpus 'sotu:zzz' takes no source"),
    (GQA + DECODE + '[corpus]\nspec = "path:"', "corpus 'path:' names no source"),
    (GQA + "[tasks.mqar]\nsteps = 0", "tasks.mqar: steps=0 must be at least 1"),
    (GQA + "[tasks.mqar]\nbatch = 0", "tasks.mqar: batch=0 must be at least 1"),
    (GQA + "[tasks.mqar]\nlearning_rates = []", "tasks.mqar: learning_rates is empty"),
    (GQA + "[tasks.mqar]\nlearning_rates = [inf]", "learning_rate=inf must be positive"),
    (GQA + "[tasks.mqar]\nseeds = [1, 1]", "seeds names 1 twice"),
    (GQA + "[tasks.mqar]\nseq_len = 31", "seq_len=31 must be even"),
    (GQA + "[tasks.mqar]\nvocab = 8", "vocab=8 has too few keys"),
    (GQA + "[tasks.mqar]\nhead_dim = 48", "d_model=64 is not divisible by head_dim=48"),
    (GQA + "[tasks.mqar]\nhead_dim = 0", "head_dim=0 must be at least 1"),
    (GQA + "[tasks.mqar]\nn_layers = 0", "n_layers=0 must be at least 1"),
    (GQA + "[tasks.mqar]\nwindow = 0", "window=0 must be at least 1"),
    (GQA + "[tasks.mqar]\nshort_conv = -1", "short_conv=-1 must be at least 0"),
    (GQA + "[tasks.mqar]\ntest_sequences = 0", "test_sequences=0 must be at least 1"),
    (GQA + "[tasks.mqar]\neval_every = -1", "_every=-1 must be at least 0"),
    (GQA + "[tasks.mqar.overrides.gqa]\nkv_heads = 3", "is not divisible by kv_heads=3"),
    (GQA + "[tasks.mqar.overrides.swa]\nwindow = 4", "overrides of 'swa', which no architecture"),
    (GQA + DECODE + "[overrides.mla]\nrank = 8", "overrides of 'mla', which .*have gqa"),
    (GQA + DECODE + "[overrides.gqa]\nkv_heads = 'two'", "kv_heads must be of type int, not 'two'"),
    (GQA + DECODE + "[overrides.gqa]\nkv_heads = 3", "n_heads=8 is not divisible by kv_heads=3"),
    (GQA + DECODE + "[overrides.gqa]\nkv_heads = 0", "kv_heads=0 must be at least 1"),
    (GQA + DECODE + "[overrides.gqa]\nwindow = -5", "window=-5 must be at least 1"),
    (GQA + DECODE + "[overrides.gqa]\nrope_theta = nan", "rope_theta=nan must be positive"),
    (GQA + DECODE + "[overrides.gqa]\nkv_head = 2", "'kv_head'. Did you mean 'kv_heads'"),
    (GQA + DECODE + "[overrides.gqa]\nhead_dim = 512", "not within 1 %"),
    ("archs = ['linear']" + TRAIN.replace("seq_len = 32", "seq_len = 8"), "longest=8 must be at"),
    ("archs = ['gqa', 'mla', 'gqa']" + DECODE, "archs names 'gqa' twice"),
    (GQA + 'train = "tiny"', r"train must be a table, not 'tiny'"),
    (GQA + '[decode]\nscale = "tiny"', "decode must be a list"),
    (GQA + DECODE.replace("70m", "71m"), r"scale '71m'. Did you mean '70m'"),
    (GQA + DECODE + "batches = [0]", "decode: batches=0 must be at least 1"),
    (GQA + DECODE + "contexts = [256, -1]", "decode: contexts=-1 must be at least 1"),
    (GQA + DECODE + "contexts = []", "contexts is empty"),
    (GQA + DECODE + "batches = [1, 1]", "batches names 1 twice"),
    (GQA + DECODE + "steps = 0", "decode: steps=0 must be at least 1"),
    (GQA + DECODE + "prompt = -1", "prompt=-1 must be at least 0"),
    (GQA + DECODE + "no_cache = 1", "no_cache=1 times no step; set 0 for none, or 2"),
    (GQA + TRAIN + "[quality]\nreach = -1", "reach=-1 must be at least 0"),
    (GQA + TRAIN + "[quality]\nmax_tokens = -5", "max_tokens=-5 must be at least 0"),
    ('archs = ["gqa"', "is not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), OFF, ids=[message for _, message in OFF])
def test_what_is_off_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_suite(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_suite_over_other_architectures_keeps_their_overrides_alone(tmp_path: Path) -> None:
    text = "archs = ['gqa', 'swa']\n[tasks.mqar]\n[tasks.mqar.overrides.swa]\nwindow = 4\n"
    suite = load_suite(write(tmp_path, text + "[overrides.gqa]\nkv_heads = 1"))
    hybrid = suite.only(["gdn:gqa=3:1"])
    assert hybrid.archs == ("gdn:gqa=3:1",)
    assert hybrid.overrides == {"gqa": {"kv_heads": 1}}
    assert hybrid.tasks["mqar"].get("overrides", {}) == {}
    assert suite.only(["mamba2"]).overrides == {}
    with pytest.raises(UserError, match="archs is empty"):
        suite.only([])


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_suite(str(tmp_path / "mine.toml"))


def test_unknown_suites_and_corpora_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"suite 'smal'. Did you mean 'small'"):
        load_suite("smal")
    with pytest.raises(UserError, match=r"corpus 'stdlibs'. Did you mean 'stdlib'"):
        load_corpus("stdlibs")


def test_a_pattern_deeper_than_a_scale_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text('archs = ["mamba2:gqa=7:1"]\n[[decode]]\nscale = "tiny"\n')
    with pytest.raises(UserError, match=r"mamba2:gqa=7:1.*8 layers.*only 4"):
        load_suite(str(path))
