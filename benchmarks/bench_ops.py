"""`pytest --benchmark-only`: the ops beside what a user would write otherwise, on caches that a GPU call finds cold."""

import os

import pytest
import torch

from benchmarks.measure import cold, device
from benchmarks.op_cases import all_cases


@pytest.fixture(scope="module", autouse=True)
def every_core():
    """The tests beside these run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", all_cases(), ids=lambda c: f"{c.group} | {c.name}")
def test_op(benchmark, report, case):
    run = case.make()
    benchmark.group = case.group

    def timed():
        run()
        if device() == "cuda":
            torch.cuda.synchronize()

    big = case.moved > 1 << 26 or "128256" in case.group
    benchmark.pedantic(timed, setup=cold, rounds=5 if big else 30, warmup_rounds=2)
    if benchmark.stats:  # None where --benchmark-disable only tries each case once
        report(case.group, case.name, benchmark.stats.stats.median, case.moved)
