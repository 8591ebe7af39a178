"""What a run survives, tried often: kills, signals, damage, disks, lack of memory, more ranks, hostile cells.

    python -m tests.soak.survive --out benchmarks/results/survive.json

A tiny random model is trained for a few seconds, disturbed at random moments and resumed. Its final weights must be
those of a run that nothing disturbed, bit for bit, and no more may be lost than the LPA step in flight. Where memory
ran out, sums are made in another order: within 1e-5. Each kind of try is written to the record when it is done; run
again after a break, those that are there are left out. Disks are tmpfs mounts, which need root. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings

from lpa.environment import versions
from lpa.files import write_json
from lpa.run_folder import checkpoint_folders
from lpa.training.checkpoint import MANIFEST, damage, last_good
from lpa.training.step import LPAStep
from tests.support import any_settings, jobs
from tests.support.hostile import cells, check_cells
from tests.support.jobs import difference
from tests.support.ranks import Ranks, run

STEPS = 10
RUN: dict[str, Any] = jobs.STATEFUL | {"lpa_steps": STEPS, "attack_steps": 4}
UPDATES = 2  # an LPA step, of `tiny_config`
# Where memory runs out: without what is random, which is that of the size at which it is drawn, and without Adam, of
# which rounding alone would decide where a gradient is all but zero.
SHORT: dict[str, Any] = {
    "lpa_steps": 2,
    "per_device_train_batch_size": 8,
    "micro_batches": 4,
    "attack_steps": 3,
    "kl_coef": 0.2,
    "sft_coef": 0.2,
    "optim": "sgd",
    "learning_rate": 0.1,
}


# ---- what the processes do ------------------------------------------------------------------------------------------


def watched(folder: Path, diary: Path, resume: bool) -> None:
    """Train to the end, or to a stop; the diary says what was being done, and for which LPA step."""
    trainer = jobs.trainer_of(folder, **RUN)
    signal.signal(signal.SIGTERM, lambda number, frame: trainer.request_stop())
    note = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(owner: Any, name: str, doing: str, step: int) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if trainer.is_world_process_zero():
                os.write(note, f"{doing} {trainer.lpa_step + step}\n".encode())
            return function(*args, **kwargs)

        setattr(owner, name, call)

    noted(LPAStep, "attack", "attack", 1)
    noted(LPAStep, "losses", "update", 1)
    noted(trainer, "_save_checkpoint", "write", 0)
    found = resume and last_good(folder)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    if not trainer.interrupted:
        jobs.keep(trainer, folder)


# ---- what is looked at ----------------------------------------------------------------------------------------------


def last_step(folder: Path) -> int:
    """LPA steps that the last good checkpoint holds."""
    found = last_good(folder)
    return int(found.name.rpartition("-")[2]) // UPDATES if found else 0


def doing(diary: Path) -> tuple[str, int]:
    lines = diary.read_text().splitlines() if diary.exists() else []
    what, _, step = (lines[-1] if lines else "start 0").partition(" ")
    return what, int(step)


@contextmanager
def disk(size: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder = Path(tempfile.mkdtemp(prefix="survive-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


class Trial:
    """Runs below one folder, each against the whole one."""

    def __init__(self, root: Path) -> None:
        self.root, self.draw, self.number = root, random.Random(), 0
        self.whole = {world: root / f"whole-{world}" for world in (1, 2)}
        self.seconds = {}  # from the first attack on
        for world, folder in self.whole.items():
            ranks = Ranks(watched, folder, root / f"diary-{world}", False, folder=folder, world=world)
            begun = self.begun(ranks, root / f"diary-{world}")
            assert ranks.finish() == [0] * world, ranks.text()
            self.seconds[world] = time.monotonic() - begun

    def begun(self, ranks: Ranks, diary: Path) -> float:
        """The time, once training has begun (or has failed to)."""
        while doing(diary)[0] == "start" and ranks.processes[0].exitcode is None:
            time.sleep(0.005)
        return time.monotonic()

    def new(self) -> tuple[Path, Path]:
        self.number += 1
        return self.root / f"run-{self.number}", self.root / f"diary-of-{self.number}"

    def start(self, folder: Path, diary: Path, world: int = 1) -> Ranks:
        diary.unlink(missing_ok=True)
        return Ranks(watched, folder, diary, True, folder=folder / "logs", world=world)

    def to_the_end(self, folder: Path, diary: Path, world: int = 1) -> float:
        """Resume, and how far the final weights are from the undisturbed run's."""
        run(watched, folder, diary, True, folder=folder / "logs", world=world)
        return difference(folder, self.whole[world])

    # ---- the disturbances -------------------------------------------------------------------------------------------

    def signals(self, number: signal.Signals, times: int, world: int = 1) -> dict[str, Any]:
        """Send a signal at random moments, to runs that are resumed each time until they end.

        Of a step whose attack was broken off, one step is lost; of one that was written, none.
        """
        where: Counter[str] = Counter()
        lost: Counter[int] = Counter()
        worst, done, ended = 0.0, 0, 0
        while done < times:
            folder, diary = self.new()
            while not (folder / "weights.pt").exists():
                before = last_step(folder)
                ranks = self.start(folder, diary, world)
                self.begun(ranks, diary)
                ranks.processes[-1].join(self.draw.uniform(0, self.seconds[world] * max(0.3, 1 - before / STEPS)))
                if done < times and ranks.processes[-1].exitcode is None:
                    os.kill(ranks.processes[-1].pid, number)  # the last rank's; the others learn of it
                    done += 1
                    ranks.finish()
                    what, step = doing(diary)
                    kept = last_step(folder)
                    assert kept >= before, f"{folder}: checkpoint of step {before} is lost"
                    damaged = [path for path in checkpoint_folders(folder) if damage(path)]
                    assert not damaged, damaged
                    lost[0 if what == "start" else step - kept] += 1
                    where[what] += 1
                else:
                    assert ranks.finish() == [0] * world, ranks.text()
            ended += 1
            worst = max(worst, difference(folder, self.whole[world]))
            shutil.rmtree(folder)
        assert max(lost) <= 1, lost
        assert worst == 0, worst
        return {"times": done, "runs": ended, "ranks": world, "while": dict(where), "difference": worst,
                "steps_lost": {str(steps): count for steps, count in sorted(lost.items())}}  # fmt: skip

    def damages(self, times: int) -> dict[str, Any]:
        """Damage the newest checkpoint of a whole run in some way, and train its last steps again."""
        kinds: Counter[str] = Counter()
        lost: Counter[int] = Counter()
        worst = 0.0
        for _ in range(times):
            folder, diary = self.new()
            shutil.copytree(self.whole[1], folder)
            (folder / "weights.pt").unlink()
            newest = checkpoint_folders(folder)[0]
            path = self.draw.choice([path for path in newest.rglob("*") if path.is_file()])
            content, kind = path.read_bytes(), self.draw.choice(["removed", "cut", "a bit", "zeros"])
            place = self.draw.randrange(len(content))
            if kind == "removed":
                path.unlink()
            elif kind == "cut":
                path.write_bytes(content[:place])
            elif kind == "zeros":
                path.write_bytes(content[:place] + bytes(len(content) - place))
            else:
                path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            if kind == "zeros" and not any(content[place:]):
                kind = "nothing, since it ended in zeros"
            else:
                found = damage(newest)  # a changed list names the file that it lists otherwise
                assert path.name in found or (found and path.name == MANIFEST), (kind, path)
            kinds[kind] += 1
            worst = max(worst, self.to_the_end(folder, diary))
            again = {int(line.split()[1]) for line in diary.read_text().splitlines() if line.startswith("attack")}
            lost[len(again)] += 1
            told = (folder / "logs" / "rank-0.log").read_text()
            assert kind.startswith("nothing") or f"{newest} is damaged and left out: " in told
            shutil.rmtree(folder)
        assert worst == 0, worst
        return {"times": times, "what": dict(kinds), "difference": worst,
                "steps_lost": {str(n): c for n, c in sorted(lost.items())}}  # fmt: skip

    def full_disks(self, times: int) -> dict[str, Any]:
        """Run out of disk at a random size, make room and go on."""
        lost: Counter[int] = Counter()
        worst = 0.0
        size = sum(path.stat().st_size for path in checkpoint_folders(self.whole[1])[0].rglob("*"))
        for _ in range(times):
            _, diary = self.new()
            with disk(f"{int(self.draw.uniform(0.1, 2.9) * size)}") as folder:
                ranks = Ranks(watched, folder / "run", diary, True, folder=self.root / "logs")
                assert ranks.finish() == [1], ranks.text()
                assert "lpa.files.WriteError: cannot write checkpoint-" in ranks.text(), ranks.text()
                assert "no space is left (" in ranks.text()
                self._unharmed(folder / "run", diary, lost)
                remount(folder, "size=64m")
                worst = max(worst, self.to_the_end(folder / "run", diary))
        assert worst == 0, worst
        return {"times": times, "difference": worst, "steps_lost": {str(n): c for n, c in sorted(lost.items())}}

    def read_only(self, times: int) -> dict[str, Any]:
        """Have the disk become read-only in mid-run, and go on when it no longer is."""
        lost: Counter[int] = Counter()
        worst = 0.0
        for _ in range(times):
            _, diary = self.new()
            with disk("64m") as folder:
                wanted = self.draw.randrange(1, STEPS - 1)
                ranks = Ranks(watched, folder / "run", diary, True, folder=self.root / "logs")
                while last_step(folder / "run") < wanted and ranks.processes[0].exitcode is None:
                    time.sleep(0.01)
                while subprocess.run(
                    ["mount", "-o", "remount,ro", folder], capture_output=True, check=False
                ).returncode:
                    time.sleep(0.001)  # busy while a file is open for writing
                assert ranks.finish() == [1], ranks.text()
                assert "it cannot be written to" in ranks.text(), ranks.text()
                self._unharmed(folder / "run", diary, lost)
                remount(folder, "rw")
                worst = max(worst, self.to_the_end(folder / "run", diary))
        assert worst == 0, worst
        return {"times": times, "difference": worst, "steps_lost": {str(n): c for n, c in sorted(lost.items())}}

    def short_of_memory(self, runs: int, world: int = 1) -> dict[str, Any]:
        """Have up to three random calls of attacks, forward and backward passes run out of memory, on any rank."""
        where: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        lost: Counter[int] = Counter()
        whole, _ = self.new()
        run(jobs.train, whole, SHORT, folder=whole)
        worst = 0.0
        calls = {"attack": 8 // world, "forward": 16 // world, "backward": 16 // world}  # of a rank, without faults
        for _ in range(runs):
            folder, _ = self.new()
            faults = set()
            for _ in range(self.draw.randint(1, 3)):
                kind = self.draw.choice(list(calls))
                faults.add((self.draw.randrange(world), kind, self.draw.randint(1, calls[kind])))
            each = [(rank, kind, {call}) for rank, kind, call in sorted(faults)]
            run(jobs.run_out, folder, SHORT, each, folder=folder, world=world)
            logs = "".join((folder / f"rank-{rank}.log").read_text() for rank in range(world))
            assert logs.count("out of memory in the ") == len(faults), (faults, logs)
            where.update(kind for _, kind, _ in faults)
            (size,) = {(folder / f"size-{rank}").read_text() for rank in range(world)}  # the ranks go together
            sizes[size] += 1
            worst = max(worst, difference(whole, folder))
            steps = [len(torch.load(path / "log.pt")) for path in (whole, folder)]
            lost[steps[0] - steps[1]] += len(faults)
            shutil.rmtree(folder)
        assert worst < 1e-5, worst
        return {"times": where.total(), "runs": runs, "ranks": world, "while": dict(where), "difference": worst,
                "pairs_at_once_of_8": dict(sorted(sizes.items())),
                "steps_lost": {str(n): c for n, c in sorted(lost.items())}}  # fmt: skip

    def hostile(self, times: int) -> dict[str, Any]:
        """Random mixtures of control tokens, template language, formulas, shell and control characters as cells."""
        tried = 0

        def check(**pair: str) -> None:
            nonlocal tried
            check_cells(**pair)
            tried += 1

        draws = settings(
            max_examples=times, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        draws(given(prompt=cells, rejected=cells, chosen=cells)(check))()
        return {"times": tried}

    def random_settings(self, times: int) -> dict[str, Any]:
        """Settings drawn at random: refused by name, or trained, by both engines to the same finite weights."""
        seen: Counter[str] = Counter()
        draws = settings(
            max_examples=times, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        folder, _ = self.new()
        draws(given(any_settings.choices())(lambda setting: any_settings.check(folder, setting, seen)))()
        return {"times": seen.total(), "what": dict(seen)}

    def _unharmed(self, folder: Path, diary: Path, lost: Counter[int]) -> None:
        assert not [path for path in checkpoint_folders(folder) if damage(path)]
        lost[doing(diary)[1] - last_step(folder)] += 1

    def more_ranks(self) -> dict[str, Any]:
        """Largest difference of any trained weight from one rank's, for DDP and FSDP2 on 2 and 4 ranks, over gloo."""
        settings: dict[str, Any] = RUN | {"micro_batches": 4, "lpa_steps": 3}
        found: dict[str, Any] = {}
        kinds: dict[str, dict[str, Any]] = {
            "LoRA": {"reset_optimizer": True}, "every weight": {"lora": False, "kl_coef": 0.0, "lora_dropout": 0.0}
        }  # fmt: skip
        for name, more in kinds.items():
            one, _ = self.new()
            run(jobs.train, one, settings | more, folder=one)
            for world in (2, 4):
                for fsdp in (False, True):
                    folder, _ = self.new()
                    run(jobs.train, folder, settings | more | {"fsdp": fsdp}, folder=folder, world=world)
                    found[f"{name}, {'FSDP2' if fsdp else 'DDP'}, {world} ranks"] = difference(one, folder)
        return found


def as_table(record: dict[str, Any]) -> str:
    """The tries of a record that may lose something, in Markdown."""
    lines = ["| what | times | while, or how | only the step in flight lost | nothing lost | more lost | final weights "
             "differ by |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in record.items():
        if isinstance(found, dict) and "steps_lost" in found:
            lost = Counter({int(steps): count for steps, count in found["steps_lost"].items()})
            how = ", ".join(
                f"{kind} {count}" for kind, count in sorted((found.get("while") or found.get("what", {})).items())
            )
            lines.append(f"| {name} | {found['times']} | {how or '-'} | {lost[1]} | {lost[0]} | "
                         f"{lost.total() - lost[0] - lost[1]} | {found['difference']:.2g} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="on one rank; the other counts follow from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names in the report, of the tries to make; by default all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a record, and try nothing")
    options = parser.parse_args()
    if options.table or not options.out:
        if not options.table:
            parser.error("give --out or --table")
        print(as_table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    few = max(1, options.kills // 5)
    about = {"command": shlex.join(["python", "-m", "tests.soak.survive", *sys.argv[1:]]), "versions": versions(),
             "machine": platform.machine(), "lpa_steps": STEPS}  # fmt: skip
    report = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else about
    if other := [name for name in about if report.get(name) != about[name]]:
        raise SystemExit(
            f"{options.out} is the record of another run: its {other[0]} differs; remove it or choose another"
        )
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        for name, find in {
            "SIGKILL": lambda: trial.signals(signal.SIGKILL, options.kills),
            "SIGKILL of one of two ranks": lambda: trial.signals(signal.SIGKILL, few, world=2),
            "SIGTERM": lambda: trial.signals(signal.SIGTERM, few),
            "SIGTERM to one of two ranks": lambda: trial.signals(signal.SIGTERM, few, world=2),
            "the newest checkpoint damaged": lambda: trial.damages(2 * few),
            "disk full": lambda: trial.full_disks(few),
            "disk read-only": lambda: trial.read_only(few),
            "memory runs out": lambda: trial.short_of_memory(3 * few),
            "memory runs out on one of two ranks": lambda: trial.short_of_memory(2 * few, world=2),
            "ranks": trial.more_ranks,
            "hostile cells": lambda: trial.hostile(100 * few),
            "random settings": lambda: trial.random_settings(10 * few),
        }.items():
            if name in report or (options.only and name not in options.only):
                continue
            begun, trial.draw = time.monotonic(), random.Random(f"{options.seed} {name}")
            report[name] = find()
            report[name]["seconds"] = round(time.monotonic() - begun)
            print(name, json.dumps(report[name]), flush=True)
            write_json(options.out, report)


if __name__ == "__main__":
    main()
