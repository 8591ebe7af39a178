"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`, and what several of them share.

`options` serves train and plan.
"""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of weights, for the option --dtype
DTYPES: tuple[str, ...] = get_args(Dtype)


def quiet_loading() -> None:
    """Turn off transformers' bars for loading weights; downloads keep theirs, where they have any."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    shown = not are_progress_bars_disabled()
    disable_progress_bar()  # of the hub too
    if shown:
        enable_progress_bars()


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line a phase and every 30 seconds."""

    def __init__(self, console: Any) -> None:
        self.status = console.status("loading") if console.is_terminal else None
        self.what, self.begun, self.first, self.printed = "", 0.0, 0, 0.0  # the phase, since when and from where

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now, new = time.monotonic(), what != self.what
        if new:
            self.what, self.begun, self.first = what, now, done
        line = f"{what} {done}/{total}{time_left(now - self.begun, done - self.first, total - done)}"
        if self.status is not None:
            self.status.update(line)
        elif new or now - self.printed > 30:
            print(line, flush=True)
            self.printed = now


def time_left(seconds: float, done: int, left: int) -> str:
    """ ", about ... left", by the pace of what was done in so many seconds; "" where nothing is known or left.

    >>> time_left(30.0, 10, 20)
    ', about 1:00 left'
    """
    if not done or not left:
        return ""
    minutes, rest = divmod(round(seconds / done * left), 60)
    return f", about {minutes}:{rest:02} left"
