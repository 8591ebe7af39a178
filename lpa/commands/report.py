"""`lpa report`: one HTML page of evaluations and training runs, with tables, plots, tests and sample answers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="lpa report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of lpa evaluate and lpa train")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--shareable", action="store_true", help="leave out answers to harmful requests altogether")
    options = parser.parse_args(arguments)
    from ..report import build

    command = shlex.join(["lpa", "report", *arguments])
    print(build(options.runs, options.output, shareable=options.shareable, command=command))
    return 0
