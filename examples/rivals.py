"""Compare adversaries on one budget of passes: LAT, ER-CAT, a direction ablated, a direction added, and noise.

    python examples/rivals.py --output runs/rivals [--seeds 3]

Every arm trains LoRA on the same harmful requests (AdvBench, declined), 4 a batch, with 4 updates an LPA step and a KL
term to the model's own answers to benign requests, and as many LPA steps as its inner steps leave of the same number of
forward and backward passes of a batch:

  lat       16 inner steps of AdamW at embedding and layers (arXiv 2407.15549)
  er-cat    10 normalised steps at the embedding, radius 0.05, without the singular-value term (ICLR 2026)
  ablate    the refusal direction projected out at half of the tokens and layers (ReFAT, arXiv 2409.20089)
  vector    the direction from refusal to compliance added (preventative steering, arXiv 2507.21509)
  random    noise of the size that lat's attack reaches

Directions lie between the training requests and benign ones that are never evaluated. What is measured: StrongREJECT
and benign requests, asked directly and under a latent attack, and perplexity.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from lpa.evaluation import Evaluation, Settings, evaluate
from lpa.evaluation.sets import benign_prompts, load_unasked
from lpa.evaluation.suites.attacks import DECLINE, TARGET
from lpa.evaluation.table import arms, mean_range
from lpa.files import write_json, write_text
from lpa.models import DEFAULT_MODEL

# batches of 4 pairs, and a KL term to the model's own answers, once an LPA step
COMMON = ["--preset", "quick", "--learning_rate", "6e-4", "--benign_every", "4", "--measure", "false"]
PASSES, UPDATES = 80, 4  # forward and backward passes of a batch; of which updates, an LPA step
INNER = {"lat": 16, "er-cat": 10, "ablate": 0, "vector": 0, "random": 0}
SETTINGS = Settings(sets=("strongreject",), limit=40, benign_limit=40, attacks=("direct", "latent"), attack_steps=5,
                    max_new_tokens=24, epsilons=(), steps=(), utility_sets=())  # fmt: skip
COLUMNS = {
    "harm done, %": ("attacks", "done: direct", 100), "under a latent attack, %": ("attacks", "done: latent", 100),
    "refused, %": ("attacks", "not done: own words", 100),
    "trained sentence, %": ("attacks", "not done: trained sentence", 100),
    "benign not done, %": ("overrefusal", "not done", 100), "perplexity": ("utility", "perplexity", 1),
}  # fmt: skip


def flags(arm: str, data: Path, passes: int = PASSES) -> list[str]:
    """The options of `lpa train` that make an arm."""
    harmful, benign = str(data / "harmful.txt"), str(data / "benign.txt")
    adversary = {
        "lat": ["--attack_step_size", "1e-3"],
        "er-cat": ["--attack_sites", "embedding", "--attack_on", "prompt", "--attack_rule", "normalised",
                   "--attack_epsilon", "0.05", "--attack_step_size", "1e-2", "--attack_away_coef", "0"],
        "ablate": ["--attack_adversary", "ablate", "--attack_share", "0.5", "--attack_direction", harmful, benign],
        "vector": ["--attack_adversary", "vector", "--attack_norm", "none", "--attack_direction", benign, harmful],
        "random": ["--attack_adversary", "random", "--attack_epsilon", "0.4"],
    }[arm]  # fmt: skip
    steps = max(1, round(passes / (INNER[arm] + UPDATES)))
    return [
        "--data", str(data / "harmful.jsonl"), "--lpa_steps", str(steps), "--defence_steps", str(UPDATES),
        "--attack_steps", str(INNER[arm] or 1), *adversary,
    ]  # fmt: skip


def write_data(folder: Path) -> Path:
    """The requests of training, and two sets to find directions between. The folder is not for commits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    found = load_unasked("advbench", SETTINGS.sets, 64)  # AdvBench shares texts with StrongREJECT
    if found.reason:
        raise SystemExit(f"the harmful requests cannot be had: {found.reason}")
    rows = [{"prompt": prompt.text, "rejected": TARGET, "chosen": DECLINE} for prompt in found.prompts]
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, prompts in (("harmful", found.prompts), ("benign", benign_prompts("benign_canary.jsonl"))):
        lines = [" ".join(prompt.text.split()) for prompt in prompts]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def over_seeds(found: Evaluation) -> str:
    """One row an arm, in Markdown: means and ranges over its seeds."""
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for arm, names in arms(found.subjects).items():
        cells = []
        for suite, metric, scale in COLUMNS.values():
            rows = [row for row in found.rows if row.subject in names and (row.suite, row.metric) == (suite, metric)]
            values = [scale * row.value for row in rows if row.value is not None and "(" not in row.set]
            cells.append(mean_range(values, 0 if scale == 100 else 1))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/rivals"), metavar="FOLDER")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--arms", nargs="+", choices=list(INNER), default=list(INNER))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=PASSES)
    options = parser.parse_args()
    data = write_data(options.output / "data")
    adapters = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            folder = options.output / "train" / f"{arm}-{seed}"
            adapters[f"{arm}-{seed}"] = str(folder)
            if (folder / "metrics.json").is_file():
                continue
            command = ["train", "--model", options.model, "--output", str(folder), "--seed", str(seed), *COMMON,
                       *flags(arm, data, options.passes)]  # fmt: skip
            print(shlex.join(["lpa", *command]), flush=True)
            subprocess.run([sys.executable, "-m", "lpa", *command], check=True)
    shown = shlex.join(["python", *sys.argv])
    found = evaluate(
        options.model, adapters, suites=("attacks", "overrefusal", "utility"), settings=SETTINGS,
        output=options.output / "evaluation", command=shown,
    )  # fmt: skip
    made = {name: found.info[name] for name in ("versions", "started", "settings", "data")}
    record = {"command": shown, "passes": options.passes, **made, "rows": [asdict(row) for row in found.rows]}
    write_json(options.output / "results.json", record, nulls=True)
    table = over_seeds(found)
    write_text(options.output / "arms.md", table)
    print(table)


if __name__ == "__main__":
    main()
