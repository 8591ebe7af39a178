"""Closeness, CPU time and peak memory, measured the same way in every comparison."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def cpu_seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """CPU seconds of this process for each call, all in turn, `repeats` times after one for warming up.

    Returns:
        the report (all seconds, their medians, and the ratio of the first call's median to each other's), and what
        each call gave.
    """
    results = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    ratios = {name: first / median for name, median in medians.items()}
    return {"cpu_seconds": seconds, "cpu_seconds_median": medians, "ratio": ratios}, results


def resident(field: str) -> float:
    """A line of this process's memory status ("VmRSS", "VmHWM"), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def peak_above_start(call: Callable[[], Any]) -> int:
    """MiB that a call's peak resident set lies above what the process held before it."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    call()
    return round(resident("VmHWM") - before)


def peaks(script: str, arguments: Iterable[str], names: Sequence[str]) -> dict[str, Any]:
    """What `script --memory NAME` prints, each in a process of its own, and the ratio of the first to the last."""
    found = {}
    for name in names:
        command = [sys.executable, script, *arguments, "--memory", name]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(result.stdout.splitlines()[-1])
    return {"peak_mib_above_start": found, "ratio": found[names[0]] / max(found[names[-1]], 1)}
