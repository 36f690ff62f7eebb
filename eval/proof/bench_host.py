"""The host's work for a decode step, which a GPU must not wait for: books, plan, what is sent."""

import gc
import statistics
import time

import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from infer.store import StateStore

ARCH, SCALE, BATCH = "gdn:gqa=3:1", "1b", 64
#: Steps at one length: every 64th turns a page of all sequences at once.
STEPS, WARMUP = 1024, 64


def host_work_ms(lookback: int) -> tuple[float, float]:
    """Median and 99th percentile of the host's milliseconds for one step of the 1b hybrid.

    The state has no memory (device meta): nothing but the host is timed.
    """
    specs = ModelSpec(arch=ARCH, scale=get_scale(SCALE)).outline(torch.bfloat16).state_specs()
    store = StateStore(
        specs, max_sequences=BATCH, max_context=8192, lookback=lookback, device="meta",
        kernels=True,
    )  # fmt: skip
    times = []
    with store.sequences(BATCH) as sequences:
        store.fill(sequences, 4096)
        gc.collect()
        for _ in range(WARMUP + STEPS):
            began = time.perf_counter()
            with store.step(sequences, 1) as step:
                step.send(BATCH)
            times.append((time.perf_counter() - began) * 1e3)
    spans = statistics.quantiles(times[WARMUP:], n=100)
    return spans[49], spans[98]
