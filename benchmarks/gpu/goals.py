"""What issue by issue was aimed at, beside what the parts say: one row a goal."""

from __future__ import annotations

from typing import Any

from .parts import Part

Parts = dict[str, Part]
FAMILIES = {"llama": "Llama-3-8B", "qwen3": "Qwen3-8B"}
CONVENTIONAL = "conventional"
NONE = "not measured"


def found(parts: Parts, piece: str, case: str) -> dict[str, Any] | None:
    """What a case has found; None where it was not run to its end."""
    case_ = parts.get(piece, {}).get("cases", {}).get(case, {})
    return case_.get("found") if case_.get("state") == "done" else None


def ways(parts: Parts, piece: str) -> dict[str, float]:
    """Milliseconds of an inner step by each way that was run to its end."""
    cases = parts.get(piece, {}).get("cases", {})
    return {name: case["found"]["milliseconds"] for name, case in cases.items()
            if case["state"] == "done" and "milliseconds" in case["found"]}  # fmt: skip


def matmul_rate(parts: Parts) -> float | None:
    """FLOP/s of a large bf16 product."""
    product = found(parts, "ceilings", "bf16 product")
    return product["TFLOP/s"] * 1e12 if product else None


def floor_ms(parts: Parts, piece: str) -> float | None:
    """Milliseconds that the packed pass's floating-point operations take at the measured rate."""
    work, rate = found(parts, piece, "work"), matmul_rate(parts)
    return work["FLOP"] / rate * 1e3 if work and rate else None


def best(parts: Parts, piece: str) -> tuple[str, float] | None:
    """The fastest of the packed engine's ways by the package's own options, and its milliseconds."""
    return _least({name: ms for name, ms in ways(parts, piece).items() if name.startswith("packed")})


def _least(milliseconds: dict[str, float]) -> tuple[str, float] | None:
    return min(milliseconds.items(), key=lambda item: item[1], default=None)


def goals(parts: Parts) -> list[tuple[str, str, str, str]]:
    """(goal, wanted, outcome, met?)."""
    return [*_ops(parts), *_inner(parts), *_runs(parts)]


def _row(goal: str, wanted: str, value: float | None, met: bool, text: str) -> tuple[str, str, str, str]:
    if value is None:
        return goal, wanted, NONE, ""
    return goal, wanted, text, ("yes" if met else "no") if wanted else ""


def _ops(parts: Parts) -> list[tuple[str, str, str, str]]:
    rows = []
    for op in ("pgd_update_", "token_loss_", "perturb"):
        shares = {}
        for name, case in parts.get("ops", {}).get("cases", {}).items():
            if case["state"] == "done" and name.startswith(op):
                own = {way: row for way, row in case["found"].items() if "meets the goal" in row}
                shares |= {(name, way): row["share_of_copy"] for way, row in own.items() if "native" not in way}
        least = min(shares, key=shares.__getitem__, default=None)
        value = None if least is None else shares[least]
        rows.append(_row(f"{op}: least share of the copy's bandwidth beyond the L2", ">= 0.85 (0.90)", value,
                         (value or 0) >= 0.85, f"{value or 0:.2f}, {least[0] if least else ''}"))  # fmt: skip
    return rows + _launches(parts) + _beside(parts)


def _own(parts: Parts) -> list[tuple[str, str, dict[str, Any]]]:
    """(group, way, what was found) of this package's own ways."""
    cases = {n: c["found"] for n, c in parts.get("ops", {}).get("cases", {}).items() if c["state"] == "done"}
    return [(name, way, row) for name, found in cases.items() for way, row in found.items() if way.startswith("ours")]


def _launches(parts: Parts) -> list[tuple[str, str, str, str]]:
    small = {(name, way): row["launches"] for name, way, row in _own(parts)
             if "launches" in row and "meets the goal" not in row and not name.startswith("linear")}  # fmt: skip
    most = max(small, key=small.__getitem__, default=None)
    value = None if most is None else float(small[most])
    text = "" if most is None else f"at most {small[most]}, {most[0]}, {most[1]}"
    return [_row("small ops: launches", "1", value, value == 1, text)]


def _beside(parts: Parts) -> list[tuple[str, str, str, str]]:
    """CUDA C++ by Triton, where both have run."""
    rows: dict[str, dict[str, float]] = {}
    for name, way, row in _own(parts):
        rows.setdefault(name, {})[way] = row["milliseconds"]
    ratios = {name: own["ours (native)"] / own["ours (triton)"] for name, own in rows.items()
              if {"ours (native)", "ours (triton)"} <= own.keys()}  # fmt: skip
    text = "; ".join(f"{ratio:.2f}, {name}" for name, ratio in ratios.items())
    return [("CUDA C++'s time by Triton's", "", text or NONE, "")]


def _inner(parts: Parts) -> list[tuple[str, str, str, str]]:
    rows = []
    for family, name in FAMILIES.items():
        for pairs, wanted in ((2, 6.0), (8, None), (16, 3.0)):
            piece = f"inner-{family}-{pairs}"
            fastest, base = best(parts, piece), ways(parts, piece).get(CONVENTIONAL)
            ratio = base / fastest[1] if fastest and base else None
            way = fastest[0] if fastest else ""
            goal = f"{name}, micro-batch {pairs}: times the conventional loop"
            rows.append(_row(goal, f">= {wanted:g}" if wanted else "", ratio, (ratio or 0) >= (wanted or 0),
                             f"{ratio or 0:.2f}, {way}"))  # fmt: skip
            tried = _least(ways(parts, f"variants-{family}-{pairs}"))
            if tried and base:  # code of the benchmark, which the package does not have
                rows.append((f"{goal}, by what is only tried", "", f"{base / tried[1]:.2f}, {tried[0]}", ""))
        piece = f"inner-{family}-16"
        fastest, floor = best(parts, piece), floor_ms(parts, piece)
        ratio = fastest[1] / floor if fastest and floor else None
        rows.append(_row(f"{name}, micro-batch 16: times the floor of its matrix products", "<= 1.5", ratio,
                         (ratio or 9) <= 1.5, f"{ratio or 0:.2f}, {fastest[0] if fastest else ''}"))  # fmt: skip
    return rows


def _runs(parts: Parts) -> list[tuple[str, str, str, str]]:
    whole = [f["seconds of 30 LPA steps"] for f in
             (found(parts, "run", name) for name in parts.get("run", {}).get("cases", {}))
             if f and "seconds of 30 LPA steps" in f]  # fmt: skip
    memory = found(parts, "memory", "micro-batch 2")
    seconds = min(whole, default=None)
    peak = memory.get("peak_reserved_gb") if memory else None
    return [
        _row("30 LPA steps at batch 16, 8B: seconds", "<= 90 (75)", seconds, (seconds or 999) <= 90, f"{seconds}"),
        _row("8B at micro-batch 2: peak memory held, GB", "< 22", peak, (peak or 99) < 22, f"{peak}"),
    ]
