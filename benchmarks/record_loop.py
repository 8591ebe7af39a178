"""Measure the inner loop side by side and write benchmarks/results/<name>-<device>.json and a Markdown table.

    python -m benchmarks.record_loop [--rounds 5] [--steps 16] [--threads 1] [--shapes small smollm2 long] [--name N]

CPU time of each way, interleaved in one process so that a noisy machine hits all alike, as medians and as ratios to
the conventional loop round by round; peak memory above what stood before, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop_cases import LPA_STEPS, SHAPES, WAYS
from benchmarks.op_cases import device

RESULTS = Path(__file__).with_name("results")


def memory_kib(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_mib(kind: str, shape: str, way: str, threads: int) -> float:
    """Peak resident memory of one run above what stood before it, in MiB, measured in a fresh process."""
    code = (
        "import sys, torch; from pathlib import Path; from benchmarks import record_loop as r;"
        f"torch.set_num_threads({threads});"
        f"run = r.KINDS[{kind!r}][{way!r}]({shape!r}, 1); before = r.memory_kib('VmRSS');"
        "Path('/proc/self/clear_refs').write_text('5'); run(); print(r.memory_kib('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


KINDS = {"inner loop": WAYS, "LPA step": LPA_STEPS}


def measure(kind: str, shape: str, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """CPU seconds of every way (one list entry a round) and its peak memory."""
    runs = {way: make(shape, steps) for way, make in KINDS[kind].items()}
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for lap in range(rounds + 1):
        for way, run in runs.items():
            begin = time.process_time()
            run()
            if lap:  # the first one warms up
                seconds[way].append(time.process_time() - begin)
    base = next(iter(runs))
    return {
        way: {
            "cpu_seconds": [round(s, 4) for s in times],
            "median": round(statistics.median(times), 4),
            "ratio": round(statistics.median(b / t for b, t in zip(seconds[base], times, strict=True)), 2),
            "peak_mib": round(peak_mib(kind, shape, way, threads), 1),
        }
        for way, times in seconds.items()
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for title, ways in results.items():
        lines += [f"**{title}**", "", "| | CPU seconds | ratio | peak memory, MiB |", "|---|---|---|---|"]
        lines += [f"| {way} | {r['median']:.3f} | {r['ratio']:.2f} | {r['peak_mib']:.0f} |" for way, r in ways.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--name", default="inner-loop", help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for shape in args.shapes:
        for kind, steps in (("inner loop", args.steps), ("LPA step", 16)):
            if kind not in args.kinds or (kind == "LPA step" and shape == "long"):
                continue
            title = f"{kind}, {steps} inner steps: {SHAPES[shape].name}"
            rounds = args.rounds if kind == "inner loop" else max(1, args.rounds // 2)
            results[title] = measure(kind, shape, rounds, steps, args.threads)
            print(table({title: results[title]}), flush=True)
    import transformers

    record = {
        "command": shlex.join(["python", "-m", "benchmarks.record_loop", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": device(),
            "threads": args.threads,
        },
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{args.name}-{device()}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".md").write_text(f"`{record['command']}`, {record['date']}\n\n{table(results)}")


if __name__ == "__main__":
    main()
