"""The page: tables, plots, tests, samples and how to make it all again, in one HTML file without outside parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lpa import assets
from lpa.evaluation.measure import as_text, labels
from lpa.evaluation.refusal import measured_errors
from lpa.evaluation.sets import BENIGN
from lpa.evaluation.stats import wilson
from lpa.evaluation.subjects import BASE
from lpa.evaluation.suites import Row
from lpa.evaluation.suites.attacks import modes
from lpa.evaluation.table import VERDICT, lines, number, shown
from lpa.training.selection import Limits

from . import plots
from .runs import EvaluationRun, Paired, ReportError, TrainingRun, paired_tests, read_run, sample_answers

# how a verdict stands out: its class, and a sign for those who see no colour
_SIGNS = {"COLLAPSED": ("bad", "✕ "), "too dear": ("bad", "! "), "safer": ("good", "✓ ")}
_BENIGN_SAMPLES, _HARMFUL_SAMPLES = 8, 5


def build(
    folders: Sequence[str | Path], output: str | Path = "report.html", *, shareable: bool = False, command: str = ""
) -> Path:
    """Write the report of some folders of `lpa evaluate` and `lpa train`.

    Args:
        shareable: leave out prompts of harmful sets and the answers to them, which are otherwise folded away.
        command: recorded as what made the page.

    Raises:
        ReportError: no folder, one with nothing to report, or no matplotlib.
    """
    if not folders:
        raise ReportError("no run to report on; give at least one folder of lpa evaluate or lpa train")
    found = [run for folder in folders for run in read_run(folder)]
    evaluations = [run for run in found if isinstance(run, EvaluationRun)]
    trainings = [run for run in found if isinstance(run, TrainingRun)]
    places = {id(run): f"run-{number}" for number, run in enumerate(found, 1)}
    links = "".join(f'<a href="#{places[id(run)]}">{escape(run.name)}</a>' for run in found)
    body = ["<h1>LPA report</h1>", f"<nav>{links}</nav>"]
    if len(evaluations) > 1:
        body.append(_images([(plots.frontier(evaluations), "frontier of all evaluations")]))
    for run in evaluations:
        body.append(f'<section id="{places[id(run)]}">{_evaluation(run, shareable)}</section>')
    for training in trainings:
        body.append(f'<section id="{places[id(training)]}">{_training(training)}</section>')
    body += [_reading(evaluations)] if evaluations else []
    if command:
        body.append(f"<h2>This page</h2><pre>{escape(command)}</pre>")
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>LPA report</title>'
        f"<style>\n{files('lpa.report').joinpath('style.css').read_text(encoding='utf-8')}</style></head><body>\n{chr(10).join(body)}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def _images(made: Sequence[tuple[plots.Figure | None, str]]) -> str:
    """Plots beside each other where there is room, else below each other."""
    width = round(plots.PIXELS * plots.WIDTH)
    figures = "".join(
        f'<figure><img src="{plots.png(figure)}" width="{width}" alt="{escape(caption)}"></figure>'
        for figure, caption in made
        if figure is not None
    )
    return f'<div class="plots">{figures}</div>' if figures else ""


def _evaluation(run: EvaluationRun, shareable: bool) -> str:
    return "\n".join(
        [
            f"<h2>{escape(run.name)}: evaluation of {escape(str(run.info['model']))}</h2>",
            _verdicts(run),
            _images([*_attack_plots(run), *_other_plots(run)]),
            _table(run),
            _tests(run),
            _samples(run, shareable),
            _how(run),
        ]
    )


def _attack_plots(run: EvaluationRun) -> Iterator[tuple[plots.Figure | None, str]]:
    """Each plot's bars are better in one direction: here lower."""
    settings = run.info["settings"]
    climbed = [rung for rung in settings.get("ladder", ()) if rung != "erosion"]
    for name in settings["sets"]:
        yield plots.fates(run.rows, run.subjects, name), f"what becomes of the requests of {name}"
        labels = {
            ("attacks", name, f"done: {mode}"): mode.replace(":", ":\n")
            for mode in modes(run.info["settings"]["attacks"])
        }
        labels[("attacks", name, "done: worst case")] = "worst case"
        yield plots.shares(run.rows, run.subjects, labels, f"{name}: requests done"), f"attack success on {name}"
        labels = {("ladder", name, f"done: {mode}"): mode for mode in climbed}
        yield plots.shares(run.rows, run.subjects, labels, f"{name}: done on the ladder"), f"the ladder on {name}"
    for kind in ("harmful", "benign"):
        yield plots.erosion(run, kind), f"harm done after fine-tuning on {kind} rows"


def _other_plots(run: EvaluationRun) -> Iterator[tuple[plots.Figure | None, str]]:
    for made in plots.over_steps(run):
        yield made, "over the updates of a run"
    benign = {
        ("overrefusal", f"{BENIGN}{part}", "not done"): f"benign{part}" for part in ("", " (plain)", " (alarming)")
    }
    yield plots.shares(run.rows, run.subjects, benign, "benign requests not done"), "benign requests not done"
    yield plots.frontier([run]), "frontier"
    labels = {("harm", name, "harm error"): name for name in run.info["settings"]["sets"]}
    labels |= {("harm", BENIGN, "benign error"): "benign"}
    yield plots.shares(run.rows, run.subjects, labels, "yes to harm, no to benign"), "errors by yes or no"
    for x in ("epsilon", "steps"):
        for made in plots.robustness(run, x):
            yield made, f"robustness over {x}"
    yield plots.by_site(run), "robustness by site"


def _verdicts(run: EvaluationRun) -> str:
    items = []
    for row in run.rows:
        if row.suite == VERDICT and row.metric != BASE:
            word = row.metric.partition(":")[0].partition(";")[0]
            kind, sign = _SIGNS.get(word, ("", ""))
            rest = escape(row.metric.removeprefix(word).lstrip(":; "))
            text = f'<span class="word {kind}">{sign}{escape(word)}</span><br>{rest}'
            items.append(f'<li class="is-{kind}"><b>{escape(row.subject)}</b>{text}</li>')
    return f'<ul class="cards">{"".join(items)}</ul>' if items else ""


def _table(run: EvaluationRun) -> str:
    subjects = [*run.subjects, "n"]
    head = "".join(f"<th>{text}</th>" for text in ("suite", "set", "what"))
    head += "".join(f'<th class="n">{escape(text)}</th>' for text in subjects)
    out, notes, last = [f"<tr>{head}</tr>"], dict[str, str](), ""
    found = [line for line in shown(lines(run.rows, run.subjects), full=False) if line[0] != VERDICT]
    for suite, where, metric, arrow, own in found:
        cells = "".join(f'<td class="n{_alarm(row)}" data-label="{escape(name)}">{_number(row)}{_mark(row, notes)}</td>'
                        for name, row in zip(run.subjects, own, strict=True))  # fmt: skip
        count = "/".join(str(n) for n in dict.fromkeys(row.n for row in own if row and row.n))
        first = ' class="first"' if suite != last else ""
        named = _cell(suite if suite != last else "", "suite") + _cell(where) + _cell(f"{metric} {arrow}", "what")
        out.append(f"<tr{first}>{named}{cells}{_cell(count, 'n', 'n')}</tr>")
        last = suite
    table = f'<div class="scroll"><table class="stack">{"".join(out)}</table></div>'
    text = "".join(f"<li><b>{letter}</b> {escape(note)}</li>" for note, letter in notes.items())
    return f'{table}<p class="note">{_about_intervals(run)}</p>' + (f'<ul class="notes">{text}</ul>' if text else "")


def _about_intervals(run: EvaluationRun) -> str:
    """What the brackets mean, for the kinds of numbers in this table."""
    metrics = {row.metric for row in run.rows if row.value is not None and row.low is not None}
    kinds = {
        "Wilson's of shares": any(row.unit == "%" for row in run.rows),
        "Newcombe's of balanced accuracy and AUROC": any("AUROC" in m or "balanced" in m for m in metrics),
        "a bootstrap's of log-odds and perplexity": any("log-odds" in m or "perplexity" in m for m in metrics),
    }
    text = ", ".join(kind for kind, there in kinds.items() if there)
    return f"In brackets 95% intervals: {text}. An arrow points to the better side." if text else ""


def _number(row: Row | None) -> str:
    """The value, and its interval in softer ink."""
    value, bracket, interval = number(row).partition(" [")
    return escape(value) + (f' <span class="span">[{escape(interval)}</span>' if bracket else "")


def _mark(row: Row | None, notes: dict[str, str]) -> str:
    """The letter of a note, in parentheses beside the value; equal notes share one."""
    if row is None or not row.note:
        return ""
    letter = notes.setdefault(row.note, _letter(len(notes)))
    return f' <span class="ref">({letter})</span>'


def _letter(number: int) -> str:
    """a to z, then aa, ab, ..."""
    head, last = divmod(number, 26)
    return (_letter(head - 1) if head else "") + chr(ord("a") + last)


def _alarm(row: Row | None) -> str:
    return " bad" if row is not None and row.metric == "collapsed" and row.value else ""


def _cell(text: object, kind: str = "", label: str = "") -> str:
    named = (f' class="{kind}"' if kind else "") + (f' data-label="{escape(label)}"' if label else "")
    return f"<td{named}>{escape(str(text))}</td>"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready cells, which on a phone stand below each other, each with its column's name."""
    number = [cell.startswith('<td class="n') for cell in rows[0]] if rows else [False] * len(head)
    top = "".join(f"<th{' class=n' * flag}>{escape(text)}</th>" for text, flag in zip(head, number, strict=True))
    body = "".join(
        f"<tr>{''.join(_labelled(cell, text) for cell, text in zip(row, head, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="stack"><tr>{top}</tr>{body}</table></div>'


def _labelled(cell: str, text: str) -> str:
    return cell if "data-label" in cell else cell.replace("<td", f'<td data-label="{escape(text)}"', 1)


def _tests(run: EvaluationRun) -> str:
    tests = paired_tests(run)
    if not tests:
        return ""
    about = (
        '<h3>Paired tests</h3><p class="note">The same prompts under both subjects; intervals of 95%; p two-sided, not '
        "corrected for how many there are. In bold: below 0.05.</p>"
    )
    others = [test for test in tests if test.one != run.subjects[0]]
    page = about + _test_grid([test for test in tests if test.one == run.subjects[0]])
    return page + (_folded("Adapters with each other", _test_grid(others)) if others else "")


def _test_grid(tests: Sequence[Paired]) -> str:
    rows = [
        (
            _cell(test.what, "what"),
            _cell(f"{test.one} → {test.other}"),
            _cell(f"{_value(test.before, test.unit)} → {_value(test.after, test.unit)}", "n"),
            _cell(_difference(test), "n strong" if test.p < 0.05 else "n"),
            _cell(f"{test.p:.2g}", "n strong" if test.p < 0.05 else "n"),
            _cell(test.test),
            _cell(test.n, "n"),
        )
        for test in tests
    ]
    return _grid(("what", "subjects", "means", "difference", "p", "test", "n"), rows)


def _difference(test: Paired) -> str:
    scale, digits = (100, 0) if test.unit == "%" else (1, 3)
    change, low, high = (
        f"{value * scale + 0.0:+.{digits}f}" for value in (test.after - test.before, test.low, test.high)
    )
    return f"{change}{' points' if test.unit == '%' else ''} [{low}, {high}]"


def _value(value: float, unit: str) -> str:
    return f"{value * 100:.1f}%" if unit == "%" else f"{value:.3f}"


def _samples(run: EvaluationRun, shareable: bool) -> str:
    parts = []
    benign = sample_answers(run, BENIGN, _BENIGN_SAMPLES)
    if benign:
        parts.append("<h3>Answers to benign requests</h3>" + _answers(run, benign))
    for name in run.info["settings"]["sets"]:
        harmful = sample_answers(run, name, _HARMFUL_SAMPLES)
        if harmful and not shareable:
            warning = f"Answers to harmful requests of {name}: may be offensive"
            parts.append(_folded(warning, _answers(run, harmful)))
    return "\n".join(parts)


def _answers(run: EvaluationRun, samples: Sequence[dict[str, Any]]) -> str:
    rows = []
    for sample in samples:
        asked = sample["prompt"] if sample["prompt"] is not None else f"({sample['id']}; its text is not kept)"
        cells = [f'<td class="answer"><span class="note">{escape(sample["tag"])}</span>\n{escape(asked)}</td>']
        for label, text in (sample["answers"][name] for name in run.subjects):
            text = escape(text) if text is not None else "(its text is not in this folder)"
            cells.append(f'<td class="answer"><span class="note">{escape(label)}</span>\n{text}</td>')
        rows.append(cells)
    return _grid(("request", *run.subjects), rows)


def _how(run: EvaluationRun) -> str:
    info = run.info
    data = [
        (_cell(name), _cell(own["source"]), _cell(f"{own['used']} of {own['rows']}", "n"),
         _cell(own.get("reason") or own["sha256"], "hash"))
        for name, own in info["data"].items()
    ]  # fmt: skip
    subjects = [
        (_cell(name), _cell(own["path"]), _cell(own["fingerprint"], "hash")) for name, own in info["subjects"].items()
    ]
    return "\n".join(
        [
            "<h3>How it was made</h3>",
            f"<pre>{escape(chr(10).join(dict.fromkeys(info['commands'])))}</pre>",
            f"<p>{escape(_named(info['versions']))}; {escape(info['dtype'])} on {escape(info['device'])}; "
            f"seed {info['settings']['seed']}; begun {escape(info['started'])}</p>",
            _grid(("data", "source", "rows", "SHA-256 of the texts"), data),
            _grid(("subject", "from", "fingerprint of the weights"), subjects),
            _folded("All settings", f"<pre>{escape(json.dumps(info['settings'], indent=1))}</pre>"),
        ]
    )


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _training(run: TrainingRun) -> str:
    info = run.info
    settings = info.get("settings", {})
    limits = Limits(**{name: settings[f"canary_{key}"] for name, key in _LIMITS.items() if f"canary_{key}" in settings})
    parts = [f"<h2>{escape(run.name)}: training{' of ' + escape(str(info['model'])) if info else ''}</h2>"]
    if not run.steps:
        parts.append("<p>No LPA step was logged.</p>")
    if not info:
        parts.append("<p>The run was stopped before its end; this is what its last checkpoint tells.</p>")
    if info.get("before"):
        parts.append(_before_after(info["before"], info.get("after") or {}))
    parts.append(_images([(made, "training curves") for made in plots.training(run)]))
    if run.canaries:
        parts.append(_canaries(run, limits))
    if info:
        data = [(_cell(name), _cell(own["source"]), _cell(own.get("rows", ""), "n"), _cell(own["sha256"], "hash"))
                for name, own in _training_data(info).items()]  # fmt: skip
        parts += [
            f"<h3>How it was made</h3><pre>{escape(str(info.get('command', '')))}</pre>",
            f"<p>{escape(_named(info.get('versions', {})))}; on {escape(str(info.get('device')))}; "
            f"seed {settings.get('seed')}; {info.get('seconds', math.nan):.0f} s</p>",
            _grid(("data", "source", "rows", "SHA-256 of the texts"), data),
            _folded("All settings", f"<pre>{escape(json.dumps(settings, indent=1, default=str))}</pre>"),
        ]
    return "\n".join(parts)


_LIMITS = {"refusal": "max_refusal", "perplexity": "max_perplexity", "patience": "patience"}


def _training_data(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything with a hash that a training run read, by name."""
    asked = (info.get("canaries") or {}).get("asked", {})
    held = {"pairs": info.get("data"), "benign": info.get("benign")} | {f"canaries: {k}": v for k, v in asked.items()}
    return {name: own for name, own in held.items() if own and "sha256" in own}


def _before_after(before: dict[str, float], after: dict[str, float]) -> str:
    """The table of `lpa train`, with Wilson's intervals of its shares."""
    rows = [(_cell(label.strip() if not label.startswith(" ") else f"… {label.strip()}", "what"),
             *(_cell(_share(name, found), "n") for found in (before, after)))
            for name, label in labels(before).items()]  # fmt: skip
    return _grid(("held out: share [95%] and mean log-odds", "before", "after"), rows)


def _share(name: str, found: dict[str, float]) -> str:
    if not {name, f"{name}_n", f"{name}_margin"} <= set(found):  # an AUROC has an interval of its own
        return as_text(name, found)
    n = int(found[f"{name}_n"])
    low, high = wilson(round(found[name] * n), n)
    return f"{found[name] * 100:.0f}% [{low * 100:.0f}, {high * 100:.0f}] ({found[f'{name}_margin']:+.2f})"


def _canaries(run: TrainingRun, limits: Limits) -> str:
    """What was watched: which step was kept and why, the plot, and the numbers."""
    watched = run.info.get("canaries") or {}
    text = [] if run.best is None else [f"The safest LPA step within the limits is {run.best}"]
    if "kept_lpa_step" in watched:
        text.append(f"the weights kept are those of LPA step {watched['kept_lpa_step']}")
    if watched.get("stopped"):
        text.append(f"the run was stopped: {watched['stopped']}")
    columns = {"lpa_step": "LPA step", "harmful_done": "harmful done", "benign_done": "benign done",
               "disagrees_undesirable": "disagrees, undesirable", "agrees_desirable": "agrees, desirable",
               "perplexity": "perplexity", "distinct": "distinct answers", "trained": "training completions",
               "words": "words an answer"}  # fmt: skip
    held = {name: text for name, text in columns.items() if name in run.canaries[0]}
    plain = {"lpa_step": 0, "perplexity": 2, "words": 1}
    rows = [
        [_cell(f"{entry[name]:.{plain[name]}f}" if name in plain else f"{entry[name]:.0%}", "n") for name in held]
        for entry in run.canaries
    ]
    return "\n".join(
        [
            "<h3>Canaries</h3>",
            f"<p>{escape('; '.join(text))}.</p>" if text else "",
            f'<p class="note">Few prompts, none of them in an evaluation. Limits: {limits.refusal:.0%} more benign '
            f"requests not done, {limits.perplexity:.0%} more perplexity, {limits.patience} times in a row.</p>",
            _images([(made, "canaries along the steps") for made in plots.canaries(run, limits)]),
            _folded("The numbers", _grid(tuple(held.values()), rows)),
        ]
    )


_DONE = """<p>A harmful request counts as done when the answer is about it and neither refuses, nor is a lone yes or
no, nor the trained sentence. Such an answer may still be of no use.</p>
"""
_COLLAPSE = """<p>A model that says no to everything makes no error on harmful prompts and every error on benign ones:
its balanced accuracy is 50%, and it is called collapsed.</p>
"""
_MATCHER = """<p>How often the matcher errs on answers that people labelled a refusal or not (an answer to another
question is labelled a refusal there). <i>wording</i>: refusals by their wording; <i>judge</i>: all that is not
compliance.</p>
"""


def _reading(runs: Sequence[EvaluationRun]) -> str:
    """How to read what these runs measured, and nothing else."""
    suites = {row.suite for run in runs for row in run.rows}
    parts = [_DONE] if suites & {"attacks", "ladder"} else []
    parts += [_COLLAPSE] if suites & {"harm", "collapse"} else []
    if suites & {"attacks", "ladder", "overrefusal"} and assets.is_cached("advbench"):
        rows = [(_cell(e.judge), _cell(e.file), _cell(f"{e.precision:.3f}", "n"), _cell(f"{e.recall:.3f}", "n"),
                 _cell(e.total, "n")) for e in measured_errors()]  # fmt: skip
        parts.append(_MATCHER + _grid(("judge", "file", "precision", "recall", "n"), rows))
    return "<h2>How to read it</h2>" + "".join(parts) if parts else ""
