"""python -m benchmarks.gpu [PIECE ...] [--out DIR] [--device cuda|cpu] [--dry] [--minutes N] [--bundle FILE]

Runs the pieces that are not done yet, each in a process of its own with a time limit; started again, it goes on where
it was. Then makes the report of all parts that there are: benchmarks/results/GPU-DATE.json and .md, or in DIR alone
where the device is the CPU or the run is dry.

    python -m benchmarks.gpu --list                               what there is
    python -m benchmarks.gpu --minutes 9 --bundle parts.json      begin nothing after 8 minutes; all parts in one file
    python -m benchmarks.gpu --from parts.json                    go on from there on another such machine
    python -m benchmarks.gpu report --from parts.json             the report alone
    python -m benchmarks.gpu --device cpu --dry --out runs/dry    try every piece on tiny shapes
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from . import parts, report
from .pieces import NAMES, PIECES
from .runner import Options, run_all

OUT = Path("runs/gpu")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="by default all, then report")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"for the parts; {OUT} by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to try the code and measure nothing")
    parser.add_argument("--again", action="store_true", help="run pieces that are done once more, from the start")
    parser.add_argument("--no-retry", action="store_true", help="leave pieces that failed as they are")
    parser.add_argument("--minutes", type=float, help="for all pieces together; nothing is begun in the last one")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="all parts in one file, renewed after every piece")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="parts of an earlier run's bundle")
    parser.add_argument("--list", action="store_true", help="list the pieces")
    args = parser.parse_args()
    if args.list:
        for piece in PIECES:
            print(f"{piece.name:16} {piece.minutes:3.0f} min  {piece.about}")
        return 0
    begun = time.time()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and the worker is ended on the way
    if args.device == "cuda" and set(args.pieces) != {"report"} and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --dry tries the pieces without one")
    wanted = args.pieces or [*NAMES, "report"]
    if unknown := sorted(set(wanted) - {*NAMES, "report"}):
        parser.error(f"unknown pieces {', '.join(unknown)}; there are {', '.join(NAMES)} and report")
    if args.source:
        print("taken over:", ", ".join(parts.unbundle(args.source, args.out)) or "nothing new")
    # without the folders of this machine, which are nobody's business
    own = [*args.pieces, *(["--dry"] if args.dry else []), *(["--device", "cpu"] if args.device == "cpu" else [])]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *own])
    stop = begun + 60 * (args.minutes - 1) if args.minutes else float("inf")
    options = Options(args.out, args.device, args.dry, args.again, not args.no_retry, stop, command)
    bundled = (lambda: parts.bundle(args.out, NAMES, args.bundle)) if args.bundle else (lambda: None)
    found = run_all([piece for piece in PIECES if piece.name in wanted], options, bundled)
    bundled()
    if "report" in wanted:
        print(report.write(args.out, NAMES))
    return int(any(status.startswith("failed") for status in found.values()))


if __name__ == "__main__":
    sys.exit(main())
