"""Works through pieces, each in a process of its own with a time limit, so that what breaks one leaves the others."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import parts
from .origin import commit, deciding, origin
from .parts import Part
from .worker import AGAIN

GRACE = 20.0  # seconds that a case may go on past a limit before its process is ended
SETTLED = ("done", "skipped")


@dataclass(frozen=True)
class Piece:
    """Some cases that belong together.

    Attributes:
        target: MODULE:FUNCTION, which gives the cases from a `Setting`. argument: what that is told beside.
        minutes: its time limit on a GPU. about: what it does, in a few words.
        leaves: a file that it makes for later pieces: where that is not, it is not done, whatever a bundle says.
    """

    name: str
    target: str
    minutes: float
    about: str
    argument: str = ""
    leaves: str = ""


@dataclass(frozen=True)
class Options:
    """How pieces are run: where the parts go, on what, and when to begin nothing more (seconds since 1970).

    Attributes:
        again: run what is done once more. retry: try what failed again.
    """

    out: Path
    device: str = "cpu"
    dry: bool = False
    again: bool = False
    retry: bool = True
    stop: float = float("inf")
    command: str = ""


def run_all(pieces: Sequence[Piece], options: Options, after: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Run the pieces that are not done, `after` after each; returns what became of each."""
    found = {}
    for piece in pieces:
        found[piece.name] = run_piece(piece, options)
        print(f"{piece.name:16} {found[piece.name]}", flush=True)
        after()
    return found


def run_piece(piece: Piece, options: Options) -> str:
    """Run a piece, or the cases of it that are not done; returns its status."""
    path = parts.path_of(options.out, piece.name)
    part = parts.read(path)
    gone = piece.leaves and not Path(piece.leaves).exists()
    here = origin(options.device, options.dry)
    if part is not None and deciding(part) != here:
        print(f"{piece.name}: begun anew, what there is was made by {deciding(part)}", flush=True)
        part = None
    if options.again or gone or part is None:
        part = {"cases": {}}
    elif part.get("status") == "done":
        return "done before"
    elif part.get("status", "").startswith("failed") and not options.retry:
        return "failed before"
    begun = time.time()
    if begun > options.stop:
        return "not begun: no time left"
    limit = min(begun + 60 * piece.minutes, options.stop)
    commits = list(dict.fromkeys([*part.get("commits", []), commit()]))  # a part is gone on with at any
    part |= here | {"piece": piece.name, "commits": commits, "command": options.command,
                    "date": time.strftime("%Y-%m-%d"), "status": "running"}  # fmt: skip
    parts.write(path, part)
    log = options.out / f"{piece.name}.log"
    log.unlink(missing_ok=True)
    while True:
        ended = _run_worker(piece, options, path, log, limit, begun)
        part = parts.read(path) or part
        running = [key for key, case in part["cases"].items() if case["state"] == "running"]
        for key in running:
            part["cases"][key] |= {"state": "failed", "reason": ended, "when": time.time()}
        if not running and ended != f"exit code {AGAIN}":
            break
        parts.write(path, part)
        if time.time() >= limit:  # a case that was broken off used what there was
            break
    part["status"] = _status(part, ended)
    part["seconds"] = round(part.get("seconds", 0) + time.time() - begun, 1)
    part["log"] = parts.tail(log)
    parts.write(path, part)
    return part["status"]


def _status(part: Part, ended: str) -> str:
    cases = part["cases"].values()
    failed = sum(case["state"] not in SETTLED for case in cases)
    if failed:
        return f"failed: {failed} of {len(cases)} cases"
    if not part.get("finished"):
        return f"stopped: {len(cases)} cases done ({ended})"
    if cases and all(case["state"] == "skipped" for case in cases):
        return "skipped: " + "; ".join(dict.fromkeys(case["reason"] for case in cases))
    return "done"


def _run_worker(piece: Piece, options: Options, path: Path, log: Path, limit: float, begun: float) -> str:
    """One process over the piece's open cases; how it ended, in words."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", "--target", piece.target, "--part", str(path),
               "--out", str(options.out), "--device", options.device, "--argument", piece.argument,
               "--stop", str(limit), "--begun", str(begun)]  # fmt: skip
    command += ["--dry"] if options.dry else []
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"+ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(limit - time.time(), 0) + GRACE)
        except subprocess.TimeoutExpired:
            _end(process)
            return "timeout"
        except BaseException:  # Ctrl-C: nothing is left behind
            _end(process)
            raise
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The worker, and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
