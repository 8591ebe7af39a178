"""`pytest --benchmark-only`: the ops beside what a user would write otherwise."""

import pytest
import torch

from benchmarks.op_cases import all_cases, copy_bandwidth, device

CASES = all_cases()
GROUPS = list(dict.fromkeys(case.group for case in CASES))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.group} | {c.name}")
def test_op(benchmark, case):
    run = case.make()
    benchmark.group = case.group

    def timed():
        run()
        if device() == "cuda":
            torch.cuda.synchronize()

    big = case.moved > 1 << 26 or "128256" in case.group
    benchmark.pedantic(timed, rounds=5 if big else 30, warmup_rounds=2)
    if case.moved:
        rate = case.moved / benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(rate / 1e9, 1)
        benchmark.extra_info["share of copy"] = round(rate / copy_bandwidth(), 2)
