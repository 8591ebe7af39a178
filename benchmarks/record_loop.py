"""Measure the inner loop side by side and write benchmarks/results/<name>-<device>.json and a Markdown table.

    python -m benchmarks.record_loop [--rounds 5] [--steps 16] [--threads 1] [--shapes small smollm2 long] [--name N]

CPU time of each way, interleaved in one process so that a noisy machine hits all alike, as medians and as ratios to
the conventional loop round by round; peak memory above what stood before, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.loop_cases import LPA_STEPS, SHAPES, WAYS
from benchmarks.measure import (
    RESULTS,
    device,
    in_turns,
    made_with,
    median_ratio,
    peak_in_a_process,
    table,
    write_record,
)

KINDS = {"inner loop": WAYS, "LPA step": LPA_STEPS}


def measure(kind: str, shape: str, rounds: int, steps: int) -> dict[str, Any]:
    """CPU seconds of every way (one list entry a round) and its peak memory."""
    seconds = in_turns({way: make(shape, steps) for way, make in KINDS[kind].items()}, rounds)
    base = next(iter(seconds.values()))
    return {
        way: {
            "cpu_seconds": [round(s, 4) for s in times],
            "median": round(statistics.median(times), 4),
            "ratio": round(median_ratio(base, times), 2),
            "peak_mib": round(peak_in_a_process("benchmarks.record_loop", f"KINDS[{kind!r}][{way!r}]({shape!r}, 1)")),
        }
        for way, times in seconds.items()
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = ("", "CPU seconds", "ratio", "peak memory, MiB")
    return "\n".join(
        f"**{title}**\n\n"
        + table(head, ((way, f"{r['median']:.3f}", f"{r['ratio']:.2f}", r["peak_mib"]) for way, r in ways.items()))
        for title, ways in results.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            results[title] = measure(kind, shape, rounds, steps)
            print(page({title: results[title]}), flush=True)
    write_record(RESULTS / f"{args.name}-{device()}.json", made_with() | {"results": results}, page(results))


if __name__ == "__main__":
    main()
