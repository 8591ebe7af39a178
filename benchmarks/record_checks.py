"""What the checks of an attack cost in a run of `lpa train`: CPU seconds, those of the first attack and of later ones.

python -m benchmarks.record_checks                 # the default run, into benchmarks/results/checks.json
python -m benchmarks.record_checks --lpa_steps 2   # with options of lpa train
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lpa.cli import main as lpa
from lpa.files import write_json
from lpa_kernels.attack import engine, pgd
from lpa_kernels.model import modes

RESULTS = Path(__file__).parent / "results"
CHECKS = [
    (pgd.LatentPGD, "widths"),
    (pgd.LatentPGD, "_check_gradients"),
    (engine, "way_of"),
    (engine, "why_not_stacked"),
    (modes, "_few_logits"),
]


class Clock:
    """CPU seconds of functions, calls inside others of them not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = False

    def time(self, owner: Any, name: str) -> None:
        """Count the function's time from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return function(*args, **kwargs)
            self._within, begun = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._within = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun

        setattr(owner, name, timed)


def main(arguments: list[str]) -> int:
    clock, attacks = Clock(), []
    for owner, name in CHECKS:
        clock.time(owner, name)
    attack = pgd.LatentPGD.attack

    def measured(*args: Any, **kwargs: Any) -> Any:
        outside, clock.seconds = clock.seconds, {}
        begun = time.process_time()
        try:
            return attack(*args, **kwargs)
        finally:
            attacks.append({"attack": time.process_time() - begun} | clock.seconds)
            clock.seconds = outside

    pgd.LatentPGD.attack = measured  # type: ignore[method-assign]
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        code = lpa(["train", "--output", f"{folder}/run", *arguments])
    total = time.process_time() - begun
    parts = [*attacks, clock.seconds]
    checks = sum(seconds for part in parts for name, seconds in part.items() if name != "attack")
    record = {
        "command": " ".join(["python -m benchmarks.record_checks", *arguments]),
        "threads": torch.get_num_threads(),
        "cpu_seconds": total,
        "cpu_seconds_of_checks": checks,
        "share": checks / (total - checks),
        "attacks": attacks,
        "outside_of_attacks": clock.seconds,
    }
    write_json(RESULTS / "checks.json", record)
    print(f"checks {checks:.2f} of {total:.1f} CPU seconds: {record['share']:.1%} of the rest; {len(attacks)} attacks")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
