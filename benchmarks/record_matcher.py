"""Record how often the refusal matcher errs on answers that people labelled: precision and recall with intervals.

    python -m benchmarks.record_matcher --xstest FOLDER --output benchmarks/results/refusal-matcher.json

FOLDER holds XSTest's labelled completions (xstest_v2_completions_*.csv of paul-rottger/xstest, CC-BY-4.0), which
are not part of this repository. Without it only the answers in the package index's assets are measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lpa import assets
from lpa.evaluation.refusal import (
    JudgementError,
    Labelled,
    judged,
    measured_errors,
    objective_answers,
    xstest_answers,
)
from lpa.evaluation.stats import wilson
from lpa.files import file_hash, write_json

COMMAND = "python -m benchmarks.record_matcher"
# The completions whose errors were read while the rules were written; those of the other two models were only counted.
READ = ("gpt4", "llama2orig", "mistralinstruct")


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xstest", type=Path, metavar="FOLDER", help="of XSTest's labelled completions")
    parser.add_argument("--output", default="benchmarks/results/refusal-matcher.json", metavar="FILE")
    options = parser.parse_args()
    errors, hashes = list(measured_errors()), dict[str, str]()
    for name in ("advbench", "objectives"):
        hashes |= {file: digest for file, (_, digest) in assets.get(name).files.items() if file.endswith(".csv")}
    folder = assets.fetch("objectives")
    achieved = [row for file in assets.get("objectives").files for row in objective_answers(folder / file)]
    errors += judged("objectives not achieved, all 14 files", achieved)
    if options.xstest is not None:
        files = sorted(options.xstest.expanduser().glob("*completions*.csv"))
        if not files:
            parser.error(f"{options.xstest} holds no file *completions*.csv")
        hashes |= {file.name: file_hash(file) for file in files}
        errors += xstest(files)
    found = {
        "command": COMMAND + (" --xstest FOLDER" if options.xstest else ""),
        "sha256": hashes,
        "positive": "labelled a refusal; of XSTest a full one, partial ones are left out; of objectives: not achieved",
        "judges": {"wording": "refusals by their wording", "judge": "all that is not compliance"},
        "results": [row(error) for error in errors],
    }
    write_json(Path(options.output), found)
    for line in found["results"]:
        print(line)


def xstest(files: list[Path]) -> list[JudgementError]:
    """Both judges on all completions, on those whose errors were read, and on those whose errors were not."""
    parts: dict[str, list[Labelled]] = {"XSTest, all": [], "XSTest, errors read": [], "XSTest, errors not read": []}
    for file in files:
        rows = xstest_answers(file)
        parts["XSTest, all"] += rows
        parts["XSTest, errors read" if file.stem.endswith(READ) else "XSTest, errors not read"] += rows
    return [error for name, rows in parts.items() if rows for error in judged(name, rows)]


def row(error: JudgementError) -> dict[str, Any]:
    """One judge on one set of answers: counts, and precision, recall and specificity with 95% intervals (Wilson)."""
    hits, judged_so = error.true_positive, error.true_positive + error.false_positive
    labelled, others = error.true_positive + error.false_negative, error.true_negative + error.false_positive
    return {
        "judge": error.judge, "file": error.file, "answers": error.total, "labelled_refusals": labelled,
        "true_positive": hits, "false_positive": error.false_positive, "false_negative": error.false_negative,
        "true_negative": error.true_negative,
        "precision": [error.precision, *wilson(hits, judged_so)], "recall": [error.recall, *wilson(hits, labelled)],
        "specificity": [error.specificity, *wilson(error.true_negative, others)],
    }  # fmt: skip


if __name__ == "__main__":
    main()
