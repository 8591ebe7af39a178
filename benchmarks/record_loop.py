"""Measure the inner loop side by side and write benchmarks/results/<name>-<device>.json and a Markdown table.

    python -m benchmarks.record_loop [--rounds 5] [--steps 16] [--threads 1] [--shapes small smollm2 long] [--name N]
        [--ways "frozen stack" ...] [--beside CHECKOUT]

CPU time of each way, interleaved in one process so that a noisy machine hits all alike, as medians and as ratios to
the conventional loop round by round; peak memory above what stood before, of a first call with its checks and of a
second one, each way in a process of its own. A checkout of another commit takes its turns in a process of its own,
with what its engine "auto" takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop_cases import LPA_STEPS, SHAPES, WAYS, Shape, batch_of
from benchmarks.measure import (
    RESULTS,
    device,
    made_with,
    median_ratio,
    peak_in_a_process,
    revision,
    table,
    write_record,
)
from benchmarks.measure import (
    seconds as seconds_of,
)

KINDS = {"inner loop": WAYS, "LPA step": LPA_STEPS}


# What another commit runs: attacks by its own code, each when a line comes in; it answers with its CPU seconds.
BESIDE = """
import json, sys, time, torch
torch.set_num_threads(json.loads(sys.argv[1])["threads"])
from benchmarks.loop_cases import EPSILON, STEP_SIZE, Shape, model_of
from lpa_kernels import LatentPGD, PairBatch
given = json.loads(sys.argv[1])
shape, options = Shape(**given["shape"]), {"epsilon": EPSILON, "step_size": STEP_SIZE, **given["options"]}
pgd, batch = LatentPGD(model_of(shape), shape.sites, **options), PairBatch(**torch.load(given["batch"]))
for _ in sys.stdin:
    begin = time.process_time()
    pgd.attack(batch)
    print("took", time.process_time() - begin, flush=True)
"""


class Beside:
    """Attacks by another checkout of this project, in a process of its own."""

    def __init__(self, folder: Path, shape: Shape, steps: int, backend: str) -> None:
        batch = batch_of(shape)
        held = tempfile.NamedTemporaryFile(suffix=".pt")  # noqa: SIM115  for as long as this is
        fields = ("rejected_ids", "rejected_mask", "chosen_ids", "chosen_mask", "attack_mask")
        torch.save({name: getattr(batch, name) for name in fields}, held.name)
        plain = {key: value for key, value in asdict(shape).items() if key not in ("dtype", "ragged", "late")}
        given = {"threads": torch.get_num_threads(), "shape": plain, "batch": held.name,
                 "options": {"steps": steps, "backend": backend}}  # fmt: skip
        self.held = held
        self.process = subprocess.Popen(
            [sys.executable, "-c", BESIDE, json.dumps(given)], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(folder)},
        )  # fmt: skip

    def seconds(self) -> float:
        """CPU seconds of one attack."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("took "):
                return float(line.split()[1])
        raise RuntimeError(f"the other checkout ended with {self.process.wait()}")


def measure(
    kind: str, shape: str, rounds: int, steps: int, chosen: list[str] | None = None, beside: Path | None = None
) -> dict[str, Any]:
    """CPU seconds of every way (one list entry a round), the conventional one first, and its peak memory."""
    ways = {way: make for way, make in KINDS[kind].items() if chosen is None or way in chosen}
    runs = {way: make(shape, steps) for way, make in ways.items()}
    others = {}
    if beside is not None:
        backends = {"": "reference", ", native ops": "native"}
        others = {f"{(revision(beside) or 'other')[:7]}{ending}": Beside(beside, SHAPES[shape], steps, backend)
                  for ending, backend in backends.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in [*runs, *others]}
    for lap in range(rounds + 1):
        for way in seconds:
            taken = others[way].seconds() if way in others else seconds_of(runs[way])
            if lap:  # the first one warms up
                seconds[way].append(taken)
    base = next(iter(seconds.values()))
    found: dict[str, Any] = {
        way: {
            "cpu_seconds": [round(s, 4) for s in times],
            "median": round(statistics.median(times), 4),
            "ratio": round(median_ratio(base, times), 2),
        }
        for way, times in seconds.items()
    }
    for way in runs:
        expression = f"KINDS[{kind!r}][{way!r}]({shape!r}, 1)"
        for calls, name in enumerate(("peak_mib", "later_peak_mib")):
            found[way][name] = round(peak_in_a_process("benchmarks.record_loop", expression, calls))
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = ("", "CPU seconds", "ratio", "peak memory, MiB", "of a later attack")
    peaks = ("peak_mib", "later_peak_mib")
    return "\n".join(
        f"**{title}**\n\n"
        + table(
            head,
            (
                (way, f"{r['median']:.3f}", f"{r['ratio']:.2f}", *(r.get(name, "") for name in peaks))
                for way, r in ways.items()
            ),
        )
        for title, ways in results.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--ways", nargs="+", help="these alone; by default all")
    parser.add_argument("--beside", type=Path, help="a checkout of another commit, built as this one is")
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
            results[title] = measure(kind, shape, rounds, steps, args.ways, args.beside)
            print(page({title: results[title]}), flush=True)
    write_record(RESULTS / f"{args.name}-{device()}.json", made_with() | {"results": results}, page(results))


if __name__ == "__main__":
    main()
