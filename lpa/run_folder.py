"""The folder of a run: the names of its files, when it may be written to, and what it keeps for a run that goes on."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import PART, writable, write_json, write_text, writing

# a training run's
SETTINGS = "settings.yaml"  # what it was asked for
BEFORE = "before.json"  # what was measured before training, so that a resumed run need not do it again
METRICS = "metrics.json"  # its record
CARD = "README.md"
ADAPTER, MODEL = "adapter_config.json", "config.json"  # beside the weights: one of them
STATE = "trainer_state.json"  # in a checkpoint
BOUND = "settings.json"  # in a checkpoint: what a resumed run must share
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # a checkpoint's folder, by its number of model updates
# an evaluation's
RUN, RESULTS, TABLE = "run.json", "results.json", "table.md"
RECORDS, TEXTS = "records.jsonl", "texts.local.jsonl"  # one line a prompt; what stays out of commits
LOCK = ".lock"  # held by the process that writes to the folder
# What a run may have written: adapter, or model and tokenizer; record; checkpoints. The settings go last, because a
# folder with them counts as a run.
_WRITTEN = (ADAPTER, "adapter_model*.safetensors*", MODEL, "generation_config.json",
            "model*.safetensors*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
            "merges.txt", "chat_template.jinja", f"{CARD}*", f"{METRICS}*", "checkpoint-[0-9]*", f".*{PART}",
            f"{BEFORE}*", f"{SETTINGS}{PART}", SETTINGS)  # fmt: skip


def output_folder(chosen: str | None, model: str) -> Path:
    """The folder that was asked for, or runs/MODEL-DATE-TIME."""
    if chosen:
        return Path(chosen).expanduser()
    name = re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output(output: Path, model: str, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that is in use: a run in it needs `resume` or `overwrite`.

    Raises:
        ValueError: the output is a file, or a folder that holds something or cannot be written to.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; give a folder")
    if not writable(output):
        raise ValueError(f"the output folder {output} cannot be written to; use another --output")
    # a run that was killed while it wrote its settings leaves that file alone
    ours = {SETTINGS + PART, LOCK}
    held = [path for path in output.iterdir() if path.name not in ours] if output.is_dir() else []
    if resume or not held:
        return
    if not overwrite:
        raise ValueError(
            f"the output folder {output} is not empty; use --resume to go on with its run, --overwrite to replace "
            "it, or another --output"
        )
    if not (output / SETTINGS).is_file():
        raise ValueError(
            f"--overwrite: {output} holds no run (there is no {SETTINGS}) but other files; use another folder"
        )
    source = Path(model).resolve()
    if output.resolve() in (source, *source.parents):
        raise ValueError(f"--overwrite: the model {model} is in the output folder {output}; use another folder")


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Within it the folder is this process's alone, or until the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"the output folder {output} is in use: another process writes to it; wait for it, or use another --output"
        ) from error
    except (NotImplementedError, OSError):  # a file system without locks, as some networks have
        pass
    try:
        yield
    finally:
        lock.release()


def check_unused(output: Path) -> None:
    """Refuse a folder that holds an earlier run's model, record or checkpoints.

    Raises:
        ValueError: there are some; the message names one.
    """
    if left := _left(output):
        raise ValueError(
            f"output_dir={str(output)!r} holds an earlier run ({left[0].name}); give another one, remove that, or go "
            "on with it (resume_from_checkpoint=True)"
        )


def check_resumable(output: Path) -> None:
    """Refuse to go on, without a good checkpoint, with a run that has written its model or checkpoints.

    Raises:
        ValueError: it has; the message names one.
    """
    if left := _left(output):
        raise ValueError(
            f"--resume: {output} has no good checkpoint to go on from, and it holds what a run has made "
            f"({left[0].name}); use --overwrite to begin anew, or another --output"
        )


def _left(output: Path) -> list[Path]:
    """What of a run is in a folder: its checkpoints, its model, its record."""
    found = [path for name in (ADAPTER, METRICS, MODEL) if (path := output / name).is_file()]
    return [*checkpoint_folders(output), *found]


def clear(output: Path) -> None:
    """Remove an earlier run's files, and no others."""
    if (output / SETTINGS).is_file():
        for path in [path for pattern in _WRITTEN for path in output.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_settings(output: Path, settings: dict[str, Any], commands: list[str]) -> None:
    """settings.yaml: the settings in force, for `--resume` and `--config`, below the commands that were given."""
    import yaml

    text = "".join(f"# {json.dumps(command)}\n" for command in commands)
    text += yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)
    with writing(SETTINGS, output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / SETTINGS, text)


def given_commands(record: Path) -> list[str]:
    """The commands of a run, the one that began it first: in its settings' first lines, as comments."""
    lines = record.read_text(encoding="utf-8").splitlines()
    return [json.loads(line[2:]) for line in lines if line.startswith('# "')]


def keep_before(output: Path, found: dict[str, float], measure_attacked: int) -> None:
    """Write before.json: the table's first column, and how many statements of each kind were attacked for it."""
    with writing(BEFORE, output):
        write_json(output / BEFORE, {"measure_attacked": measure_attacked, "found": found})


def kept_before(output: Path, measure_attacked: int) -> dict[str, float] | None:
    """What a run measured before its training; None where it measured nothing, or another number of statements."""
    file = output / BEFORE
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values["found"] if values.get("measure_attacked") == measure_attacked else None


def checkpoint_folder(run: Path, updates: int) -> Path:
    """The folder of the checkpoint after this many model updates."""
    return run / f"checkpoint-{updates}"


def checkpoint_folders(run: Path) -> list[Path]:
    """A run's checkpoints, the latest first."""
    found = {path: updates for path in run.glob("checkpoint-*") if (updates := updates_of(path)) is not None}
    return sorted(filter(Path.is_dir, found), key=found.__getitem__, reverse=True)


def updates_of(checkpoint: Path) -> int | None:
    """The model updates of a checkpoint, by its folder's name; None where that is no checkpoint's.

    >>> updates_of(Path("runs/lpa/checkpoint-120"))
    120
    """
    named = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(named[1]) if named else None
