"""The ops piece: every op beside what one would write otherwise, cold, replayed in a graph, and by launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.op_cases import Case, all_cases, copy_bandwidth, device, gpu_cases, seconds, tiny_cases
from benchmarks.record_ops import measure

from .worker import Cases, Setting

GOAL, WISH = 0.85, 0.90  # of the copy's bandwidth, for tensors beyond the L2
REPEATS = 20


def kernels(run: Callable[[], object]) -> int:
    """How many kernels and copies a call launches on the GPU."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def replayed(run: Callable[[], object]) -> float:
    """Microseconds of a call replayed in a CUDA graph, many in a row, so that the host plays no part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    return min(seconds(graph.replay) for _ in range(7)) / REPEATS * 1e6


def group(cases: list[Case], rounds: int, ceiling: float) -> dict[str, Any]:
    """One group of cases."""
    torch._dynamo.reset()  # or a compiled function would take this group's shapes for dynamic ones
    found = measure(cases, rounds, ceiling)
    if device() == "cuda":
        for case in cases:
            row, run = found[case.name], case.make()
            row["launches"] = kernels(run)
            if case.name.startswith("ours") and case.moved:  # others may wait for the host, which no graph can
                row["replayed us"] = round(replayed(run), 2)
        beyond = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        for case in cases:  # what is smaller is bound by launches, or helped by the L2
            if case.name.startswith("ours") and case.moved > beyond:
                found[case.name]["meets the goal"] = found[case.name]["share_of_copy"] >= GOAL
    return found


def ops(setting: Setting) -> Cases:
    """The piece: a case a group of ways."""
    cases = tiny_cases() if setting.dry else [*gpu_cases(), *all_cases()]
    if setting.dry:
        cases = [case for case in cases if "compile" not in case.name]
    ceiling = copy_bandwidth(1 << 20) if setting.dry else copy_bandwidth()
    rounds = 1 if setting.dry else 15
    for name in dict.fromkeys(case.group for case in cases):
        own = [case for case in cases if case.group == name]
        yield name, lambda own=own: group(own, rounds, ceiling)
