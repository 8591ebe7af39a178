"""What a training run shows of itself: a bar with the remaining time, and a line for every LPA step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..config import BENIGN_TERMS, PAIR_TERMS
from .selection import entries_of


def step_line(logs: dict[str, float], lpa_steps: int) -> str:
    """One LPA step in a line."""
    parts = [f"LPA step {int(logs['lpa_step'])}/{lpa_steps}"]
    attack = [f"{name} {logs[f'attack_{name}_first']:.3f} -> {logs[f'attack_{name}_last']:.3f}" for name in PAIR_TERMS
              if f"attack_{name}_first" in logs]  # fmt: skip
    if attack:
        parts.append(f"attack {'  '.join(attack)}")
    losses = [f"{name} {logs[f'defence_{name}']:.3f}" for name in (*PAIR_TERMS, *BENIGN_TERMS)
              if f"defence_{name}" in logs]  # fmt: skip
    parts.append(f"defence {' '.join(losses)}")
    seconds = sum(logs[f"seconds_{phase}"] for phase in ("attack", "defence", "other"))
    parts.append(f"{seconds:.1f} s")
    return "  ".join(parts)


def canary_line(found: Mapping[str, float]) -> str:
    """One measurement of the canaries in a line."""
    shares = {"disagrees": "disagrees_undesirable", "agrees": "agrees_desirable", "benign done": "benign_done",
              "harmful done": "harmful_done"}  # fmt: skip
    numbers = [f"{label} {found[name]:.0%}" for label, name in shares.items() if name in found]
    numbers += [f"perplexity {found['perplexity']:.2f}", *(["COLLAPSED"] if found["collapsed"] else [])]
    return f"canaries at LPA step {int(found['lpa_step'])}  {'  '.join(numbers)}  {found['seconds']:.1f} s"


def eval_line(logs: Mapping[str, float], name: str) -> str:
    """One evaluated set in a line."""
    parts = [f"{name}  loss {logs[f'{name}_loss']:.3f}"]
    for key, label in (("", ""), ("_attacked", " attacked")):
        if f"{name}_preferred{key}" in logs:
            parts.append(f"{logs[f'{name}_preferred{key}']:.0%} preferred ({logs[f'{name}_margin{key}']:+.2f}){label}")
    return "  ".join([*parts, f"{logs[f'{name}_runtime']:.1f} s"])


class LPAProgress(TrainerCallback):
    """Counts LPA steps and the passes in them; on a terminal as a bar, elsewhere as lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.micro = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            speed_estimate_period=600,
        )  # fmt: skip
        step = args.gradient_accumulation_steps * (args.inner_steps + args.defence_steps)  # passes of an LPA step
        self.task = self.bar.add_task("", total=args.lpa_steps * step)
        done = state.global_step // args.defence_steps
        self.bar.update(self.task, completed=done * step)
        self.bar.start()
        self._describe(args, state)

    def _describe(self, args: Any, state: Any) -> None:
        if self.bar is None or self.task is None:
            return
        lpa_step, update = divmod(state.global_step, args.defence_steps)
        part = f"{self.micro + 1}/{args.gradient_accumulation_steps}"
        doing = f"attacking {part}" if update == 0 else f"update {update + 1}/{args.defence_steps}"
        self.bar.update(
            self.task, description=f"LPA step {min(lpa_step + 1, args.lpa_steps)}/{args.lpa_steps} {doing:14}"
        )

    def _advance(self, args: Any, update: int) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task, 1 if update else args.inner_steps + 1)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(args, state.global_step % args.defence_steps)
        self.micro += 1
        self._describe(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(args, (state.global_step - 1) % args.defence_steps)
        self.micro = 0
        self._describe(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs):
            return
        lines = [canary_line(found) for found in entries_of([logs])]
        if "lpa_step" in logs:
            lines.append(step_line(logs, args.lpa_steps))
        lines += [eval_line(logs, key.removesuffix("_preferred")) for key in logs if key.endswith("_preferred")]
        console = self.bar.console if self.bar is not None else self.console
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def show_lpa_steps(trainer: Any) -> None:
    """Put `LPAProgress` in the place of the callback by which `Trainer` shows itself, or nothing with disable_tqdm."""
    quiet, callbacks = trainer.args.disable_tqdm, trainer.callback_handler.callbacks
    shown = PrinterCallback if quiet else DEFAULT_PROGRESS_CALLBACK
    # the last of its kind is the one that `Trainer` has added; others are the user's
    added = next((each for each in reversed(callbacks) if type(each) is shown), None)
    if added is not None:
        callbacks.remove(added)
    if not quiet:
        trainer.add_callback(LPAProgress())
