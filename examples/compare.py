"""Compare LPA with its controls on one model: what the attack, the statements and their answers each contribute.

    python examples/compare.py --output runs/compare --budget small

Every arm is one `lpa train` command (printed, and kept in commands.txt) from the same base model; all arms are then
evaluated side by side, and a report is made. A stopped run goes on where it was when started again. What is compared:

  lpa            undesirable statements, published attack          lpa-kl, lpa-sft    with a benign term
  lpa-binding    the attack in a radius that binds                 desirable          desirable statements only
  finetune       the same statements and updates, no attack        shuffled           answers dealt out at random
  lat            real harmful requests instead of statements

lpa, lpa-kl and finetune run under three seeds in the full budget. The benign term is on the base model's own answers to
requests that are in no evaluation. The harmful requests of `lat` (AdvBench) are in none of the evaluated sets.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lpa.data import AGREE, DISAGREE, PLAIN_PROMPT, load_pairs
from lpa.evaluation import BASE, Evaluation, Settings, evaluate, load_set
from lpa.evaluation.bench import Bench, batches, quiet_generation
from lpa.evaluation.suites.attacks import DECLINE, TARGET
from lpa.models import DEFAULT_MODEL, load
from lpa.report import build

MAIN = ("lpa", "lpa-kl", "finetune")  # arms that get every seed


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured. `train` are flags of every arm."""

    train: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int
    settings: Settings
    suites: tuple[str, ...] = ("traits", "harm", "attacks", "overrefusal", "utility", "collapse")


ALL = ("lpa", "lpa-binding", "lpa-kl", "lpa-sft", "finetune", "desirable", "shuffled", "lat")
SETS = ("strongreject", "harmbench")
BUDGETS = {
    "smoke": Budget(
        ("--lpa-steps", "1", "--steps", "2", "--defence-steps", "1", "--per-device-train-batch-size", "2"),
        ("lpa", "lat"),
        1,
        Settings(sets=("strongreject",), limit=2, attacks=("direct",), max_new_tokens=8, utility_limit=2),
        ("harm", "attacks", "overrefusal", "utility", "collapse"),
    ),
    "small": Budget(
        ("--lpa-steps", "8"),
        ALL,
        1,
        Settings(sets=("strongreject",), limit=40, attacks=("direct", "prefix"), max_new_tokens=48, utility_limit=50),
        ("harm", "attacks", "overrefusal", "utility", "collapse"),
    ),
    "full": Budget(
        ("--lpa-steps", "36"),
        ALL,
        3,
        Settings(
            sets=SETS, limit=100, attacks=("direct", "prefix", "template", "latent", "embedding"), max_new_tokens=64
        ),
    ),
}


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/compare", metavar="FOLDER")
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--arms", nargs="+", choices=ALL, help="by default those of the budget")
    parser.add_argument("--seeds", type=int, help="of the main arms; by default the budget's")
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    data = write_data(output / "data", options.model, answers=None if options.budget != "smoke" else 4)
    adapters = {}
    for arm, seed in runs(options.arms or budget.arms, options.seeds or budget.seeds):
        name = f"{arm}-{seed}"
        adapters[name] = train(output, name, [*budget.train, *flags(arm, data), "--seed", str(seed)], options.model)
    found = evaluate(
        options.model, adapters, suites=budget.suites, settings=budget.settings, output=output / "evaluation",
        command=shlex.join(["python", *sys.argv]), tick=progress(),
    )  # fmt: skip
    (output / "seeds.md").write_text(over_seeds(found), encoding="utf-8")
    print(found.markdown())
    print(over_seeds(found))
    print(build([output / "evaluation", *adapters.values()], output / "report.html", command=shlex.join(sys.argv)))


def runs(arms: Any, seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed), every arm's first seed before any second one."""
    for seed in range(seeds):
        for arm in arms:
            if seed == 0 or arm in MAIN:
                yield arm, seed


def flags(arm: str, data: Path) -> list[str]:
    """What tells an arm from `lpa train`'s defaults."""
    benign = ["--benign", str(data / "benign.jsonl")]
    return {
        "lpa": [],
        # 16 steps of 1e-3 reach a norm of 0.38 at width 576
        "lpa-binding": ["--epsilon", "0.2"],
        "lpa-kl": [*benign, "--kl-coef", "1"],
        "lpa-sft": [*benign, "--sft-coef", "1"],
        "finetune": ["--steps", "0"],
        "desirable": ["--data", str(data / "desirable.jsonl")],
        "shuffled": ["--data", str(data / "shuffled.jsonl")],
        "lat": ["--data", str(data / "harmful.jsonl"), "--system-prompt", PLAIN_PROMPT],
    }[arm]


def write_data(folder: Path, model: str, answers: int | None) -> Path:
    """The data files of the arms, written once. The harmful requests stay in this folder, which is not for commits.

    Args:
        answers: benign requests to answer, None for all.
    """
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    statements = load_pairs()
    write(folder / "desirable.jsonl", [pair(row) for row in load_pairs(kind="desirable")])
    draw = random.Random(0)
    dealt = [draw.random() < 0.5 for _ in statements]
    write(folder / "shuffled.jsonl", [
        {"prompt": row["prompt"], "rejected": DISAGREE if swap else AGREE, "chosen": AGREE if swap else DISAGREE}
        for row, swap in zip(statements, dealt, strict=True)
    ])  # fmt: skip
    harmful = load_set("advbench", limit=len(statements))
    if harmful.reason:
        raise SystemExit(f"the harmful requests of the arm lat cannot be had: {harmful.reason}")
    write(folder / "harmful.jsonl", [
        {"prompt": prompt.text, "rejected": TARGET, "chosen": DECLINE} for prompt in harmful.prompts
    ])  # fmt: skip
    if not (folder / "benign.jsonl").is_file():
        lines = files("lpa.data").joinpath("benign_train.jsonl").read_text(encoding="utf-8").split("\n")
        prompts = [json.loads(line)["prompt"] for line in lines if line][:answers]
        write(folder / "benign.jsonl", [
            {"prompt": prompt, "response": text}
            for prompt, text in zip(prompts, own_answers(model, prompts, 48 if answers is None else 8), strict=True)
        ])  # fmt: skip
    return folder


def own_answers(model: str, prompts: list[str], length: int) -> list[str]:
    """The base model's greedy answers."""
    loaded, tokenizer = load(model)
    bench = Bench(loaded, tokenizer, system_prompt=PLAIN_PROMPT, max_new_tokens=length)
    tokens = [bench.prompt_tokens(prompt) for prompt in prompts]
    with quiet_generation():
        return [text for chunk in batches(tokens, 8) for text in bench.answers(chunk)]


def pair(row: Any) -> dict[str, str]:
    """The columns that `lpa train` wants."""
    return {name: row[name] for name in ("prompt", "rejected", "chosen")}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines; the file is there whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


def train(output: Path, name: str, arguments: list[str], model: str) -> str:
    """The adapter of one arm: trained, gone on with, or there already."""
    folder = output / "train" / name
    if not (folder / "metrics.json").is_file():
        command = ["train", "--model", model, "--output", str(folder), *arguments, "--measure", "false"]
        if (folder / "settings.yaml").is_file():
            command = ["train", "--resume", "--output", str(folder)]
        with (output / "commands.txt").open("a", encoding="utf-8") as stream:
            stream.write(shlex.join(["lpa", *command]) + "\n")
        print(shlex.join(["lpa", *command]), flush=True)
        subprocess.run([sys.executable, "-m", "lpa", *command], check=True)
    return str(folder)


def progress() -> Any:
    """A line a phase."""
    last = [""]

    def tick(what: str, done: int, total: int) -> None:
        if what != last[0]:
            print(f"{what} ({total})", flush=True)
            last[0] = what

    return tick


def over_seeds(found: Evaluation) -> str:
    """Mean and range over the seeds of each arm, in Markdown."""
    wanted = [("attacks", "done: direct", name) for name in found.info["settings"]["sets"]]
    wanted += [("overrefusal", "not done", "benign"), ("utility", "perplexity", "prose")]
    arms = dict.fromkeys(name if name == BASE else name.rpartition("-")[0] for name in found.subjects)
    lines = ["| arm | seeds | " + " | ".join(f"{metric}, {where}" for _, metric, where in wanted) + " |"]
    lines.append("|---|---:|" + "---:|" * len(wanted))
    for arm in arms:
        own = [name for name in found.subjects if name == arm or name.rpartition("-")[0] == arm]
        cells = []
        for suite, metric, where in wanted:
            values = [found.value(name, suite, metric, where) for name in own]
            held = [value for value in values if value is not None]
            scale, digits = (1, 2) if metric == "perplexity" else (100, 1)
            text = f"{statistics.mean(held) * scale:.{digits}f}" if held else "-"
            if len(held) > 1:
                text += f" ({min(held) * scale:.{digits}f} to {max(held) * scale:.{digits}f})"
            cells.append(text)
        lines.append(f"| {arm} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
