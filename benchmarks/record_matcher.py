"""Record how often the refusal matcher errs on answers that people labelled: precision and recall with intervals.

python -m benchmarks.record_matcher --output benchmarks/results/refusal-matcher.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lpa import assets
from lpa.evaluation.refusal import JudgementError, measured_errors
from lpa.evaluation.stats import wilson
from lpa.files import write_json

COMMAND = "python -m benchmarks.record_matcher"


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/refusal-matcher.json", metavar="FILE")
    options = parser.parse_args()
    asset = assets.get("advbench")
    found = {
        "command": COMMAND,
        "answers": f"{asset.package} {asset.version}, labelled by people: a refusal, or an answer to another question",
        "sha256": {file: digest for file, (_, digest) in asset.files.items() if file.startswith("refusal")},
        "positive": "labelled a refusal",
        "judges": {"wording": "phrases of refusal alone", "judge": "all that is not compliance"},
        "results": [row(error) for error in measured_errors()],
    }
    write_json(Path(options.output), found)
    for line in found["results"]:
        print(line)


def row(error: JudgementError) -> dict[str, Any]:
    """One judge on one file: counts, and precision and recall with their 95% intervals (Wilson)."""
    hits, judged = error.true_positive, error.true_positive + error.false_positive
    labelled = error.true_positive + error.false_negative
    return {
        "judge": error.judge, "file": error.file, "answers": error.total, "labelled_refusals": labelled,
        "true_positive": hits, "false_positive": error.false_positive, "false_negative": error.false_negative,
        "true_negative": error.true_negative,
        "precision": [error.precision, *wilson(hits, judged)], "recall": [error.recall, *wilson(hits, labelled)],
    }  # fmt: skip


if __name__ == "__main__":
    main()
