"""Read what `lpa evaluate` and `lpa train` left in a folder, and pair the subjects of an evaluation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpa.evaluation.records import Record, Records
from lpa.evaluation.sets import BENIGN, benign_prompts
from lpa.evaluation.stats import bootstrap, mcnemar, mean, paired_shares, permutation
from lpa.evaluation.suites import Row
from lpa.evaluation.suites.answers import complied
from lpa.evaluation.suites.base import UTILITY_SETS
from lpa.evaluation.suites.harm import says_yes
from lpa.evaluation.suites.traits import CLEAN
from lpa.evaluation.suites.utility import task_name
from lpa.evaluation.table import VERDICT
from lpa.training.selection import PREFIX, entries_of

from ..run_folder import METRICS, RESULTS, RUN, STATE, checkpoint_folders


class ReportError(ValueError):
    """There is nothing to report on; the message says what is missing."""


@dataclass
class EvaluationRun:
    """An evaluation's folder: `rows` of its table, `records` of every prompt, `info` as in run.json, and the `subjects`
    that were measured (a stopped and continued run may name others, which have a verdict alone).
    """

    name: str
    rows: list[Row]
    subjects: list[str]
    records: Records
    info: dict[str, Any]


@dataclass
class TrainingRun:
    """A training run's folder: its record (metrics.json, {} where a stopped run left none), its logged steps, and the
    measurements of canaries with the LPA step that is best by them.
    """

    name: str
    info: dict[str, Any]
    steps: list[dict[str, float]] = field(default_factory=list)
    canaries: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None


def read_run(folder: str | Path) -> list[EvaluationRun | TrainingRun]:
    """What a folder holds: an evaluation, a training run, or both.

    Raises:
        ReportError: neither, or an evaluation that has not come to its end.
    """
    path = Path(folder).expanduser()
    found: list[EvaluationRun | TrainingRun] = []
    if (path / RUN).is_file():
        if not (path / RESULTS).is_file():
            raise ReportError(f"the evaluation in {path} was stopped; repeat its command to continue it")
        info, results = _json(path / RUN), _json(path / RESULTS)
        rows = [Row(**row) for row in results["rows"]]
        measured = {row.subject for row in rows if row.suite != VERDICT}
        subjects = [name for name in results["subjects"] if name in measured]
        found.append(EvaluationRun(path.name, rows, subjects, Records(path, read_only=True), info))
    if (path / METRICS).is_file():
        info = _json(path / METRICS)
        watched = info.get("canaries") or {}
        found.append(
            TrainingRun(
                path.name, info, info.get("steps", []), watched.get("measured", []), watched.get("best_lpa_step")
            )
        )
    elif states := [folder / STATE for folder in checkpoint_folders(path) if (folder / STATE).is_file()]:
        state = _json(states[0])
        steps = [entry for entry in state["log_history"] if "lpa_step" in entry]
        best = [e for e in state["log_history"] if f"{PREFIX}lpa_step" in e and e["step"] == state["best_global_step"]]
        found.append(TrainingRun(path.name, {}, steps, entries_of(state["log_history"]),
                                 int(best[0][f"{PREFIX}lpa_step"]) if best else None))  # fmt: skip
    if not found:
        raise ReportError(f"{path} holds neither an evaluation ({RUN}) nor a training run ({METRICS} or checkpoints)")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Paired:
    """Two subjects on the same prompts: means of both, the difference with its 95% interval (Agresti and Min, or
    bootstrap), and the p of McNemar's or a permutation test.
    """

    what: str
    one: str
    other: str
    n: int
    before: float
    after: float
    low: float
    high: float
    p: float
    test: str
    unit: str = ""


_Value = Callable[[Record], float | bool | None]  # None where a record holds none


def paired_tests(run: EvaluationRun) -> list[Paired]:
    """All pairs of subjects on everything that was measured prompt by prompt."""
    measures: list[tuple[str, dict[str, str], _Value]] = []
    for name in run.info["settings"]["sets"]:
        measures.append(
            (f"harmful requests done, {name}", {"suite": "answers", "set": name, "mode": "direct"}, complied)
        )
        measures.append((f"says yes to harmful, {name}", {"suite": "harm", "set": name}, says_yes))
    measures.append(("benign requests done", {"suite": "answers", "set": BENIGN, "mode": "direct"}, complied))
    measures.append(("says yes to benign", {"suite": "harm", "set": BENIGN}, says_yes))
    for kind in ("undesirable", "desirable"):
        clean = {"suite": "traits", "set": kind, "mode": CLEAN}
        measures.append((f"log-odds of agreeing, {kind}", clean, lambda r: r["agree"] - r["disagree"]))
    measures.append(
        ("loss a token on prose", {"suite": "utility", "set": "perplexity"}, lambda r: r["loss"] / r["tokens"])
    )
    for task in UTILITY_SETS:
        measures.append((task, {"suite": "utility", "set": task, "mode": ""}, lambda r: bool(r["right"])))
    for task in map(task_name, run.info["settings"].get("tasks", ())):
        samples = [r for r in run.records.select(suite="utility", set=task) if r["mode"].startswith("sample:")]
        for mode, metric in dict.fromkeys((r["mode"], metric) for r in samples for metric in r["scores"]):
            where = {"suite": "utility", "set": task, "mode": mode}
            binary = all(r["scores"].get(metric) in (0, 1, None) for r in samples if r["mode"] == mode)
            measures.append((f"{task}, {metric}", where, _score_of(metric, binary)))
    found = []
    for one, other in itertools.combinations(run.subjects, 2):
        for what, where, value in measures:
            pair = _pair(run.records, what, where, value, one, other)
            if pair is not None:
                found.append(pair)
    return found


def _score_of(metric: str, binary: bool) -> _Value:
    def score(record: Record) -> float | bool | None:
        value: float | None = record["scores"].get(metric)
        return bool(value) if binary and value is not None else value

    return score


def _pair(records: Records, what: str, where: dict[str, str], value: _Value, one: str, other: str) -> Paired | None:
    measured = [[r for r in records.select(subject=name, **where) if not {"error", "reason"} & set(r)]
                for name in (one, other)]  # fmt: skip
    held = [{r["id"]: found for r in own if (found := value(r)) is not None} for own in measured]
    both = [key for key in held[0] if key in held[1]]
    if not both:
        return None
    first, second = ([own[key] for key in both] for own in held)
    before, after = (mean([float(v) for v in own]) for own in (first, second))
    if isinstance(first[0], bool):
        flags = [[bool(v) for v in own] for own in (first, second)]
        _, low, high = paired_shares(*flags)
        return Paired(what, one, other, len(both), before, after, low, high, mcnemar(*flags), "McNemar", "%")
    low, high = bootstrap([[b - a for a, b in zip(first, second, strict=True)]], lambda groups: mean(groups[0]))
    p = permutation(first, second)
    return Paired(what, one, other, len(both), before, after, low, high, p, "permutation")


def sample_answers(run: EvaluationRun, set_name: str, count: int) -> list[dict[str, Any]]:
    """Some prompts, asked directly, with every subject's answer: id, tag, prompt, answers by subject.

    The prompt is None where it is not kept. Prompts whose answers are judged differently by subject come first.
    """
    by_id: dict[str, dict[str, Record]] = {}
    for name in run.subjects:
        for record in run.records.select(subject=name, suite="answers", set=set_name, mode="direct"):
            if "error" not in record:
                by_id.setdefault(record["id"], {})[name] = record
    benign = {p.id: p.text for p in benign_prompts()} if set_name == BENIGN else {}
    whole = {key: own for key, own in by_id.items() if len(own) == len(run.subjects)}
    order = sorted(whole, key=lambda key: (-len({r["label"] for r in whole[key].values()}), key))
    return [
        {
            "id": key,
            "tag": next(iter(whole[key].values())).get("tag", ""),
            "prompt": benign.get(key) or next((r["prompt"] for r in whole[key].values() if "prompt" in r), None),
            "answers": {name: (r["label"], r.get("answer")) for name, r in whole[key].items()},
        }
        for key in order[:count]
    ]
