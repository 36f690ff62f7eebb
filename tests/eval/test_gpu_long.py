"""A proof's steps as the long table: what reports, leaderboards and crossovers read."""

from pathlib import Path

import pytest

from eval.cli.pages import write_report
from eval.proof.gpu.decode_grid import COLUMNS, KEY
from eval.proof.gpu.long import FROM, write_results
from eval.proof.gpu.table import Table
from eval.report.kernels import compared, kernel_section
from eval.report.leaderboard import merge
from eval.results.schema import check_long

ORIGIN = {
    "hardware": "A GPU", "driver": "CUDA 13.0", "torch": "2.11", "triton": "3.6",
    "commit": "abc", "started_at": "2026-11-26T00:00:00+00:00",
}  # fmt: skip


def step(arch: str, context: int, ms: float, **more: object) -> dict[str, object]:
    return {
        "arch": arch, "scale": "70m", "batch": 1, "context": context, "kernel_backend": "triton",
        "status": "ok", "tpot_ms": ms, "tpot_p50_ms": ms, "tpot_p99_ms": ms,
        "output_tok_per_s": 1e3 / ms, "mbu": 0.5, "mfu": 0.01, "tpot_pred_ms": 0.9 * ms,
        "step_bytes": 4e8, "step_flops": 8e8, "state_bytes": 1e6, "agreement_error": 0.01,
        "agreement_limit": 0.02, **ORIGIN, **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    machine = Table(tmp_path / "machine.csv", ("measure", "value", *FROM), ("measure",))
    rates = (
        ("copy_bytes_per_s", 3e12), ("matrix_flops_per_s", 7e14), ("product_launch_us@1", 1.0),
        ("product_launch_us@8", 3.0),
    )  # fmt: skip
    for measure, value in rates:
        machine.append({"measure": measure, "value": value, **ORIGIN})
    decode = Table(tmp_path / "decode.csv", (*COLUMNS, *FROM), KEY)
    for context in (1024, 4096):
        decode.append(step("gqa", context, context / 1024))
        decode.append(step("gdn", context, 1.5))
        decode.append(step("gqa", context, 9.0, kernel_backend="sdpa"))
    lost = step("mha", 4096, 1.0, status="oom", note="needs 128 GiB")
    decode.append({k: v for k, v in lost.items() if k not in ("tpot_ms", "mbu")})
    return tmp_path


def test_the_long_table_is_sound_and_ours_alone(folder: Path) -> None:
    for _ in range(2):
        path = write_results(folder)
    long = merge([path])
    assert check_long(path) == []
    steps = long[long["measure"] == "tpot_p50_ms"]
    launches = long[long["measure"] == "product_launch_us"].set_index("batch")["value"]
    assert launches.to_dict() == {1: 1.0, 8: 3.0}
    assert set(steps["kernel_backend"]) == {"triton"} and 9.0 not in set(steps["value"])
    assert sorted(steps.loc[steps["arch"] == "gqa", "value"]) == [1.0, 4.0]
    intensity = long.loc[long["measure"] == "arith_intensity_pred", "value"]
    assert set(intensity) == {2.0} and (long["hardware"] == "A GPU").all()
    [lost] = long.loc[long["arch"] == "mha"].to_dict("records")
    assert (lost["status"], lost["note"]) == ("oom", "needs 128 GiB")


def test_the_page_shows_steps_and_kernels(folder: Path) -> None:
    write_results(folder)
    (folder / "kernels.csv").write_text(
        "op,case,backend,status,time_us,copy_fraction,matrix_fraction\n"
        "a,one,sdpa,ok,30,0.4,0.1\na,one,cublas,ok,20,0.6,0.1\na,one,triton,ok,10,1.2,0.2\n"
        "a,two,sdpa,incorrect,,,\na,two,triton,ok,5,0.5,0.1\nb,three,triton,incorrect,7,0.5,0.1\n"
    )
    one, two, three = compared(folder / "kernels.csv")
    assert (one.baseline, one.ratio, one.copy_fraction) == ("cublas", 2.0, 1.2)
    assert (two.baseline, two.ratio) == ("", None)
    assert (three.status, three.time_us) == ("incorrect", None), "no time without correctness"
    page = write_report(folder).read_text()
    assert '<h2 id="kernels">' in page and "1 of the 1 that have a baseline" in page
    assert "Latency against context" in page


def test_a_folder_without_a_proof_has_no_such_section(tmp_path: Path) -> None:
    assert kernel_section(tmp_path) == ""
