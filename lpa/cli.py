"""The command `lpa`: finds the subcommand and turns errors that a user can do something about into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .messages import nearest

# name -> what it does. Each is a module of lpa.commands with `run(arguments) -> exit status`, imported when asked for:
# torch and transformers take seconds, and help must not.
COMMANDS = {
    "train": "train a model by LPA and measure it before and after",
    "plan": "tell the memory and work that a training run will need, before anything is loaded",
    "evaluate": "compare adapters with their base model: traits, harm, over-refusal, utility, collapse",
    "report": "make one HTML page of runs and evaluations",
    "chat": "show the base model's and the hardened answer side by side",
    "export": "merge an adapter into a plain model folder, and check that it answers alike",
    "traits": "list the shipped statements, or show their tokens (--preview)",
    "assets": "list, fetch or verify the embedded model and data sets",
}
TRACEBACK_VARIABLE = "LPA_TRACEBACK"


def usage() -> str:
    """What `lpa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lpa COMMAND [OPTIONS]",
            "",
            "Latent Personality Alignment: train chat models that keep their character under attack.",
            "",
            *lines,
            "",
            "lpa COMMAND --help tells the options of a command.",
        ]
    )


def _dashed(word: str) -> str:
    """An option with dashes. `lpa train` writes its options with underscores, the other commands with dashes."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n.

    Wrong usage is what a ValueError tells of: settings, names and data that the user gave.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("lpa-kernels"))
        return 0
    if given[0] not in COMMANDS:
        print(f"lpa: unknown command {given[0]!r}{nearest(given[0], COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    command = import_module(f"lpa.commands.{given[0]}")
    try:
        status: int = command.run(given[1:] if given[0] in ("train", "plan") else [_dashed(word) for word in given[1:]])
        return status
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        known = isinstance(error, (ValueError, RuntimeError, OSError, ArithmeticError, ImportError))
        text = str(error) if known else f"{type(error).__name__}: {error} (this may be a bug of lpa)"
        print(f"error: {text}\n({TRACEBACK_VARIABLE}=1 shows where)", file=sys.stderr)
        status = getattr(error, "exit_status", 2 if isinstance(error, ValueError) else 1)
        return int(status)
