"""Compare LPA with its controls on one model: what the attack, the statements and their answers each contribute.

    python examples/compare.py --output runs/compare --budget cpu --jobs 2

Every arm is one `lpa train` command (kept in commands.txt) from the same base model. It is evaluated once it is
trained, and the main arms climb the ladder of attacks. An arm and a seed are one part, a process with a folder of its
own; `--jobs` says how many run side by side. The same command goes on where a stopped one was, within a part too. Arms,
by what differs from `lpa train`:

  lpa             nothing                 undesirable, desirable, both, inverted, irrelevant, shuffled,
  finetune        no attack               ipip-both, ipip-shuffled   the statements and their answers
  toward-only     the preset              vector   preventative steering: undesirable less desirable statements, added
  published-2607  the preset, scaled      ablate   the refusal direction taken out, in the place of the attack
  published-2605  the preset              lat      real harmful requests

The main arms run under several seeds. The harmful requests of `lat` and `ablate` (AdvBench) are in none of the
evaluated sets, nor are the benign ones whose answers the model is held to.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from lpa import cli
from lpa.data import PLAIN_PROMPT, benign_requests, load_pairs
from lpa.evaluation import BASE, SUITES, Evaluation, Settings, evaluate, load_set
from lpa.evaluation.records import Records
from lpa.evaluation.session import table_rows
from lpa.evaluation.sets import BENIGN, load_unasked
from lpa.evaluation.suites.answers import answers
from lpa.evaluation.suites.attacks import DECLINE, TARGET
from lpa.evaluation.suites.base import RUNGS
from lpa.evaluation.suites.utility import ARITHMETIC, GENERATED, KNOWLEDGE
from lpa.evaluation.table import arms, mean_range
from lpa.evaluation.verdict import DECLINES, HOLDS, KEEPS, claims
from lpa.files import write_json, write_text
from lpa.models import DEFAULT_MODEL
from lpa.presets import DEMO, PRESETS
from lpa.report import build
from lpa.run_folder import METRICS, RECORDS, RESULTS, RUN, TABLE, TEXTS, checkpoint_folders

STATEMENTS = ("undesirable", "desirable", "both", "inverted", "irrelevant", "shuffled", "ipip-both", "ipip-shuffled")
OWN = DEMO.get("data", "undesirable")  # the statements of `lpa`, which need no second arm
ALL = (
    "lpa", "finetune", "toward-only", "lat", "published-2607", "published-2605", "vector", "ablate",
    *(name for name in STATEMENTS if name != OWN),
)  # fmt: skip
SEED = 42  # the first, as in `lpa train`
USUAL = tuple(name for name, suite in SUITES.items() if not suite.optional)


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured.

    Attributes:
        train: flags of every arm. published: further flags of published-2607, which scale it to the budget.
        main: the arms that run under every one of the `seeds` and climb the ladder.
        settings: of the evaluation, by `suites`; of the ladder the same with `ladder_sets`.
        seconds: of CPU time on the embedded model, of training, evaluating and climbing once each.
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
    seconds: tuple[int, int, int] = (0, 0, 0)


_CPU = Settings(sets=("strongreject", "harmbench"), limit=100, attacks=("direct", "prefix"), max_new_tokens=32,
                trait_prompt=PLAIN_PROMPT, epsilons=(), steps=(), utility_sets=(ARITHMETIC, KNOWLEDGE),
                ladder=RUNGS[:4], ladder_limit=20, suffix_steps=30, erosion_steps=(5, 20), best_of=8)  # fmt: skip
_SCALED = ("--lpa_steps", "8", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
_TINY = ("--lpa_steps", "1", "--attack_steps", "2", "--defence_steps", "1", "--per_device_train_batch_size", "2",
         "--gradient_accumulation_steps", "1")  # fmt: skip
# CPU seconds on the embedded model: a training of five minutes on two cores; of an evaluation and the ladder, ten times
# what a tenth of them took
SECONDS = (600, 600, 1000)
_MAIN = ("lpa", "finetune")
BUDGETS = {
    "smoke": Budget(
        _TINY, (), ("lpa", "lat"), ("lpa",), 1,
        replace(_CPU, limit=12, benign_limit=4, max_new_tokens=8, ladder_limit=2, suffix_steps=2, erosion_steps=(1,),
                best_of=1, utility_sets=()),
        ("attacks", "overrefusal", "utility", "collapse"),
    ),
    # two harmful sets, asked directly and after a prefix, and short answers
    "cpu": Budget((), _SCALED, ALL, _MAIN, 3, _CPU, ("traits", "attacks", "overrefusal", "utility", "collapse"),
                  batch_size=46, seconds=SECONDS),
    "full": Budget(
        (), (), ALL, (*_MAIN, "toward-only", "lat", "published-2607"), 3,
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
    parser.add_argument("--jobs", type=int, default=1, help="parts that run side by side, sharing the cores")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # ARM-SEED, or base: in a process of its own
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], Path(options.output)
    if options.part:
        measure(options.part, budget, output, options)
        return
    output.mkdir(parents=True, exist_ok=True)
    write_data(output / "data", budget.settings.sets)
    chosen = options.arms or budget.arms
    named = runs(chosen, budget.main, options.seeds or budget.seeds)
    parts = [f"{arm}-{seed}" for arm, seed in named]
    print(estimate([BASE, *parts], budget, output, options), flush=True)
    start(BASE, output, options.jobs)  # the others take over what was measured of it
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda part: start(part, output, options.jobs), parts))
    command = shlex.join(["python", *sys.argv])
    found = joined([BASE, *parts], budget, output, command, [] if options.no_ladder else ["ladder"])
    notes = [attack_alone(found)]
    if budget.published and "published-2607" in chosen:
        notes.insert(0, f"published-2607 is scaled to the budget: {shlex.join(budget.published)}\n")
    table = "\n".join([over_seeds(found), *filter(None, notes)])
    write_text(output / "arms.md", table)
    write_json(output / "results.json", record(found, command, output), nulls=True)
    print(table)
    trained = [output / "train" / part for part in parts]
    print(build([output / "evaluation", *trained], output / "report.html", command=command))


def start(part: str, output: Path, jobs: int) -> None:
    """Run a part in a process of its own, unless it is done.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    if (output / "parts" / part / "done").is_file():
        return
    print(f"{part}: {output / 'parts' / part}.log", flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    (output / "parts").mkdir(exist_ok=True)
    with (output / "parts" / f"{part}.log").open("a", encoding="utf-8") as log:
        subprocess.run([sys.executable, *sys.argv, "--part", part], check=True, stdout=log, stderr=subprocess.STDOUT,
                       env={**os.environ, "OMP_NUM_THREADS": threads})  # fmt: skip


def measure(part: str, budget: Budget, output: Path, options: argparse.Namespace) -> None:
    """Train an arm under a seed, evaluate it, and have it climb the ladder if it is a main arm's first."""
    folder = output / "parts" / part
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".part")  # beside the lock of an evaluation, which does not wait
    lock.acquire()  # a part whose parent was killed may still be at it
    if (folder / "done").is_file():
        return
    adapters = {}
    arm, _, seed = part.rpartition("-")
    if part != BASE:
        own = [*flags(arm, output / "data"), *budget.train, *(budget.published if arm == "published-2607" else ())]
        own += [] if arm == "lpa" else ["--measure", "false"]  # its table is that of `lpa train`
        adapters[part] = train(output, part, [*own, "--seed", seed], options.model)
        for name in (TEXTS, RECORDS):
            if not (folder / RECORDS).is_file():
                shutil.copy(output / "parts" / BASE / name, folder / f"{name}.part")
                (folder / f"{name}.part").replace(folder / name)
    ladder = not options.no_ladder and (part == BASE or (arm in budget.main and seed == str(SEED)))
    sets = {"": (budget.suites, budget.settings.sets)}
    sets |= {"ladder": (("ladder",), budget.ladder_sets)} if ladder else {}
    said = (DECLINE,) if arm == "lat" else budget.settings.completions  # a refusal, which is not in its own words
    for suites, names in sets.values():
        settings = replace(budget.settings, sets=names, completions=said)
        evaluate(options.model, adapters, suites=suites, settings=settings, output=folder,
                 batch_size=budget.batch_size, tick=progress())  # fmt: skip
    (folder / "done").touch()


def joined(parts: Sequence[str], budget: Budget, output: Path, command: str, more: Sequence[str] = ()) -> Evaluation:
    """One evaluation of all parts, in the folder evaluation; `more` suites than the budget's were measured."""
    folder = output / "evaluation"
    folder.mkdir(exist_ok=True)
    for name in (RECORDS, TEXTS):  # each part has the base model's lines too
        texts = [(output / "parts" / part / name).read_text(encoding="utf-8") for part in parts]
        lines = dict.fromkeys(line for text in texts for line in text.split("\n") if line)
        write_text(folder / name, "".join(f"{line}\n" for line in lines))
    infos = [json.loads((output / "parts" / part / RUN).read_text(encoding="utf-8")) for part in parts]
    info = infos[0] | {"commands": [command], "subjects": {k: v for own in infos for k, v in own["subjects"].items()}}
    info |= {"settings": budget.settings.as_dict(), "suites": [*budget.suites, *more]}
    records, names = Records(folder), list(info["subjects"])
    harmful = [load_set(name, budget.settings.limit) for name in budget.settings.sets]
    rows = table_rows(records, names, info["suites"], budget.settings, harmful)
    found = Evaluation(rows, names, records, info, folder)
    write_json(folder / RUN, info)
    write_json(folder / RESULTS, {"subjects": names, "rows": [asdict(row) for row in rows]}, nulls=True)
    write_text(folder / TABLE, found.markdown())
    return found


def estimate(parts: Sequence[str], budget: Budget, output: Path, options: argparse.Namespace) -> str:
    """What is left to do, in CPU time."""
    left = [part for part in parts if not (output / "parts" / part / "done").is_file()]
    climbing = [p for p in left if not options.no_ladder and p in (BASE, *(f"{arm}-{SEED}" for arm in budget.main))]
    counts = (len([part for part in left if part != BASE]), len(left), len(climbing))
    text = "{} to train, {} to evaluate, {} to climb the ladder".format(*counts)
    if not any(budget.seconds):
        return text
    total = sum(count * seconds for count, seconds in zip(counts, budget.seconds, strict=True))
    each = "{}, {} and {} s each".format(*budget.seconds)
    return f"{text}: about {total / 3600:.1f} hours of CPU time on the embedded model ({each})"


def runs(arms: Sequence[str], main: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed), every arm's first seed before any second one, which only the main arms have."""
    for seed in range(SEED, SEED + seeds):
        for arm in arms:
            if seed == SEED or arm in main:
                yield arm, seed


def flags(arm: str, data: Path) -> list[str]:
    """What an arm changes of `lpa train --preset demo`, or another preset."""
    if arm.startswith("published") or arm == "toward-only":
        return ["--preset", arm]
    requests, benign, bad, good = (str(data / f"{n}.jsonl") for n in ("requests", "benign", "undesirable", "desirable"))
    own = {
        "lpa": [],
        "finetune": ["--attack_steps", "0"],
        "lat": ["--data", str(data / "harmful.jsonl")],
        "vector": ["--attack_adversary", "vector", "--attack_norm", "none", "--attack_direction", bad, good],
        "ablate": ["--attack_adversary", "ablate", "--attack_direction", requests, benign],
    }
    return ["--preset", "demo", *own.get(arm, ["--data", arm])]


def statements_of(arm: str) -> str:
    """The data of an arm, as `--data` names them."""
    own = flags(arm, Path())
    given = dict(zip(own[::2], own[1::2], strict=False))
    return given.get("--data") or str(PRESETS[given["--preset"]].get("data", "undesirable"))


def write_data(folder: Path, evaluated: Sequence[str]) -> None:
    """The pairs of `lat`, and the prompts that the directions of `vector` and `ablate` lie between.

    They stay in this folder, which is not for commits. Those of AdvBench that an evaluated set holds too are left out.
    """
    folder.mkdir(exist_ok=True)
    write_text(folder / ".gitignore", "*\n")
    harmful = load_unasked("advbench", evaluated, len(load_pairs()))
    if harmful.reason:
        raise SystemExit(f"the harmful requests of the arm lat are unavailable: {harmful.reason}")
    texts = [prompt.text for prompt in harmful.prompts]
    tables = {
        "harmful": [{"prompt": text, "rejected": TARGET, "chosen": DECLINE} for text in texts],
        "requests": [{"prompt": text} for text in texts],
        "benign": [{"prompt": text} for text in benign_requests()],
        **{kind: [{"prompt": text} for text in load_pairs(kind=kind)["prompt"]] for kind in STATEMENTS[:2]},
    }
    for name, rows in tables.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def train(output: Path, name: str, arguments: list[str], model: str) -> str:
    """The adapter of one arm: trained, gone on with, or there already."""
    folder = output / "train" / name
    if not (folder / METRICS).is_file():
        command = ["train", "--model", model, "--output", str(folder), *arguments, "--save_steps", "40"]
        if (folder / "settings.yaml").is_file():
            command = ["train", "--resume", "--output", str(folder)]
        with (output / "commands.txt").open("a", encoding="utf-8") as stream:
            stream.write(shlex.join(["lpa", *command]) + "\n")
        print(shlex.join(["lpa", *command]), flush=True)
        if code := cli.main(command):
            raise SystemExit(code)
        for checkpoint in checkpoint_folders(folder):
            shutil.rmtree(checkpoint)
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
    sets, settings = found.info["settings"]["sets"], Settings.of(found.info["settings"])
    columns = {f"{name}: done, %": ("attacks", "done: direct", name, 100) for name in sets}
    columns |= {f"{name}: trained sentence, %": ("attacks", "not done: trained sentence", name, 100) for name in sets}
    columns |= {
        "AUROC, own": ("traits", "AUROC of agreeing, clean", "both kinds", 1),
        "AUROC, IPIP": ("traits", "AUROC of agreeing, clean", "ipip, both kinds", 1),
        "agrees: undesirable, %": ("traits", "agrees, clean", "undesirable", 100),
        "desirable, %": ("traits", "agrees, clean", "desirable", 100),
        "perplexity": ("utility", "perplexity", "prose", 1),
        "arithmetic, %": ("utility", GENERATED, ARITHMETIC, 100),
        "knowledge, %": ("utility", GENERATED, KNOWLEDGE, 100),
        "ladder's worst case, %": ("ladder", "done: worst case", "strongreject", 100),
    }
    named = {DECLINES: "harm refused in own words", HOLDS: "harm done, worst case", KEEPS: "benign done"}
    head = ["arm", "seeds", *named.values(), *columns, "collapsed"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, own in arms(found.subjects).items():
        tested = {} if arm == BASE else {claim.name: claim for claim in claims(found.records, own, settings)}
        cells = [arm, str(len(own)), *(told(tested.get(name)) for name in named)]
        for suite, metric, where, scale in columns.values():
            if where.startswith("ipip") and arm != BASE and statements_of(arm).startswith("ipip"):
                cells.append("trained on")
                continue
            values = [row.value for row in found.rows if row.subject in own and row.value is not None
                      and (row.suite, row.metric, row.set) == (suite, metric, where)]  # fmt: skip
            cells.append(mean_range([scale * value for value in values], 0 if scale == 100 else 2))
        collapsed = [row.value for row in found.rows if row.subject in own and row.metric == "collapsed"]
        lines.append("| " + " | ".join([*cells, f"{sum(map(bool, collapsed))} of {len(own)}"]) + " |")
    return "\n".join(lines) + "\n"


def told(claim: Any) -> str:
    """A claim in points, marked where it is shown."""
    if claim is None:
        return ""
    points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in (claim.change, claim.low, claim.high)))
    return points + ("*" if claim.shown else "")


def attack_alone(found: Evaluation) -> str:
    """What `lpa` adds to `finetune`, which is the same without the attack: a line a claim."""
    own = arms(found.subjects)
    if not {"lpa", "finetune"} <= own.keys():
        return ""
    tested = claims(found.records, own["lpa"], Settings.of(found.info["settings"]), own["finetune"])
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
               for path in sorted((output / "train").glob(f"*/{METRICS}"))}  # fmt: skip
    kept = ("command", "settings", "data", "benign", "lpa_steps", "seconds", "peak_memory_gb", "before", "after")
    return {
        "command": command, **{k: v for k, v in found.info.items() if k not in ("commands", "subjects")},
        "fingerprints": {name: subject["fingerprint"] for name, subject in found.info["subjects"].items()},
        "train": {name: {key: values[key] for key in kept if key in values} for name, values in trained.items()},
        "rows": [asdict(row) for row in found.rows], "labels": labels,
    }  # fmt: skip


if __name__ == "__main__":
    main()
