"""Measure the ops side by side and write benchmarks/results/<name>-<device>.json and a Markdown table.

    python -m benchmarks.record_ops [--rounds 7] [--only token_loss_ ... --name loss]

The ways of a group take turns, so that a noisy machine hits all alike; the ratio to ours is the median over the turns.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.measure import (
    RESULTS,
    Run,
    copy_bandwidth,
    device,
    in_turns,
    made_with,
    median_ratio,
    peak_in_a_process,
    product_rate,
    scale_bandwidth,
    table,
    write_record,
)
from benchmarks.op_cases import Case, all_cases

COLUMNS = ("milliseconds", "times_ours", "GB/s", "share_of_copy", "GFLOP/s", "share_of_product", "extra_mib")


def three_calls(group: str, name: str) -> Run:
    """Three calls of a case, for a process that measures their memory."""
    run = next(case for case in all_cases() if (case.group, case.name) == (group, name)).make()
    return lambda: [run() for _ in range(3)]


def measure(cases: list[Case], rounds: int, ceiling: float | None = None) -> dict[str, dict[str, Any]]:
    """Seconds, bandwidth and memory of each way of one group. `ceiling`: of a copy, measured if it is not given."""
    times = in_turns({case.name: case.make() for case in cases}, rounds, warm_up=2)  # the first two compile
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        median = statistics.median(times[case.name])
        ratio = median_ratio(times[case.name], times[cases[0].name])
        row: dict[str, Any] = {"milliseconds": round(median * 1e3, 3), "times_ours": round(ratio, 2)}
        if case.moved:
            rate = case.moved / median
            row |= {"GB/s": round(rate / 1e9, 1), "share_of_copy": round(rate / (ceiling or copy_bandwidth()), 2)}
        if case.operations:
            rate = case.operations / median
            row["GFLOP/s"] = round(rate / 1e9, 1)
            if device() == "cpu":  # a GPU's product in float32 is no ceiling of those in half precision
                row["share_of_product"] = round(rate / product_rate(), 2)
        if device() == "cpu" and "loss" in case.group and "128256" in case.group:
            expression = f"three_calls({case.group!r}, {case.name!r})"
            row["extra_mib"] = round(peak_in_a_process("benchmarks.record_ops", expression), 1)
        found[case.name] = row
    return found


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as Markdown."""
    head = ["", "ms", "times ours", "GB/s", "of the copy", "GFLOP/s", "of a product", "extra MiB"]
    return "\n".join(
        f"**{group}**\n\n{table(head, [[way, *(row.get(c, '') for c in COLUMNS)] for way, row in ways.items()])}"
        for group, ways in results.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[""], help="groups whose title holds one of these")
    parser.add_argument("--name", default="ops", help="of the record")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in all_cases() if any(part in case.group for part in args.only)]
    measured = {
        "copy_GB/s": copy_bandwidth(),
        "scale_in_place_GB/s": scale_bandwidth(),
        "product_GFLOP/s": product_rate(),
    }
    ceilings = {name: round(rate / 1e9, 1) for name, rate in measured.items()}
    results = {}
    for group in dict.fromkeys(case.group for case in cases):
        results[group] = measure([case for case in cases if case.group == group], args.rounds)
        print(page({group: results[group]}), flush=True)
    said = (
        "a large copy moves {copy_GB/s} GB/s, a scaling in place {scale_in_place_GB/s} GB/s, a large product runs at "
        "{product_GFLOP/s} GFLOP/s".format(**ceilings)
    )
    record = made_with() | ceilings | {"results": results}
    write_record(RESULTS / f"{args.name}-{device()}.json", record, f"{said}\n\n{page(results)}")


if __name__ == "__main__":
    main()
