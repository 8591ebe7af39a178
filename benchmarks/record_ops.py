"""Measure the ops side by side and write benchmarks/results/<name>-<device>.json and a Markdown table.

    python -m benchmarks.record_ops [--rounds 7] [--only token_loss_ ... --name loss]

The ways of a group take turns, so that a noisy machine hits all alike; the ratio to ours is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.op_cases import Case, all_cases, copy_bandwidth, device, scale_bandwidth, seconds
from benchmarks.record_loop import RESULTS
from lpa_kernels.ops import native


def extra_mib(case: Case) -> float:
    """Peak resident memory of three calls above what their inputs take, in MiB, measured in a fresh process."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); from pathlib import Path;"
        "from benchmarks import record_ops as r; from benchmarks.record_loop import memory_kib;"
        f"case = next(c for c in r.all_cases() if (c.group, c.name) == {(case.group, case.name)!r});"
        "run = case.make(); before = memory_kib('VmRSS'); Path('/proc/self/clear_refs').write_text('5');"
        "[run() for _ in range(3)]; print(memory_kib('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def measure(cases: list[Case], rounds: int, ceiling: float | None = None) -> dict[str, Any]:
    """Seconds, bandwidth and memory of each way of one group. `ceiling`: of a copy, measured if it is not given."""
    runs = {case.name: case.make() for case in cases}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(rounds + 2):
        for name, run in runs.items():
            spent = seconds(run)
            if lap > 1:  # the first two warm up and compile
                times[name].append(spent)
    ours = cases[0].name
    found: dict[str, Any] = {}
    for case in cases:
        median = statistics.median(times[case.name])
        ratio = statistics.median(t / o for t, o in zip(times[case.name], times[ours], strict=True))
        found[case.name] = {"milliseconds": round(median * 1e3, 3), "times_ours": round(ratio, 2)}
        if case.moved:
            rate = case.moved / median
            share = rate / (ceiling or copy_bandwidth())
            found[case.name] |= {"GB/s": round(rate / 1e9, 1), "share_of_copy": round(share, 2)}
        if device() == "cpu" and "loss" in case.group and "128256" in case.group:
            found[case.name]["extra_mib"] = round(extra_mib(case), 1)
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for group, ways in results.items():
        lines += [
            f"**{group}**",
            "",
            "| | ms | times ours | GB/s | of the copy | extra MiB |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in ways.items():
            cells = [f"{row['milliseconds']:.3f}", f"{row['times_ours']:.2f}"]
            cells += [str(row.get(key, "")) for key in ("GB/s", "share_of_copy", "extra_mib")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def processor() -> str:
    """The GPU's name; or the CPU's, with the instruction set that the native kernels use there."""
    if device() == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    name = names[0] if names else platform.machine()
    return f"{name} ({torch.ops.lpa_kernels_native.cpu_kernels()})" if native.BUILT else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[""], help="groups whose title holds one of these")
    parser.add_argument("--name", default="ops", help="of the record")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in all_cases() if any(part in case.group for part in args.only)]
    copy, scale = copy_bandwidth(), scale_bandwidth()
    results = {}
    for group in dict.fromkeys(case.group for case in cases):
        results[group] = measure([case for case in cases if case.group == group], args.rounds)
        print(table({group: results[group]}), flush=True)
    record = {
        "command": " ".join(["python -m benchmarks.record_ops", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "copy_GB/s": round(copy / 1e9, 1),
        "scale_in_place_GB/s": round(scale / 1e9, 1),
        "results": results,
    }
    target = RESULTS / f"{args.name}-{device()}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".md").write_text(
        f"`{record['command']}`, {record['date']}, torch {torch.__version__}, {record['processor']}, "
        f"{record['threads']} threads; a large copy moves {record['copy_GB/s']} GB/s, a scaling in place "
        f"{record['scale_in_place_GB/s']} GB/s\n\n{table(results)}"
    )


if __name__ == "__main__":
    main()
