"""An `ncu` on PATH that answers as a test wants it to: there is no GPU here, and no other."""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from eval.measure import counted, counters
from eval.measure.counters import FLOPS

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BYTES = "dram__bytes.sum"
DENIED = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
    "Performance Counters on the target device 0."
)
FakeNcu = Callable[[str], Path]


def make_fake_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNcu:
    """Puts an `ncu` on PATH that does as told; what it was asked goes to the file returned."""
    log = tmp_path / "asked.txt"
    script = tmp_path / "bin" / "ncu"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(counters, "why_not", lambda _: None)

    def make(body: str) -> Path:
        script.write_text(
            f"#!{sys.executable}\nimport os, subprocess, sys, time\n"
            "assert os.environ['LC_ALL'] == 'C'\n"
            "at = sys.argv.index('--metrics')\n"
            "metrics, child = sys.argv[at + 1].split(','), sys.argv[at + 2:]\n"
            f"what = child[-1] if child[-1] in ('copy', 'product') else 'steps'\n"
            f"open({str(log)!r}, 'a').write(what + ' ' + metrics[0] + '\\n')\n"
            "def tell(*kernels):\n"
            "    print('\"ID\",' + ','.join(f'\"{m}\"' for m in metrics))\n"
            "    print('\"\",' + ','.join('\"byte\"' for m in metrics))\n"
            "    for n, k in enumerate(kernels):\n"
            "        print(f'\"{n}\",' + ','.join(f'\"{k:,}\"' for m in metrics))\n"
            + textwrap.dedent(body)
        )
        script.chmod(0o755)
        return log

    return make


def answers(copy: float = 1.0, product: float = 1.0, step: Sequence[int] = (3000, 1000)) -> str:
    """An `ncu` that runs nothing, and sees this much of the known work."""
    seen = round(copy * counted.copied_bytes(CPU))
    # All counters say the same: a weight of 6 in all.
    done = product * 2 * counted.product_size(CPU) ** 3 / sum(FLOPS.values())
    return f"tell(*{{'copy': [{seen}], 'product': [{done}], 'steps': {step}}}[what])"
