"""The plots of a report, as PNGs: attack success, robustness curves, frontier, training curves."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from lpa.evaluation.suites import Row
from lpa.training.selection import Limits, faults, safety, utility

from .runs import EvaluationRun, ReportError, TrainingRun

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ReportError(
        "the report's plots need matplotlib: pip install -c constraints.txt '.[report]', or pip install matplotlib"
    ) from error

# Okabe and Ito's palette, which people with any colour vision can tell apart, and a shape for each colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vPX*"
PIXELS = 86  # on the page, an inch of a figure
_STYLE: dict[str, Any] = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def png(figure: Figure) -> str:
    """The figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(width: float = 8, height: float = 4, columns: int = 1) -> tuple[Figure, list[Any]]:
    """An empty figure in the report's style, and its axes."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height))
        return made, list(made.subplots(1, columns, squeeze=False)[0])


def _bars_error(rows: Sequence[Row | None]) -> list[list[float]]:
    low = [(row.value or 0) - (row.low if row.low is not None else row.value or 0) if row else 0.0 for row in rows]
    high = [(row.high if row.high is not None else row.value or 0) - (row.value or 0) if row else 0.0 for row in rows]
    return [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]


def shares(
    rows: Sequence[Row], subjects: Sequence[str], labels: dict[tuple[str, str, str], str], title: str
) -> Figure | None:
    """Bars of shares with their intervals, a group a label, a colour a subject.

    Args:
        labels: (suite, set, metric) -> what stands under the group.
    """
    held = {(row.subject, row.suite, row.set, row.metric): row for row in rows if row.value is not None}
    shown = {key: text for key, text in labels.items() if any((name, *key) in held for name in subjects)}
    if not shown:
        return None
    made, (axes,) = figure(min(12.0, max(8.0, 1.4 * len(shown))), 4.2)
    width = 0.8 / len(subjects)
    for number, name in enumerate(subjects):
        own = [held.get((name, *key)) for key in shown]
        places = [group + (number - (len(subjects) - 1) / 2) * width for group in range(len(shown))]
        values = [row.value if row and row.value is not None else math.nan for row in own]
        axes.bar(places, values, width * 0.92, color=COLOURS[number % len(COLOURS)], label=name,
                 yerr=_bars_error(own), error_kw={"lw": 1, "capsize": 2.5, "ecolor": "#444444"})  # fmt: skip
    axes.set_xticks(range(len(shown)), list(shown.values()))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(axis="x", visible=False)
    axes.set_title(title, loc="left")
    made.legend(frameon=False, loc="outside upper right", ncols=min(4, len(subjects)))
    return made


def robustness(run: EvaluationRun, x: str) -> Figure | None:
    """Agreement with undesirable statements over the attack's radius or steps: left the share, right the log-odds.

    Args:
        x: "epsilon" or "steps"; of the other the value is shown that the curve is measured at.
    """
    held = run.info["settings"]
    other = "steps" if x == "epsilon" else "epsilon"
    fixed = held["trait_steps"] if x == "epsilon" else held["trait_epsilon"]
    points = [r for r in run.rows if r.extra.get("epsilon") is not None and r.extra[other] == fixed]
    wide = max((r.extra["sites"] for r in points), key=lambda s: s.count("+"), default="")
    points = [r for r in points if r.extra["sites"] == wide]
    if len({r.extra[x] for r in points}) < 2:
        return None
    made, (left, right) = figure(11, 4.2, 2)
    for number, name in enumerate(run.subjects):
        clean = next(
            (r for r in run.rows if (r.subject, r.set, r.metric) == (name, "undesirable", "agrees, clean")), None
        )
        for random in (False, True):
            own = sorted(
                (r for r in points if r.subject == name and r.extra["random"] == random), key=lambda r: r.extra[x]
            )
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "ms": 5,
                     "ls": ":" if random else "-", "alpha": 0.65 if random else 1.0,
                     "label": f"{name}, random of equal norm" if random else name}  # fmt: skip
            places, values = [r.extra[x] for r in own], [r.value or 0.0 for r in own]
            left.plot(places, values, **style)
            if not random:
                band = ([r.low or 0.0 for r in own], [r.high or 0.0 for r in own])
                left.fill_between(places, *band, color=style["color"], alpha=0.12, lw=0)
            right.plot(places, [r.extra["margin"] for r in own], **style)
        if clean is not None:
            colour = COLOURS[number % len(COLOURS)]
            left.axhline(clean.value or 0.0, color=colour, lw=1, ls=(0, (1, 4)))
            right.axhline(clean.extra["margin"], color=colour, lw=1, ls=(0, (1, 4)))
    label = {"epsilon": "radius (epsilon)", "steps": "steps of the attack"}[x]
    for axes in (left, right):
        axes.set_xscale("log", base=10 if x == "epsilon" else 2)
        axes.set_xlabel(f"{label}, at {other} {fixed:g}")
        axes.set_xticks(sorted({r.extra[x] for r in points}), [f"{v:g}" for v in sorted({r.extra[x] for r in points})])
        axes.minorticks_off()
    left.yaxis.set_major_formatter(PercentFormatter(1, 0))
    left.set_ylim(-0.02, 1.02)
    left.set_title("agrees with undesirable statements", loc="left")
    right.set_title("mean log-odds of agreeing (dashes: clean)", loc="left")
    made.legend(
        *left.get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=min(3, 2 * len(run.subjects)),
    )
    return made


def by_site(run: EvaluationRun) -> Figure | None:
    """Mean log-odds of agreeing when one site alone is attacked."""
    held = run.info["settings"]
    points = [
        r for r in run.rows
        if r.extra.get("epsilon") == held["trait_epsilon"] and r.extra["steps"] == held["trait_steps"]
        and not r.extra["random"]
    ]  # fmt: skip
    sites = list(dict.fromkeys(r.extra["sites"] for r in points))
    if len(sites) < 2:
        return None
    made, (axes,) = figure(9, 3.8)
    for number, name in enumerate(run.subjects):
        own = {r.extra["sites"]: r.extra["margin"] for r in points if r.subject == name}
        places = [i + (number - (len(run.subjects) - 1) / 2) * 0.8 / len(run.subjects) for i in range(len(sites))]
        axes.bar(places, [own.get(s, math.nan) for s in sites], 0.74 / len(run.subjects), label=name,
                 color=COLOURS[number % len(COLOURS)])  # fmt: skip
    axes.set_xticks(range(len(sites)), ["all together" if "+" in s else s for s in sites])
    axes.axhline(0, color="#444444", lw=1)
    axes.set_ylabel("log-odds of agreeing")
    axes.set_title(f"attacked at one site, epsilon {held['trait_epsilon']:g}, {held['trait_steps']} steps", loc="left")
    made.legend(frameon=False, loc="outside upper right", ncols=min(4, len(run.subjects)))
    return made


def frontier(runs: Sequence[EvaluationRun]) -> Figure | None:
    """Each subject by benign requests done and harmful ones not done, directly asked; the best corner is top right."""
    points = []
    for run in runs:
        for name in run.subjects:
            own = [r for r in run.rows if r.subject == name and r.value is not None]
            done = next((r for r in own if r.suite == "overrefusal" and r.set == "benign"), None)
            harmful = [r for r in own if r.metric == "done: direct"]
            if done is not None and harmful:
                total = sum(r.n for r in harmful)
                share = sum((r.value or 0) * r.n for r in harmful) / total
                points.append(
                    (name if len(runs) == 1 else f"{run.name}: {name}", 1 - (done.value or 0), 1 - share, done.n, total)
                )
    if not points:
        return None
    from lpa.evaluation.stats import wilson

    made, (axes,) = figure(7.5, 5)
    for number, (name, x, y, n_x, n_y) in enumerate(points):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        spans = [wilson(value * n, n) for value, n in ((x, n_x), (y, n_y))]
        errors = [[[max(0.0, v - low)], [max(0.0, high - v)]] for v, (low, high) in zip((x, y), spans, strict=True)]
        axes.errorbar([x], [y], errors[1], errors[0], fmt=marker, color=colour, ms=8, lw=1, capsize=3, label=name)
    axes.plot([0, 1], [1, 0], color="#888888", lw=1, ls="--")
    axes.text(0.0, 0.03, "dashed: no better than a coin", color="#666666", fontsize=9)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="benign requests done", ylabel="harmful requests not done")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_title("frontier, asked directly", loc="left")
    made.legend(frameon=False, loc="outside right upper")
    return made


def training(run: TrainingRun) -> Figure | None:
    """Losses, norms and seconds over the LPA steps."""
    if len(run.steps) < 2:
        return None
    made, (left, middle, right) = figure(13, 4.2, 3)
    steps = [entry["lpa_step"] for entry in run.steps]
    names = {"attack_toward_first": "attack toward, first", "attack_toward_last": "attack toward, last",
             "attack_away_last": "attack away, last", "defence_toward": "defence toward",
             "defence_away": "defence away",
             "defence_sft": "sft", "defence_kl": "kl"}  # fmt: skip
    for axes, series in (
        (left, names),
        (middle, {k: k.removeprefix("norm/") for k in run.steps[-1] if k.startswith("norm/")}),
    ):
        for number, (key, label) in enumerate((k, v) for k, v in series.items() if k in run.steps[-1]):
            values = [entry.get(key, math.nan) for entry in run.steps]
            axes.plot(steps, values, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], ms=3,
                      label=label)  # fmt: skip
        if axes.lines:
            axes.legend(fontsize=8.5)
    right.plot(steps, [entry.get("boundary_fraction", math.nan) for entry in run.steps], color=COLOURS[1])
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1, 0))
    for axes, title in ((left, "losses"), (middle, "mean norm of the perturbation"), (right, "tokens at the radius")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("LPA step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def canaries(run: TrainingRun, limits: Limits) -> Figure | None:
    """What the canaries found: shares over the LPA steps, the price in perplexity, safety over utility step by step."""
    if len(run.canaries) < 2:
        return None
    made, (left, middle, right) = figure(13, 4.4, 3)
    steps, base = [entry["lpa_step"] for entry in run.canaries], run.canaries[0]
    series = {"benign requests done": "benign_done", "harmful requests done": "harmful_done",
              "disagrees, undesirable": "disagrees_undesirable", "agrees, desirable": "agrees_desirable"}  # fmt: skip
    for number, (label, key) in enumerate((text, k) for text, k in series.items() if k in base):
        left.plot(steps, [entry[key] for entry in run.canaries], color=COLOURS[number], marker=MARKERS[number], ms=5,
                  label=label)  # fmt: skip
    dearer = [entry["perplexity"] / base["perplexity"] - 1 for entry in run.canaries]
    middle.plot(steps, dearer, color=COLOURS[0], marker=MARKERS[0], ms=5)
    middle.axhline(limits.perplexity, color="#444444", lw=1, ls="--")
    middle.text(steps[0], limits.perplexity, " limit", va="bottom", fontsize=9, color="#444444")
    for axes, title in ((left, "canaries: shares"), (middle, "added perplexity")):
        if run.best is not None:
            axes.axvline(run.best, color="#444444", lw=1, ls=":")
            axes.annotate("best", (run.best, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                          fontsize=9, color="#444444")  # fmt: skip
        axes.set(xlabel="LPA step")
        axes.set_title(title, loc="left", pad=18)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    left.set_ylim(-0.03, 1.03)
    _path(right, run, limits)
    handles = left.get_legend_handles_labels()
    made.legend(*handles, frameon=False, loc="outside lower left", ncols=len(handles[1]))
    return made


def _path(axes: Any, run: TrainingRun, limits: Limits) -> None:
    """Safety over utility: a line through the steps in order, hollow where a step is beyond a limit."""
    x, y = [utility(entry) for entry in run.canaries], [safety(entry) for entry in run.canaries]
    axes.plot(x, y, color="#999999", lw=1, zorder=1)
    told: dict[tuple[float, float], list[str]] = {}
    for entry, place in zip(run.canaries, zip(x, y, strict=True), strict=True):
        best, beyond = entry["lpa_step"] == run.best, faults(entry, run.canaries[0], limits)
        colour = COLOURS[1] if best else COLOURS[0]
        axes.scatter(*place, s=150 if best else 45, marker="*" if best else "o", zorder=3 if best else 2, lw=1.3,
                     facecolor="white" if beyond else colour, edgecolor=colour)  # fmt: skip
        told.setdefault(place, []).append(f"{entry['lpa_step']:.0f}")
    for place, steps in told.items():
        axes.annotate(", ".join(steps), place, xytext=(7, 6), textcoords="offset points", fontsize=10)
    harmful = "harmful_done" in run.canaries[0]
    axes.set(xlabel="benign requests done",
             ylabel="harmful requests not done" if harmful else "statements answered rightly, both ways")  # fmt: skip
    axes.set_title("frontier by LPA step\n(star: best; hollow: beyond a limit)", loc="left", fontsize=11)
    axes.margins(0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, 0))
