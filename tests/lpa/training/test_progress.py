"""The progress bar: what it counts, the time it says is left, and the line of an LPA step."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lpa.training.progress import LPAProgress, step_line
from tests.support.tiny import tiny_config

LOGS = {"lpa_step": 2, "attack_toward_first": 3.0, "attack_toward_last": 1.5, "attack_away_first": 0.5,
        "attack_away_last": 0.25, "defence_toward": 1.0, "defence_away": 0.125, "defence_kl": 0.01,
        "seconds_attack": 2.0, "seconds_defence": 1.0, "seconds_other": 0.5}  # fmt: skip


class Clock:
    """A clock that only passes stop at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def started(args: Any, updates_done: int = 0) -> tuple[LPAProgress, Any, Clock]:
    progress = LPAProgress(Console(file=io.StringIO(), force_terminal=True, width=120))
    state = SimpleNamespace(global_step=updates_done, is_world_process_zero=True)
    progress.on_train_begin(args, state, None)
    clock = Clock()
    assert progress.bar is not None
    progress.bar.get_time = clock  # type: ignore[method-assign]
    progress.bar.tasks[0].__dict__["_get_time"] = clock
    progress.bar.tasks[0].start_time = 0.0
    return progress, state, clock


def run_pass(progress: LPAProgress, args: Any, state: Any, clock: Clock) -> None:
    """One micro-batch of one update; a second a pass, and an attack takes `steps` of them."""
    clock.now += 1 + (args.attack_steps if state.global_step % args.defence_steps == 0 else 0)
    if progress.micro < args.gradient_accumulation_steps - 1:
        progress.on_substep_end(args, state, None)
    else:
        state.global_step += 1
        progress.on_step_end(args, state, None)


def test_the_remaining_time_counts_inner_steps(tmp_path: Path) -> None:
    args = tiny_config(tmp_path, lpa_steps=5, attack_steps=3, defence_steps=2, gradient_accumulation_steps=2)
    progress, state, clock = started(args)
    assert progress.bar is not None
    task = progress.bar.tasks[0]
    total = 5 * 2 * (4 + 1)
    assert task.total == total
    for _ in range(6):  # a whole LPA step of four passes, and the attacks of the next
        run_pass(progress, args, state, clock)
    assert task.completed == clock.now == 18
    assert task.time_remaining == pytest.approx(total - 18, abs=1)
    assert "LPA step 2/5 update 2/2" in task.description
    progress.on_log(args, state, None, logs=LOGS)
    progress.on_train_end(args, state, None)
    assert progress.bar is None
    assert "LPA step 2/5" in progress.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_resumed_run_begins_where_it_was(tmp_path: Path) -> None:
    args = tiny_config(tmp_path, lpa_steps=5, attack_steps=3, defence_steps=2, gradient_accumulation_steps=2)
    progress, state, _ = started(args, updates_done=4)
    assert progress.bar is not None
    assert progress.bar.tasks[0].completed == 20
    progress.on_train_end(args, state, None)


def test_no_bar_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = LPAProgress(Console(file=stream))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    progress.on_train_begin(tiny_config(tmp_path), state, None)
    assert progress.bar is None
    progress.on_log(tiny_config(tmp_path), state, None, logs=LOGS)
    assert stream.getvalue().startswith("LPA step 2/2")


def test_the_line_of_an_lpa_step() -> None:
    assert step_line(LOGS, 5) == (
        "LPA step 2/5  attack toward 3.000 -> 1.500  away 0.500 -> 0.250  "
        "defence toward 1.000 away 0.125 kl 0.010  3.5 s"
    )
    logs = {"lpa_step": 1, "attack_dpo_first": 1.0, "attack_dpo_last": 0.5, "defence_dpo": 0.7, "seconds_attack": 1.0,
            "seconds_defence": 1.0, "seconds_other": 0.0}  # fmt: skip
    assert step_line(logs, 5) == "LPA step 1/5  attack dpo 1.000 -> 0.500  defence dpo 0.700  2.0 s"
