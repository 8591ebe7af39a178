"""Run what a GPU is to tell, piece by piece, into one record; started again, it goes on where it was.

    python -m benchmarks.gpu --list                                what there is
    python -m benchmarks.gpu truth ops inner-llama-16              these pieces; all by default
    python -m benchmarks.gpu --minutes 9 --record runs/h100.json   begins no case after 9 minutes
    python -m benchmarks.gpu --table benchmarks/results/RECORD     its tables and goals, in Markdown; runs nothing
    python -m benchmarks.gpu --dry                                 every piece on tiny shapes, on the CPU

A piece is a few minutes of cases. Each case is written to the record as soon as it has ended, and one that is there is
not run again (--retry: those that failed are). The record is benchmarks/results/GPU-DATE.json, or --record FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measures import Skip, smi
from benchmarks.measure import RESULTS, command, device, revision, table
from lpa.files import write_json

Record = dict[str, Any]
ONE = ("gpu", "torch", "dry")  # what all cases of a record have in common
UNFINISHED = "the process ended before the case did"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--retry", action="store_true", help="run cases again that failed or were skipped")
    parser.add_argument("--commit", metavar="HASH", help="of the code, where there is no git to say it")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on the CPU: tries the code, measures nothing")
    parser.add_argument("--list", action="store_true", help="list the pieces")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's tables; run nothing")
    args = parser.parse_args(argv)
    stop = time.time() + 60 * args.minutes
    if args.table:
        print(page(json.loads(args.table.read_text(encoding="utf-8"))))
        return 0
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from benchmarks.gpu.pieces import PIECES

    if args.list:
        print("\n".join(PIECES))
        return 0
    if unknown := sorted(set(args.pieces) - set(PIECES)):
        parser.error(f"unknown pieces {', '.join(unknown)}; there are {', '.join(PIECES)}")
    if device() != "cuda" and not args.dry:
        parser.error("there is no CUDA device; --dry tries the pieces without one")
    path = args.record or default_record()
    record = opened(path, args.dry)
    for name in args.pieces or PIECES:
        for case, run in PIECES[name](args.dry).items():
            done = record["pieces"].setdefault(name, {})
            if case in done and not (args.retry and "found" not in done[case]):
                continue
            if time.time() > stop:
                print("no time left; the same command goes on here")
                return 1
            print(f"{name}: {case}", flush=True)
            done[case] = {"failed": UNFINISHED}
            write_json(path, record, nulls=True)
            done[case] = outcome(run, args.commit)
            write_json(path, record, nulls=True)
            print(f"    {str(done[case])[:400]}", flush=True)
            if "CUDA error" in done[case].get("failed", ""):
                print("the device is unusable for this process; the same command goes on with the next case")
                return 1
    print(f"the record is {path}; --table {path} shows it")
    return 0


def default_record() -> Path:
    """Where the record goes: of a GPU under its name and the date, of a dry run out of the results."""
    if device() != "cuda":
        return Path("runs/gpu-dry.json")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return RESULTS / f"{slug}-{time.strftime('%Y-%m-%d')}.json"


def opened(path: Path, dry: bool) -> Record:
    """The record to go on with, or a new one.

    Raises:
        SystemExit: the file is of another GPU, another torch, or a dry run.
    """
    here = {"gpu": torch.cuda.get_device_name() if device() == "cuda" else None, "torch": torch.__version__, "dry": dry}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return here | {"date": time.strftime("%Y-%m-%d"), "pieces": {}}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    made = {name: record.get(name) for name in ONE}
    if made != here:
        raise SystemExit(f"{path} was made by {made}, and this is {here}; give another --record")
    return record


def outcome(run: Any, commit: str | None) -> dict[str, Any]:
    """What a case has found, or why it has not; with its seconds, command, commit and the GPU's clock."""
    begin = time.time()
    try:
        found = {"found": run()}
    except Skip as reason:
        found = {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        found = {"failed": re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/(?=[\w.+@-])", "", text)[:800]}  # without folders
    if device() == "cuda" and "CUDA error" not in found.get("failed", ""):
        torch.cuda.empty_cache()
    made = {"seconds": round(time.time() - begin, 1), "command": command(), "commit": revision() or commit}
    return found | made | smi("clocks.sm", "temperature.gpu")


# ---- tables ----------------------------------------------------------------------------------------------------------


def found_in(record: Record, piece: str, case: str) -> dict[str, Any]:
    """What a case has found; empty where it was not run to its end."""
    found: dict[str, Any] = record["pieces"].get(piece, {}).get(case, {}).get("found", {})
    return found


def floor_ms(record: Record, family: str, pairs: int) -> float | None:
    """Milliseconds of an inner step's operations at the rate that was measured at the model's own shapes."""
    work = found_in(record, f"inner-{family}-{pairs}", "work").get("FLOP")
    rate = found_in(record, "truth", f"products, {family}, {144 * pairs} rows").get("TFLOP/s")
    return work / rate / 1e9 if work and rate else None


def goals(record: Record) -> list[tuple[str, str, str]]:
    """(goal, wanted, outcome)."""
    rows = []
    for family, pairs in (("llama", 16), ("llama", 2), ("llama", 8), ("qwen3", 16), ("qwen3", 2), ("qwen3", 8)):
        name, cases = f"{family}, {pairs} pairs", record["pieces"].get(f"inner-{family}-{pairs}", {})
        steps = {case: own["found"]["ms"] for case, own in cases.items() if "ms" in own.get("found", {})}
        public = steps.pop("public form", None)
        best = min((case for case in steps if "reference" not in case), key=steps.__getitem__, default=None)
        floor = floor_ms(record, family, pairs)
        wanted = {16: ">= 3", 2: ">= 6"}.get(pairs, "")
        rows.append(
            (f"{name}: times the public form", wanted, f"{public / steps[best]:.2f}, {best}" if best and public else "")
        )
        if pairs == 16:
            rows.append(
                (f"{name}: by the floor", "<= 1.3", f"{steps[best] / floor:.2f}, {best}" if best and floor else "")
            )
    for engine, wanted in (("stack", "<= 70"), ("packed", "<= 90")):
        seconds = found_in(record, "run", f"llama, 16 pairs at once, {engine}").get("seconds", "")
        rows.append((f"30 LPA steps, {engine}: seconds", wanted, f"{seconds}"))
    peak = found_in(record, "run", "llama, 8 x 2 pairs, 2 LPA steps").get("peak reserved GB", "")
    rows.append(("micro-batch 2: GB held at the peak", "< 22", f"{peak}"))
    for op in ("perturb", "pgd_update_", "token_loss_", "add_norm", "swiglu"):
        shares = {
            f"{group}, {way}": row["share_of_copy"]
            for group, own in record["pieces"].get("ops", {}).items() if group.startswith(op)
            for way, row in own.get("found", {}).items() if way.startswith("ours") and row.get("beyond_l2")
        }  # fmt: skip
        least = min(shares, key=shares.__getitem__, default=None)
        rows.append((f"{op}: least share of the copy", ">= 0.9", f"{shares[least]:.2f}, {least}" if least else ""))
    return [(goal, wanted, outcome or "not measured") for goal, wanted, outcome in rows]


def page(record: Record) -> str:
    """The record as Markdown: goals beside outcomes, then a table a piece."""
    dry = "**A dry run: tiny shapes, no measurement.**\n\n" if record["dry"] else ""
    parts = [f"# {record['gpu'] or 'No GPU'}, torch {record['torch']}, {record['date']}\n\n{dry}",
             table(("goal", "wanted", "outcome"), goals(record))]  # fmt: skip
    for name, cases in record["pieces"].items():
        parts.append(f"\n## {name}\n\n")
        plain: dict[str, dict[str, Any]] = {}
        for case, own in cases.items():
            found = own.get("found", {"": next((f"{k}: {own[k]}" for k in ("skipped", "failed") if k in own), "")})
            rows = {key: value for key, value in found.items() if isinstance(value, dict)}
            plain[case] = {
                key: value for key, value in found.items() if key not in rows and not isinstance(value, list)
            }
            deeper = {key: value for key, value in rows.items() if all(isinstance(v, dict) for v in value.values())}
            if rows != deeper and case != "machine":
                parts.append(f"**{case}**\n\n{_rows({k: v for k, v in rows.items() if k not in deeper})}\n")
            parts += [f"**{case}: {key}**\n\n{_rows(value)}\n" for key, value in deeper.items()]
        parts.append(_rows({case: row for case, row in plain.items() if row}))
    return "".join(parts)


def _rows(rows: dict[str, Any]) -> str:
    rows = {name: row if isinstance(row, dict) else {"": row} for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[name, *(_text(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    return table(("", *columns), cells) if rows else ""


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value).replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
