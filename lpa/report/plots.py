"""The plots of a report, as PNGs of one width: two stand side by side on a screen, and one fills a phone."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from lpa.evaluation.refusal import NOT_DONE, OWN_WORDS
from lpa.evaluation.sets import BENIGN
from lpa.evaluation.stats import wilson
from lpa.evaluation.subjects import BASE, STEP
from lpa.evaluation.suites import Row
from lpa.evaluation.suites.utility import GENERATED
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
WIDTH = 5.2  # inches of every plot
PIXELS = 100  # on the page, an inch of a plot
_GREY = "#444444"
_STYLE: dict[str, Any] = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "axes.titlesize": 12, "figure.constrained_layout.use": True,
}  # fmt: skip


def png(figure: Figure) -> str:
    """The figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * PIXELS, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(title: str, height: float = 3.8) -> tuple[Figure, Any]:
    """An empty plot in the report's style, and its axes."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(WIDTH, height))
        axes = made.subplots()
    axes.set_title(title, loc="left")
    return made, axes


def _legend(made: Figure, axes: Any) -> Figure:
    """A legend below the plot, where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        made.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=10,
                    ncols=1 if max(map(len, labels)) > 22 else 2)  # fmt: skip
    return made


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _percent(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1, 0))


# ---- evaluations ---------------------------------------------------------------------------------------------------


def shares(
    rows: Sequence[Row], subjects: Sequence[str], labels: dict[tuple[str, str, str], str], title: str
) -> Figure | None:
    """Horizontal bars of shares with their intervals, a group a label, a colour a subject.

    Args:
        labels: (suite, set, metric) -> the group's name; all of them must be better in the same direction.
    """
    held = {(row.subject, row.suite, row.set, row.metric): row for row in rows if row.value is not None}
    shown = {key: text for key, text in labels.items() if any((name, *key) in held for name in subjects)}
    if not shown:
        return None
    made, axes = _figure(title, 1.3 + len(shown) * (0.18 + 0.2 * len(subjects)) + 0.12 * len(subjects))
    thick = 0.8 / len(subjects)
    for number, name in enumerate(subjects):
        for place, key in enumerate(shown):
            if (row := held.get((name, *key))) is not None:
                value = row.value or 0.0
                ends = [[max(0.0, value - (value if row.low is None else row.low))],
                        [max(0.0, (value if row.high is None else row.high) - value)]]  # fmt: skip
                axes.barh(place + (number - (len(subjects) - 1) / 2) * thick, value, thick * 0.92,
                          color=COLOURS[number % len(COLOURS)], label=name if place == 0 else None, xerr=ends,
                          error_kw={"lw": 1, "capsize": 2.5, "ecolor": _GREY})  # fmt: skip
    axes.set_yticks(range(len(shown)), list(shown.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    _percent(axes.xaxis)
    axes.grid(axis="y", visible=False)
    return _legend(made, axes)


def fates(rows: Sequence[Row], subjects: Sequence[str], name: str) -> Figure | None:
    """What becomes of a set's harmful requests, asked directly: done, or not done in one of three ways."""
    kinds = {"done": "done: direct"} | {f"not done: {kind}": f"not done: {kind}" for kind in NOT_DONE}
    held = {(r.subject, r.metric): r.value or 0.0 for r in rows if r.suite == "attacks" and r.set == name}
    shown = [subject for subject in subjects if (subject, "done: direct") in held]
    if not shown:
        return None
    made, axes = _figure(f"{name}: what becomes of requests", 1.9 + 0.32 * len(shown))
    left = [0.0] * len(shown)
    for colour, (label, metric) in zip((COLOURS[1], COLOURS[2], COLOURS[4], "#AAAAAA"), kinds.items(), strict=True):
        values = [held.get((subject, metric), 0.0) for subject in shown]
        axes.barh(range(len(shown)), values, 0.7, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    _percent(axes.xaxis)
    axes.grid(axis="y", visible=False)
    return _legend(made, axes)


def robustness(run: EvaluationRun, x: str) -> list[Figure]:
    """Agreement with undesirable statements over the attack's radius or steps: the share, and the log-odds.

    Args:
        x: "epsilon" or "steps"; the other is held at the value that the curve is measured at.
    """
    held = run.info["settings"]
    other = "steps" if x == "epsilon" else "epsilon"
    fixed = held["trait_steps"] if x == "epsilon" else held["trait_epsilon"]
    points = [r for r in run.rows if r.extra.get("epsilon") is not None and r.extra[other] == fixed]
    wide = max((r.extra["sites"] for r in points), key=lambda s: s.count("+"), default="")
    points = [r for r in points if r.extra["sites"] == wide]
    ticks = sorted({r.extra[x] for r in points})
    if len(ticks) < 2:
        return []
    (first, left), (second, right) = _figure("agrees with undesirable statements"), _figure("mean log-odds of agreeing")
    for number, name in enumerate(run.subjects):
        colour = COLOURS[number % len(COLOURS)]
        for random in (False, True):
            own = [r for r in points if r.subject == name and r.extra["random"] == random]
            own.sort(key=lambda r: r.extra[x])
            style = _look(number) | {"ms": 5, "ls": ":" if random else "-", "alpha": 0.65 if random else 1.0,
                                     "label": f"{name}, random of equal norm" if random else name}  # fmt: skip
            places = [r.extra[x] for r in own]
            left.plot(places, [r.value or 0.0 for r in own], **style)
            right.plot(places, [r.extra["margin"] for r in own], **style)
            if not random:
                left.fill_between(places, [r.low or 0.0 for r in own], [r.high or 0.0 for r in own], color=colour,
                                  alpha=0.12, lw=0)  # fmt: skip
        clean = next((r for r in run.rows if r.subject == name and r.suite == "traits" and r.set == "undesirable"
                      and r.metric == "agrees, clean"), None)  # fmt: skip
        if clean is not None:
            for axes, value in ((left, clean.value or 0.0), (right, clean.extra["margin"])):
                axes.axhline(value, color=colour, lw=1, ls=(0, (1, 4)))
    label = {"epsilon": "radius (epsilon)", "steps": "steps of the attack"}[x]
    for axes in (left, right):
        axes.set_xscale("log", base=10 if x == "epsilon" else 2)
        axes.set_xlabel(f"{label}, at {other} {fixed:g}; dots: clean")
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    _percent(left.yaxis)
    left.set_ylim(-0.02, 1.02)
    return [_legend(first, left), _legend(second, right)]


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
    made, axes = _figure(f"one site attacked, epsilon {held['trait_epsilon']:g}", 1.3 + 0.4 * len(sites))
    thick = 0.8 / len(run.subjects)
    for number, name in enumerate(run.subjects):
        own = {r.extra["sites"]: r.extra["margin"] for r in points if r.subject == name}
        places = [i + (number - (len(run.subjects) - 1) / 2) * thick for i in range(len(sites))]
        axes.barh(places, [own.get(s, math.nan) for s in sites], thick * 0.92, label=name,
                  color=COLOURS[number % len(COLOURS)])  # fmt: skip
    axes.set_yticks(range(len(sites)), ["all together" if "+" in s else s for s in sites])
    axes.invert_yaxis()
    axes.axvline(0, color=_GREY, lw=1)
    axes.set_xlabel("log-odds of agreeing")
    return _legend(made, axes)


def erosion(run: EvaluationRun, kind: str) -> Figure | None:
    """Harmful requests done over the updates of fine-tuning on harmful or on benign rows, all sets together."""
    points = [r for r in run.rows if r.extra.get("erosion") == kind and r.value is not None]
    if not points:
        return None
    made, axes = _figure(f"harm done after fine-tuning on {kind} rows")
    for number, name in enumerate(run.subjects):
        curve = {}
        for updates in sorted({r.extra["updates"] for r in points}):
            own = [r for r in points if r.subject == name and r.extra["updates"] == updates]
            if total := sum(r.n for r in own):
                hits = sum((r.value or 0) * r.n for r in own)
                curve[updates] = (hits / total, *wilson(hits, total))
        axes.plot(list(curve), [share for share, _, _ in curve.values()], label=name, **_look(number))
        axes.fill_between(list(curve), [low for _, low, _ in curve.values()], [high for _, _, high in curve.values()],
                          color=COLOURS[number % len(COLOURS)], alpha=0.12, lw=0)  # fmt: skip
    axes.set_xlabel("updates")
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis)
    return _legend(made, axes)


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
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                points.append((label, 1 - (done.value or 0), 1 - share, done.n, total))
    if not points:
        return None
    made, axes = _figure("frontier, asked directly", 4.6)
    for number, (name, x, y, n_x, n_y) in enumerate(points):
        spans = [wilson(value * n, n) for value, n in ((x, n_x), (y, n_y))]
        errors = [[[max(0.0, v - low)], [max(0.0, high - v)]] for v, (low, high) in zip((x, y), spans, strict=True)]
        look = _look(number)
        axes.errorbar([x], [y], errors[1], errors[0], fmt=look["marker"], color=look["color"], ms=8, lw=1, capsize=3,
                      label=name)  # fmt: skip
    axes.plot([0, 1], [1, 0], color="#888888", lw=1, ls="--")
    axes.text(0.02, 0.02, "dashed: no better than a coin", color="#666666", fontsize=10)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="benign requests done", ylabel="harmful requests not done")
    _percent(axes.xaxis, axes.yaxis)
    return _legend(made, axes)


def over_steps(run: EvaluationRun) -> list[Figure]:
    """Where the subjects are checkpoints of one run: safety, benign requests, utility and collapse over its updates."""
    steps = {name: int(name.removeprefix(STEP)) for name in run.subjects if name.startswith(STEP)}
    if len(steps) < 2:
        return []
    entries = []
    for name, updates in {BASE: 0, **steps}.items():
        own = [row for row in run.rows if row.subject == name and row.value is not None]
        entry = {"updates": float(updates)}
        for key, (suite, metric) in _OVER_STEPS.items():
            held = [row for row in own if (row.suite, row.metric) == (suite, metric)
                    and not row.set.startswith(f"{BENIGN} (")]  # fmt: skip  # its parts would count twice
            if total := sum(row.n for row in held):
                entry[key] = sum((row.value or 0.0) * row.n for row in held) / total
        entries.append(entry)
    shares = {key: key for key in _OVER_STEPS if key != "perplexity"}
    price = {"perplexity": "perplexity"}
    found = [_curves(entries, "over the updates", shares, True, "updates"),
             _curves(entries, "perplexity over the updates", price, False, "updates")]  # fmt: skip
    return [made for made in found if made is not None]


_OVER_STEPS = {
    "harm done": ("attacks", "done: direct"),
    "refused in own words": ("attacks", f"not done: {OWN_WORDS}"),
    "benign not done": ("overrefusal", "not done"),
    "MMLU": ("utility", "accuracy"),
    "easy questions": ("utility", GENERATED),
    "distinct answers": ("collapse", "distinct answers"),
    "perplexity": ("utility", "perplexity"),
}


# ---- training runs -------------------------------------------------------------------------------------------------


def training(run: TrainingRun) -> list[Figure]:
    """Losses, norms and the share of tokens at the radius over the LPA steps."""
    if len(run.steps) < 2:
        return []
    losses = {"attack_toward_first": "attack toward, first", "attack_toward_last": "attack toward, last",
              "attack_away_last": "attack away, last", "defence_toward": "defence toward",
              "defence_away": "defence away", "defence_sft": "sft", "defence_kl": "kl"}  # fmt: skip
    norms = {key: key.removeprefix("norm/") for key in run.steps[-1] if key.startswith("norm/")}
    found = [_curves(run.steps, "losses", losses), _curves(run.steps, "mean norm of the perturbation", norms),
             _curves(run.steps, "tokens at the radius", {"boundary_fraction": "share"}, percent=True)]  # fmt: skip
    return [made for made in found if made is not None]


def _curves(
    entries: Sequence[dict[str, float]],
    title: str,
    series: dict[str, str],
    percent: bool = False,
    over: str = "lpa_step",
) -> Figure | None:
    """Values over the LPA steps, or over another value of the entries; None where none of them is there."""
    held = {key: label for key, label in series.items() if any(key in entry for entry in entries)}
    if not held:
        return None
    made, axes = _figure(title)
    for number, (key, label) in enumerate(held.items()):
        axes.plot([entry[over] for entry in entries], [entry.get(key, math.nan) for entry in entries], ms=4,
                  label=label, **_look(number))  # fmt: skip
    axes.set_xlabel(over.replace("lpa_step", "LPA step"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.set_ylim(-0.03, 1.03)
        _percent(axes.yaxis)
    return _legend(made, axes)


def canaries(run: TrainingRun, limits: Limits) -> list[Figure]:
    """What the canaries found: shares over the LPA steps, the price in perplexity, safety over utility step by step."""
    if len(run.canaries) < 2:
        return []
    series = {"benign_done": "benign requests done", "harmful_done": "harmful requests done",
              "disagrees_undesirable": "disagrees, undesirable", "agrees_desirable": "agrees, desirable"}  # fmt: skip
    shown = _curves(run.canaries, "canaries: shares", series, percent=True)
    price, axes = _figure("added perplexity")
    steps, base = [entry["lpa_step"] for entry in run.canaries], run.canaries[0]
    axes.plot(steps, [entry["perplexity"] / base["perplexity"] - 1 for entry in run.canaries], ms=5, **_look(0))
    axes.axhline(limits.perplexity, color=_GREY, lw=1, ls="--")
    axes.text(steps[0], limits.perplexity, " limit", va="bottom", color=_GREY)
    axes.set_xlabel("LPA step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis)
    for made in (shown, price):
        if made is not None and run.best is not None:
            made.axes[0].axvline(run.best, color=_GREY, lw=1, ls=":")
            made.axes[0].annotate("best", (run.best, 0.98), xycoords=("data", "axes fraction"), ha="left", va="top",
                                  color=_GREY)  # fmt: skip
    return [made for made in (shown, price, _path(run, limits)) if made is not None]


def _path(run: TrainingRun, limits: Limits) -> Figure:
    """Safety over utility: a line through the steps in order, hollow where a step is beyond a limit."""
    made, axes = _figure("by LPA step; star: best, hollow: beyond a limit", 4.4)
    x, y = [utility(entry) for entry in run.canaries], [safety(entry) for entry in run.canaries]
    axes.plot(x, y, color="#999999", lw=1, zorder=1)
    steps_at: dict[tuple[float, float], list[str]] = {}
    for entry, place in zip(run.canaries, zip(x, y, strict=True), strict=True):
        best, beyond = entry["lpa_step"] == run.best, faults(entry, run.canaries[0], limits)
        colour = COLOURS[1] if best else COLOURS[0]
        axes.scatter(*place, s=150 if best else 45, marker="*" if best else "o", zorder=3 if best else 2, lw=1.3,
                     facecolor="white" if beyond else colour, edgecolor=colour)  # fmt: skip
        steps_at.setdefault(place, []).append(f"{entry['lpa_step']:.0f}")
    for place, steps in steps_at.items():
        axes.annotate(", ".join(steps), place, xytext=(7, 6), textcoords="offset points")
    harmful = "harmful_done" in run.canaries[0]
    axes.set(xlabel="benign requests done",
             ylabel="harmful requests not done" if harmful else "statements answered rightly, both ways")  # fmt: skip
    axes.margins(0.15)
    _percent(axes.xaxis, axes.yaxis)
    return made
