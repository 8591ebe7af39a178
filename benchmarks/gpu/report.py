"""Joins the parts into one record and its Markdown table, in benchmarks/results if a GPU was measured there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import goals, origin, parts
from .parts import Part

KEPT = ("command", "date", "gpu", "torch", "commits", "status", "seconds")  # of a part, beside its cases
RESULTS = Path(__file__).resolve().parents[1] / "results"


def why_not(found: dict[str, Part]) -> str:
    """Why the parts are no measurements of a GPU; "" if they are."""
    if not found:
        return "there are no parts"
    dry = [name for name, part in found.items() if part.get("dry")]
    if dry:
        return f"{', '.join(dry)} ran dry"
    other = [name for name, part in found.items() if part.get("device") != "cuda"]
    if other:
        return f"{', '.join(other)} ran on {found[other[0]].get('device')}"
    if not goals.found(found, "ceilings", "machine"):
        return "the piece ceilings, which names the GPU, is missing"
    return origin.mixed(found)


def record(found: dict[str, Part]) -> dict[str, Any]:
    """What is kept: the machine, the goals, every case. Not the logs, which name folders of the machine."""
    machine = goals.found(found, "ceilings", "machine") or {}
    kept = {}
    for name, part in found.items():
        cases = {key: {k: v for k, v in case.items() if k != "when"} for key, case in part["cases"].items()}
        kept[name] = _without_folders({key: part.get(key) for key in KEPT} | {"cases": cases})
    keys = ("goal", "wanted", "outcome", "met")
    return {
        "date": max((part.get("date", "") for part in found.values()), default=""),
        "machine": machine,
        "commits": origin.commits(found),
        "dry": any(part.get("dry") for part in found.values()),
        "goals": [dict(zip(keys, row, strict=True)) for row in goals.goals(found)],
        "pieces": kept,
    }


def _without_folders(value: Any) -> Any:
    """The same with the names of files alone, where its messages have whole paths."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/(?=[\w.+@-])", "", value) if isinstance(value, str) else value


def markdown(found: dict[str, Part]) -> str:
    """The record as tables."""
    held = record(found)
    machine = held["machine"]
    told = machine.get("nvidia-smi", {})
    versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items())
    lines = [
        f"# {machine.get('gpu') or 'No GPU'}, {held['date']}",
        "",
        *(["**A dry run: tiny shapes, no measurement.**", ""] if held["dry"] else []),
        f"Driver {told.get('driver_version', 'unknown')}; {versions}; commit {' and '.join(held['commits'])}.",
        f"When it began: SM clock {told.get('clocks.sm', '?')} of {told.get('clocks.max.sm', '?')}, memory clock "
        f"{told.get('clocks.mem', '?')}, power {told.get('power.draw', '?')} of {told.get('power.limit', '?')}.",
        "",
        *_table(("goal", "wanted", "outcome", "met"), [tuple(row.values()) for row in held["goals"]]),
        "",
    ]
    for name, part in held["pieces"].items():
        of = f", commit {' and '.join(origin.commits({name: part}))}" if len(held["commits"]) > 1 else ""
        lines += [f"## {name}", "", f"`{part['command']}`, {part['date']}{of}: {part['status']}", ""]
        lines += _cases(part, goals.floor_ms(found, name), goals.ways(found, name).get(goals.CONVENTIONAL))
    return "\n".join(lines)


def _cases(part: Part, floor: float | None, base: float | None) -> list[str]:
    lines, plain = [], {}
    for key, case in part["cases"].items():
        values = case.get("found")
        if case["state"] != "done":
            plain[key] = {"": f"{case['state']}: {case.get('reason', '')}"}
            continue
        rows = {name: value for name, value in values.items() if isinstance(value, dict)}
        rest = {name: value for name, value in values.items() if not isinstance(value, dict | list) or _short(value)}
        if rows and "versions" not in rows:
            lines += [f"**{key}**" + "".join(f"; {name} {_text(value)}" for name, value in rest.items()), ""]
            deeper = {name: value for name, value in rows.items() if all(isinstance(v, dict) for v in value.values())}
            rows = {name: value for name, value in rows.items() if name not in deeper}
            for table in (rows, *deeper.values()):
                lines += [*_rows(table), ""] if table else []
            continue
        plain[key] = rest
        if "milliseconds" in values and base:
            plain[key]["times conventional"] = base / values["milliseconds"]
        if "milliseconds" in values and floor:
            plain[key]["times the floor"] = values["milliseconds"] / floor
    return [*(_rows(plain) if plain else []), "", *lines]


def _short(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 16 and not any(isinstance(each, dict) for each in value)


def _rows(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    return _table(("", *columns), [(name, *(_text(row.get(c, "")) for c in columns)) for name, row in rows.items()])


def _table(head: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(_text(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows),
    ]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)


def write(out: Path, pieces: Iterable[str], results: Path = RESULTS) -> str:
    """Write record and table, to `results` if they are of a GPU and to `out` if not; returns where, and why there."""
    found = parts.collect(out, pieces)
    reason = why_not(found)
    name = "report"
    if not reason:
        machine = goals.found(found, "ceilings", "machine") or {}
        slug = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")
        name, out = f"{slug}-{record(found)['date']}", results
    parts.write(out / f"{name}.json", record(found))
    (out / f"{name}.md").write_text(markdown(found) + "\n", encoding="utf-8")
    where = f"report: {out / name}.json and .md"
    return f"{where} (not in benchmarks/results: {reason})" if reason else where
