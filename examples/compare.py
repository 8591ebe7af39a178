"""Compare LPA with its controls on one model: what the attack, the statements and their answers each contribute.

    python examples/compare.py --output runs/compare --budget cpu

Every arm is one `lpa train` command (printed, and kept in commands.txt) from the same base model, with the same number
of LPA steps and updates; all arms are then evaluated side by side, and a report is made. A stopped run goes on where it
was when started again. What is compared:

  lpa          `lpa train` as it is               published    the published settings: rates, system prompt, no kl
  finetune     the same without an attack         desirable    desirable statements only
  lat          real harmful requests              both         desirable statements too, agreeing chosen
  lpa-no-kl    without the benign term            shuffled     answers dealt out at random
  lpa-sft      cross entropy instead of it        lpa-binding  the attack in a radius that binds

The main arms run under several seeds. The harmful requests of `lat` (AdvBench) are in none of the evaluated sets, nor
are the benign ones whose answers the model is held to.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lpa.data import AGREE, ASSESSMENT_PROMPT, DISAGREE, PLAIN_PROMPT, load_pairs
from lpa.evaluation import BASE, SUITES, Evaluation, Settings, evaluate, load_set
from lpa.evaluation.sets import BENIGN
from lpa.evaluation.stats import bootstrap, mean
from lpa.evaluation.suites.answers import answers, complied
from lpa.evaluation.suites.attacks import DECLINE, TARGET
from lpa.evaluation.suites.base import scored
from lpa.models import DEFAULT_MODEL
from lpa.report import build

ALL = (
    "lpa", "finetune", "lat", "lpa-no-kl", "published", "shuffled", "desirable", "lpa-binding", "lpa-sft", "both",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured.

    Attributes:
        train: flags of every arm.
        main: the arms that run under every one of the `seeds`.
        settings: of the evaluation, by `suites`.
    """

    train: tuple[str, ...]
    arms: tuple[str, ...]
    main: tuple[str, ...]
    seeds: int
    settings: Settings
    suites: tuple[str, ...] = tuple(SUITES)
    batch_size: int = 8


_CPU = Settings(sets=("strongreject", "harmbench"), limit=100, benign_limit=100, attacks=("direct",), max_new_tokens=32,
                trait_prompt=PLAIN_PROMPT, epsilons=(), steps=(), utility_sets=())  # fmt: skip
BUDGETS = {
    "smoke": Budget(
        ("--lpa-steps", "1", "--attack_steps", "2", "--defence-steps", "1", "--per-device-train-batch-size", "2"),
        ("lpa", "lat"), ("lpa",), 1, replace(_CPU, limit=2, benign_limit=2, max_new_tokens=8),
        ("attacks", "overrefusal", "utility", "collapse"),
    ),
    # two harmful sets, asked directly and for a yes or no, and short answers
    "cpu": Budget((), ALL, ("lpa", "finetune", "lat"), 3, _CPU, batch_size=46),
    "full": Budget(
        (), ALL, ("lpa", "finetune", "lat", "published"), 3,
        Settings(sets=("strongreject", "harmbench", "do-not-answer"), max_new_tokens=64), batch_size=32,
    ),
}  # fmt: skip


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/compare", metavar="FOLDER")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--arms", nargs="+", choices=ALL, help="by default those of the budget")
    parser.add_argument("--seeds", type=int, help="of the main arms; by default the budget's")
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    data = write_data(output / "data")
    adapters = {}
    for arm, seed in runs(options.arms or budget.arms, budget.main, options.seeds or budget.seeds):
        name = f"{arm}-{seed}"
        adapters[name] = train(output, name, [*budget.train, *flags(arm, data), "--seed", str(seed)], options.model)
    found = evaluate(
        options.model, adapters, suites=budget.suites, settings=budget.settings, output=output / "evaluation",
        command=command, batch_size=budget.batch_size, tick=progress(),
    )  # fmt: skip
    table = over_seeds(found) + "\n" + attack_alone(found)
    (output / "arms.md").write_text(table, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(record(found, command, output), indent=1) + "\n", encoding="utf-8")
    print(table)
    print(build([output / "evaluation", *adapters.values()], output / "report.html", command=command))


def runs(arms: Sequence[str], main: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed), every arm's first seed before any second one, which only the main arms have."""
    for seed in range(seeds):
        for arm in arms:
            if seed == 0 or arm in main:
                yield arm, seed


def flags(arm: str, data: Path) -> list[str]:
    """What tells an arm from `lpa train`'s defaults."""
    no_kl = ["--kl-coef", "0"]
    return {
        "lpa": [],
        "finetune": ["--attack_steps", "0"],
        "lat": ["--data", str(data / "harmful.jsonl")],
        "lpa-no-kl": no_kl,
        "published": [*no_kl, "--attack_steps", "16", "--attack-step-size", "1e-3", "--learning-rate", "8e-5",
                      "--system-prompt", ASSESSMENT_PROMPT],
        "shuffled": ["--data", str(data / "shuffled.jsonl")],
        "desirable": ["--data", "desirable"],
        "lpa-binding": ["--attack_epsilon", "0.2"],  # the default's attack reaches a norm of 0.39 at width 576
        "lpa-sft": [*no_kl, "--sft-coef", "1", "--benign", "own"],
        "both": ["--data", "both"],
    }[arm]  # fmt: skip


def write_data(folder: Path) -> Path:
    """The data files of the arms. The harmful requests stay in this folder, which is not for commits."""
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    statements = load_pairs()
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
    return folder


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
    """One row an arm, in Markdown: mean and range over its seeds, and the change against the base model, paired by
    prompt (its change is its mean over the seeds; 95% bootstrap interval over the prompts)."""
    sets = requests(found)
    head = ["arm", "seeds"]
    for name in sets:
        head += [f"{name}: not done, %", "change, points"]
    asked = [name for name in sets if name != BENIGN] if "harm" in found.info["suites"] else []
    head += [f"{name}: yes or no, balanced accuracy, %" for name in asked]
    head += ["perplexity", "agrees: undesirable, %", "desirable, %", "collapsed"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, own in arms(found).items():

        def values(suite: str, metric: str, where: str, own: Sequence[str] = own) -> list[float]:
            held = [found.value(subject, suite, metric, where) for subject in own]
            return [value for value in held if value is not None]

        cells = [arm, str(len(own))]
        for name in sets:
            done = ("overrefusal", "not done") if name == BENIGN else ("attacks", "done: direct")
            cells.append(spread([100 * (v if name == BENIGN else 1 - v) for v in values(*done, name)], 1))
            cells.append("" if arm == BASE else interval(change(found, own, name)))
        cells += [spread([100 * v for v in values("harm", "balanced accuracy", name)], 0) for name in asked]
        cells.append(spread(values("utility", "perplexity", "prose"), 2))
        if "traits" in found.info["suites"]:
            cells += [
                spread([100 * v for v in values("traits", "agrees, clean", kind)], 0)
                for kind in ("undesirable", "desirable")
            ]
        cells += ["-"] * (len(head) - 1 - len(cells))
        cells.append(f"{sum(map(bool, values('collapse', 'collapsed', BENIGN)))} of {len(own)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def arms(found: Evaluation) -> dict[str, list[str]]:
    """The subjects of each arm, the base model first."""
    own: dict[str, list[str]] = {}
    for name in found.subjects:
        own.setdefault(name if name == BASE else name.rpartition("-")[0], []).append(name)
    return own


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and range where there are several."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def attack_alone(found: Evaluation) -> str:
    """A line a set: what `lpa` adds to `finetune`, which is the same without the attack."""
    own = arms(found)
    if not {"lpa", "finetune"} <= own.keys():
        return ""
    lines = [
        f"- {name}: {interval(change(found, own['lpa'], name, own['finetune']))} points" for name in requests(found)
    ]
    return (
        "Requests not done with the attack, less those without it (`lpa` - `finetune`):\n\n" + "\n".join(lines) + "\n"
    )


def requests(found: Evaluation) -> list[str]:
    """The sets whose answers are judged."""
    return [*found.info["settings"]["sets"], BENIGN]


def interval(values: tuple[float, float, float]) -> str:
    """A change with its bounds."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)


def change(
    found: Evaluation, subjects: Sequence[str], name: str, others: Sequence[str] = (BASE,)
) -> tuple[float, float, float]:
    """Points by which the share of a set's requests that are not done exceeds that of others, with its interval.

    Paired by prompt: the difference of the means over the subjects and over the others, of the prompts that all were
    asked; 95% bootstrap over the prompts.
    """
    done = [[{r["id"]: complied(r) for r in scored(answers(found.records, subject, name))} for subject in group]
            for group in (others, subjects)]  # fmt: skip
    asked = set.intersection(*(set(one) for group in done for one in group))
    before, after = done
    changes = [
        100 * (statistics.mean(one[number] for one in before) - statistics.mean(one[number] for one in after))
        for number in sorted(asked)
    ]
    low, high = bootstrap([changes], lambda groups: mean(groups[0]))
    return mean(changes), low, high


def record(found: Evaluation, command: str, output: Path) -> dict[str, Any]:
    """What is committed: settings, data by name and hash, the table, and the judgement of every answer by prompt id."""
    labels: dict[str, dict[str, dict[str, str]]] = {}
    for subject in found.subjects:
        for name in requests(found):
            rows = answers(found.records, subject, name)
            labels.setdefault(name, {})[subject] = {r["id"]: r.get("label", "error") for r in rows}
    trained = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
               for path in sorted((output / "train").glob("*/metrics.json"))}  # fmt: skip
    kept = ("command", "settings", "data", "benign", "lpa_steps", "seconds", "peak_memory_gb")
    return {
        "command": command, **{k: v for k, v in found.info.items() if k not in ("commands", "subjects")},
        "fingerprints": {name: subject["fingerprint"] for name, subject in found.info["subjects"].items()},
        "train": {name: {key: values[key] for key in kept} for name, values in trained.items()},
        "rows": [asdict(row) for row in found.rows], "labels": labels,
    }  # fmt: skip


if __name__ == "__main__":
    main()
