"""Runs the cases of one piece in a process of its own, and writes each case's result as soon as there is one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from . import parts

AGAIN = 75  # exit code: a case has left the device unusable, and the others need another process
Run = Callable[[], dict[str, Any]]
Cases = Iterator[tuple[str, Run]]


class Skip(Exception):
    """A case, or a whole piece, has nothing to run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where a piece runs.

    Attributes:
        device: "cuda" or "cpu". dry: tiny shapes, to try the code and not to measure anything.
        out: the folder of all parts; a piece may keep files of its own in `out / "files"`.
        argument: what the piece is told beside.
    """

    device: str
    dry: bool
    out: Path
    argument: str = ""


def broken(error: BaseException) -> bool:
    """Whether the device can be used after an error: a kernel that failed takes its process's context with it."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def work(target: str, setting: Setting, path: Path, stop: float, begun: float) -> int:
    """Run the cases of a piece that are not done yet; returns the exit code.

    Args:
        target: MODULE:FUNCTION of the piece. path: of its part.
        stop: when to begin no more cases. begun: cases that failed since then are not tried again.
    """
    module, _, function = target.partition(":")
    part = parts.read(path) or {"cases": {}}
    cases = part["cases"]

    def settle(key: str, state: str, since: float, **found: Any) -> None:
        cases[key] = {"state": state, "seconds": round(time.time() - since, 2), "when": time.time(), **found}
        parts.write(path, part)

    part["finished"] = False
    since, parent = time.time(), os.getppid()
    try:
        given: Cases = getattr(import_module(module), function)(setting)
        for key, run in given:
            cases.pop("setup", None)
            old = cases.get(key)
            if old is not None and (old["state"] == "done" or old["when"] >= begun):
                continue
            since = time.time()
            if since > stop or os.getppid() != parent:
                print(f"no time left for {key!r}" if since > stop else "what had started this is gone", flush=True)
                return 0
            print(f"--- {key}", flush=True)
            cases[key] = {"state": "running", "when": since}
            parts.write(path, part)
            try:
                settle(key, "done", since, found=run())
            except Skip as reason:
                settle(key, "skipped", since, reason=str(reason))
            except Exception as error:
                traceback.print_exc()
                settle(key, "failed", since, reason=_short(error))
                if broken(error):
                    return AGAIN
            print(f"    {cases[key]['state']} in {cases[key]['seconds']} s", flush=True)
    except Skip as reason:
        cases["setup"] = {"state": "skipped", "when": since, "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        settle("setup", "failed", since, reason=_short(error))
        return 1
    part["finished"] = True
    parts.write(path, part)
    return 0


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--target", "--part", "--out", "--device", "--argument"):
        parser.add_argument(name, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--stop", type=float, required=True)
    parser.add_argument("--begun", type=float, required=True)
    args = parser.parse_args()
    setting = Setting(args.device, args.dry, Path(args.out), args.argument)
    print(json.dumps({"target": args.target, "device": args.device, "dry": args.dry}), flush=True)
    sys.exit(work(args.target, setting, Path(args.part), args.stop, args.begun))


if __name__ == "__main__":
    from benchmarks.gpu.worker import main as imported  # what the pieces import: their Skip is not __main__'s

    imported()
