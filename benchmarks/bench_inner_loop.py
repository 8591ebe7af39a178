"""`pytest --benchmark-only`: two inner steps by each engine and by the conventional loop, in CPU time."""

import time

import pytest

from benchmarks.loop_cases import SHAPES, WAYS

STEPS = 2  # of the 16: the loop does the same in each


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "long"])  # takes minutes: see record_loop
def test_inner_loop(benchmark, shape, way):
    benchmark.group = f"{STEPS} inner steps | {SHAPES[shape].name}"
    run = WAYS[way](shape, STEPS)
    benchmark.pedantic(run, rounds=2, warmup_rounds=1)
