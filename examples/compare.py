"""Compare LPA with its controls on one model: what the attack, the statements and their answers each contribute.

    python examples/compare.py --output runs/compare --budget cpu

Every arm is one `lpa train` command (printed, and kept in commands.txt) from the same base model; all arms are then
evaluated side by side, the main ones climb the ladder of attacks, and a report is made. A stopped run goes on where it
was when started again. Arms, by what differs from `lpa train`:

  lpa             nothing                         lpa-no-kl, lpa-sft  another benign term
  finetune        no attack                       lpa-binding         the attack in a radius that binds
  toward-only     the preset                      undesirable, desirable, both, inverted, irrelevant, shuffled
  published-2607  the preset, scaled                                    the statements and their answers
  published-2605  the preset
  lat             real harmful requests           ipip-both           the IPIP inventory

The main arms run under several seeds. The harmful requests of `lat` (AdvBench) are in none of the evaluated sets, nor
are the benign ones whose answers the model is held to.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lpa.data import PLAIN_PROMPT, load_pairs
from lpa.evaluation import BASE, SUITES, Evaluation, Settings, evaluate, load_set
from lpa.evaluation.sets import BENIGN
from lpa.evaluation.stats import mean
from lpa.evaluation.suites.answers import answers
from lpa.evaluation.suites.attacks import DECLINE, TARGET
from lpa.evaluation.verdict import DECLINES, HOLDS, KEEPS, claims
from lpa.models import DEFAULT_MODEL
from lpa.report import build

STATEMENTS = ("undesirable", "desirable", "both", "inverted", "irrelevant", "shuffled", "ipip-both")
ALL = (
    "lpa", "finetune", "lat", "toward-only", "published-2607", "published-2605", "lpa-no-kl", "lpa-sft", "lpa-binding",
    *STATEMENTS,
)  # fmt: skip
USUAL = tuple(name for name, suite in SUITES.items() if not suite.optional)


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured.

    Attributes:
        train: flags of every arm. published: further flags of published-2607, which scale it to the budget.
        main: the arms that run under every one of the `seeds` and climb the ladder.
        settings: of the evaluation, by `suites`; of the ladder the same with `ladder_sets`.
    """

    train: tuple[str, ...]
    published: tuple[str, ...]
    arms: tuple[str, ...]
    main: tuple[str, ...]
    seeds: int
    settings: Settings
    suites: tuple[str, ...] = USUAL
    ladder_sets: tuple[str, ...] = ("strongreject",)
    batch_size: int = 8


_CPU = Settings(sets=("strongreject", "harmbench"), limit=100, attacks=("direct", "prefix"), max_new_tokens=32,
                trait_prompt=PLAIN_PROMPT, epsilons=(), steps=(), utility_sets=())  # fmt: skip
_SCALED = ("--lpa_steps", "8", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
_TINY = ("--lpa_steps", "1", "--attack_steps", "2", "--defence_steps", "1", "--per_device_train_batch_size", "2",
         "--gradient_accumulation_steps", "1")  # fmt: skip
BUDGETS = {
    "smoke": Budget(
        _TINY, (), ("lpa", "lat"), ("lpa",), 1,
        replace(_CPU, limit=12, benign_limit=4, max_new_tokens=8, ladder_limit=2, suffix_steps=2, erosion_steps=(1,),
                best_of=1),
        ("attacks", "overrefusal", "utility", "collapse"),
    ),
    # two harmful sets, asked directly, after a prefix and for a yes or no, and short answers
    "cpu": Budget((), _SCALED, ALL, ("lpa", "finetune", "both", "lat"), 3, _CPU, batch_size=46),
    "full": Budget(
        (), (), ALL, ("lpa", "finetune", "both", "lat", "published-2607"), 3,
        Settings(sets=("strongreject", "harmbench", "do-not-answer"), limit=200, max_new_tokens=64), batch_size=32,
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
    parser.add_argument("--no-ladder", action="store_true", help="leave the ladder out")
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    data = write_data(output / "data")
    adapters = {}
    for arm, seed in runs(options.arms or budget.arms, budget.main, options.seeds or budget.seeds):
        name = f"{arm}-{seed}"
        own = [*flags(arm, data), *budget.train, *(budget.published if arm == "published-2607" else ())]
        adapters[name] = train(output, name, [*own, "--seed", str(seed)], options.model)
    found = evaluate(
        options.model, adapters, suites=budget.suites, settings=budget.settings, output=output / "evaluation",
        command=command, batch_size=budget.batch_size, tick=progress(),
    )  # fmt: skip
    table = over_seeds(found) + "\n" + attack_alone(found)
    made = [output / "evaluation"]
    if not options.no_ladder:
        chosen = {name: path for name, path in adapters.items() if name in {f"{arm}-0" for arm in budget.main}}
        climbed = evaluate(
            options.model, chosen, suites=["ladder"], settings=replace(budget.settings, sets=budget.ladder_sets),
            output=output / "ladder", command=command, batch_size=budget.batch_size, tick=progress(),
        )  # fmt: skip
        table += "\n" + climbed.markdown()
        made.append(output / "ladder")
    (output / "arms.md").write_text(table, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(record(found, command, output), indent=1) + "\n", encoding="utf-8")
    print(table)
    print(build([*made, *adapters.values()], output / "report.html", command=command))


def runs(arms: Sequence[str], main: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed), every arm's first seed before any second one, which only the main arms have."""
    for seed in range(seeds):
        for arm in arms:
            if seed == 0 or arm in main:
                yield arm, seed


def flags(arm: str, data: Path) -> list[str]:
    """What an arm changes of `lpa train --preset demo`, or another preset."""
    if arm in STATEMENTS:
        return ["--preset", "demo", "--data", arm]
    if arm.startswith("published") or arm == "toward-only":
        return ["--preset", arm]
    no_kl = ["--kl_coef", "0"]
    return ["--preset", "demo", *{
        "lpa": [],
        "finetune": ["--attack_steps", "0"],
        "lat": ["--data", str(data / "harmful.jsonl")],
        "lpa-no-kl": no_kl,
        "lpa-binding": ["--attack_epsilon", "0.2"],  # the default's attack reaches a norm of 0.39 at width 576
        "lpa-sft": [*no_kl, "--sft_coef", "1", "--benign", "own"],
    }[arm]]  # fmt: skip


def write_data(folder: Path) -> Path:
    """The harmful requests of the arm `lat`. They stay in this folder, which is not for commits."""
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    harmful = load_set("advbench", limit=len(load_pairs()))
    if harmful.reason:
        raise SystemExit(f"the harmful requests of the arm lat are unavailable: {harmful.reason}")
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
    """One row an arm, in Markdown: means and ranges over its seeds, and the three claims of the verdict about it.

    Changes are in points against the base model, with 95% intervals clustered by prompt over the seeds; * marks a claim
    that is shown after Holm's adjustment.
    """
    sets, settings = found.info["settings"]["sets"], settings_of(found)
    columns = {f"{name}: done, %": ("attacks", "done: direct", name, 100) for name in sets}
    columns |= {f"{name}: trained sentence, %": ("attacks", "not done: trained sentence", name, 100) for name in sets}
    columns |= {
        "AUROC, own": ("traits", "AUROC of agreeing, clean", "both kinds", 1),
        "AUROC, IPIP": ("traits", "AUROC of agreeing, clean", "ipip, both kinds", 1),
        "agrees: undesirable, %": ("traits", "agrees, clean", "undesirable", 100),
        "desirable, %": ("traits", "agrees, clean", "desirable", 100),
        "perplexity": ("utility", "perplexity", "prose", 1),
    }
    named = {DECLINES: "harm refused in own words", HOLDS: "harm done, worst case", KEEPS: "benign done"}
    head = ["arm", "seeds", *named.values(), *columns, "collapsed"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, own in arms(found).items():
        tested = {} if arm == BASE else {claim.name: claim for claim in claims(found.records, own, settings)}
        cells = [arm, str(len(own)), *(told(tested.get(name)) for name in named)]
        for suite, metric, where, scale in columns.values():
            if where.startswith("ipip") and arm.startswith("ipip"):
                cells.append("trained on")
                continue
            values = [row.value for row in found.rows if row.subject in own and row.value is not None
                      and (row.suite, row.metric, row.set) == (suite, metric, where)]  # fmt: skip
            cells.append(spread([scale * value for value in values], 0 if scale == 100 else 2))
        collapsed = [row.value for row in found.rows if row.subject in own and row.metric == "collapsed"]
        lines.append("| " + " | ".join([*cells, f"{sum(map(bool, collapsed))} of {len(own)}"]) + " |")
    return "\n".join(lines) + "\n"


def settings_of(found: Evaluation) -> Settings:
    """The settings of an evaluation, from its record."""
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in found.info["settings"].items()}
    return Settings(**held)


def arms(found: Evaluation) -> dict[str, list[str]]:
    """The subjects of each arm, the base model first."""
    own: dict[str, list[str]] = {}
    for name in found.subjects:
        own.setdefault(name if name == BASE else name.rpartition("-")[0], []).append(name)
    return own


def told(claim: Any) -> str:
    """A claim in points, marked where it is shown."""
    if claim is None:
        return ""
    points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in (claim.change, claim.low, claim.high)))
    return points + ("*" if claim.shown else "")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and range where there are several."""
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def attack_alone(found: Evaluation) -> str:
    """What `lpa` adds to `finetune`, which is the same without the attack: a line a claim."""
    own = arms(found)
    if not {"lpa", "finetune"} <= own.keys():
        return ""
    tested = claims(found.records, own["lpa"], settings_of(found), own["finetune"])
    lines = [f"- {claim.name}: {told(claim)} points" for claim in tested]
    return "With the attack, less without it (`lpa` - `finetune`):\n\n" + "\n".join(lines) + "\n"


def record(found: Evaluation, command: str, output: Path) -> dict[str, Any]:
    """What is committed: settings, data by name and hash, the table, and the judgement of every answer by prompt id."""
    labels: dict[str, dict[str, dict[str, str]]] = {}
    for subject in found.subjects:
        for name in (*found.info["settings"]["sets"], BENIGN):
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
