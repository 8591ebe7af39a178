"""The one table of an evaluation: a line a number, a column a subject; as text, as Markdown, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from .stats import mean
from .subjects import BASE
from .suites import Row

VERDICT = "verdict"


def arms(subjects: Iterable[str]) -> dict[str, list[str]]:
    """The subjects, named ARM-SEED, of each arm; the base model is an arm by itself."""
    own: dict[str, list[str]] = {}
    for name in subjects:
        own.setdefault(name if name == BASE else name.rpartition("-")[0], []).append(name)
    return own


def mean_range(values: Sequence[float], digits: int) -> str:
    """Mean, and range where there are several values: "12 (8 to 18)"; nothing of none."""
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def number(row: Row | None) -> str:
    """A row's value and interval: "12% [8, 18]" or "3.42 [3.1, 3.8]"; a dash where there is none."""
    if row is None:
        return ""
    if row.suite == VERDICT:
        return row.metric if row.value is None else row.note
    if row.metric == "collapsed":
        return "YES" if row.value else "no"
    if row.value is None or math.isnan(row.value):
        return "-"
    scale, digits = (100, 0) if row.unit == "%" else (1, 3 if abs(row.value) < 1 else 2 if abs(row.value) < 100 else 0)
    text = f"{row.value * scale:.{digits}f}{row.unit}"
    if row.low is not None and row.high is not None and not math.isnan(row.low):
        text += f" [{row.low * scale:.{digits}f}, {row.high * scale:.{digits}f}]"
    return text


def lines(rows: Sequence[Row], subjects: Sequence[str]) -> list[tuple[str, str, str, str, list[Row | None]]]:
    """The table's lines in order of first appearance: suite, set, metric, arrow, and the row of each subject."""
    keys = dict.fromkeys((row.suite, row.set, row.metric if row.suite != VERDICT else "") for row in rows)
    order = {suite: i for i, suite in enumerate(dict.fromkeys(row.suite for row in rows))}
    held = {(row.subject, row.suite, row.set, row.metric if row.suite != VERDICT else ""): row for row in rows}
    found = []
    for suite, where, metric in sorted(keys, key=lambda key: order[key[0]]):
        own = [held.get((subject, suite, where, metric)) for subject in subjects]
        arrow = {"up": "↑", "down": "↓"}.get(next((row.good for row in own if row), ""), "")
        found.append((suite, where, metric, arrow, own))
    return found


def as_table(rows: Sequence[Row], subjects: Sequence[str], full: bool = False) -> Table:
    """For a terminal. Points of curves are left out unless `full`."""
    table = Table(show_lines=False)
    for name in ("suite", "set", "what"):
        table.add_column(name)
    for name in subjects:
        table.add_column(Text(name), justify="right")
    table.add_column("n", justify="right")
    table.add_column("note")
    last = ""
    for suite, where, metric, arrow, own in shown(lines(rows, subjects), full):
        if suite != last and last:
            table.add_section()
        bad = [row is not None and row.metric == "collapsed" and bool(row.value) for row in own]
        cells = [Text(number(row), "bold red" if flag else "") for row, flag in zip(own, bad, strict=True)]
        notes = "; ".join(dict.fromkeys(row.note for row in own if row and row.note and suite != VERDICT))
        count = "/".join(str(n) for n in dict.fromkeys(row.n for row in own if row and row.n))
        table.add_row(
            suite if suite != last else "", Text(where), Text(f"{metric} {arrow}"), *cells, count, Text(notes)
        )
        last = suite
    return table


def as_markdown(rows: Sequence[Row], subjects: Sequence[str], full: bool = False) -> str:
    """For a README."""
    head = ["suite", "set", "what", *subjects, "n"]
    out = [head, ["---"] * 3 + ["---:"] * (len(subjects) + 1)]
    for suite, where, metric, arrow, own in shown(lines(rows, subjects), full):
        count = "/".join(str(n) for n in dict.fromkeys(row.n for row in own if row and row.n))
        out.append([suite, where, f"{metric} {arrow}".strip(), *map(number, own), count])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in out) + "\n"


def shown(
    found: list[tuple[str, str, str, str, list[Row | None]]], full: bool
) -> list[tuple[str, str, str, str, list[Row | None]]]:
    """Without the points of the robustness curves, which are for plots."""
    return [line for line in found if full or not any(row and "epsilon" in row.extra for row in line[4])]
