"""A run goes on only with what it was begun with: files that changed meanwhile are noticed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archs.errors import UserError
from archs.registry import _FILES, source_digest
from eval.cli.templates import write_template
from eval.measure.site import Failure
from eval.measure.stages import STAGES
from eval.measure.suite import Suite, load_suite
from eval.results.rows import About, Status
from eval.results.schema import load_long
from tests.eval.micro import cells_of, run, write_suite
from train.checkpoint import load_model, read_metadata

pytestmark = pytest.mark.usefixtures("stub_roofline")


def loss_of(out: Path, arch: str) -> float:
    """The one training loss that a folder holds of an architecture."""
    rows = load_long(out / "results.csv")
    [loss] = rows[(rows["arch"] == arch) & (rows["measure"] == "train_loss")]["value"]
    return float(loss)


def edit(path: Path, old: str, new: str) -> None:
    """As between two commands: a process reads a file once."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    _FILES.clear()


@pytest.fixture
def mixer(tmp_path: Path) -> Path:
    return write_template("mine", tmp_path)


@pytest.fixture
def suite(tmp_path: Path, mixer: Path) -> Suite:
    return load_suite(str(write_suite(tmp_path, ("gqa", str(mixer)))))


def test_an_edited_mixer_runs_again_and_it_alone(
    suite: Suite, mixer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arch = tmp_path / "out", str(mixer)
    assert run(suite, out)
    first = loss_of(out, arch)
    edit(mixer, "self.out(gate", "self.out(3 * gate")
    assert run(suite, out)
    again = loss_of(out, arch)
    assert again != first
    # What a new folder gives, once each; the other architecture's rows are those of before.
    assert run(suite, tmp_path / "fresh")
    assert again == loss_of(tmp_path / "fresh", arch)
    assert sorted(cells_of(out)) == sorted(cells_of(tmp_path / "fresh"))
    assert run(suite, out) and len(cells_of(out)) == len(set(cells_of(out)))


def test_a_checkpoint_knows_the_file_that_it_was_trained_from(
    suite: Suite, mixer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(suite, out)
    [checkpoint] = (out / "cells").glob("*mine*/train-*/checkpoint.safetensors")
    assert read_metadata(checkpoint).identity.source == source_digest(str(mixer))
    load_model(checkpoint, arch=str(mixer))
    before = source_digest(str(mixer))
    edit(mixer, "class Mine", "# A comment.\nclass Mine")
    with pytest.raises(UserError, match=rf"said something else \({before}, now .*train again"):
        load_model(checkpoint, arch=str(mixer))
    [ours] = (out / "cells").glob("gqa/train-*/checkpoint.safetensors")
    assert read_metadata(ours).identity.source == ""


def test_another_text_ends_the_run(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    two = replace(suite, archs=("gqa",))
    assert two.train is not None
    two = replace(two, train=replace(two.train, seeds=(0, 1)))
    assert not run(two, out, time_budget_s=0.0)
    path = tmp_path / "text.txt"
    was = path.read_text()
    path.write_text(was.replace("lazy", "busy"))
    assert run(two, tmp_path / "other")
    # Nothing was trained yet, but the folder knows on what it was to be.
    with pytest.raises(UserError, match=r"holds other text than when .* was begun.*--fresh"):
        run(two, out)
    path.write_text(was)
    assert run(two, out)
    path.write_text(was.replace("lazy", "busy"))
    # All is trained: nothing would be mixed.
    assert run(two, out)
    # Another corpus is another point, and mixes with nothing.
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text(was.replace("lazy", "idle"))
    assert run(replace(two, corpus=replace(two.corpus, spec=f"path:{elsewhere}")), out)
    path.write_text(was)
    assert run(two, out)
    path.write_text(was.replace("lazy", "busy"))
    assert run(two, out, fresh=True)


@pytest.mark.parametrize("status", [Status.ERROR, Status.NAN])
def test_a_failed_cell_runs_again_when_it_may_end_otherwise(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    out, one = tmp_path / "out", replace(suite, archs=("gqa",))
    monkeypatch.setattr("eval.measure.provenance._commit", lambda: "0123abc")

    def broken(*_: Any) -> Any:
        if status == Status.ERROR:
            raise RuntimeError("a bug")
        raise Failure(Status.NAN, About(), "training nan at step 2")

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "task", broken)
        assert run(one, out)
    rows = load_long(out / "results.csv")
    assert list(rows[rows["stage"] == "task"]["status"]) == [status.value]
    # An error may have been the machine's; a loss that is not finite comes again.
    assert run(one, out)
    rows = load_long(out / "results.csv")
    assert (set(rows[rows["stage"] == "task"]["status"]) == {"ok"}) == (status == Status.ERROR)
    monkeypatch.setattr("eval.measure.provenance._commit", lambda: "4567def")
    assert run(one, out)
    rows = load_long(out / "results.csv")
    assert set(rows[rows["stage"] == "task"]["status"]) == {"ok"}
    assert len(cells_of(out)) == len(set(cells_of(out)))


def test_damaged_contents_are_refused(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not run(suite, out, time_budget_s=0.0)
    for text in ("{", '{"tokens": 3}', "[]"):
        (out / "contents.json").write_text(text)
        with pytest.raises(UserError, match=r"contents.json.* --fresh"):
            run(suite, out)
