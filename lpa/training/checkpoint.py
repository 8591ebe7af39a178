"""Checkpoints on disk: each lists its files with their hashes and appears in one move, so that damage shows."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from ..files import PART, file_hash, sync, sync_tree, write_json
from ..run_folder import checkpoint_folders

logger = logging.getLogger(__name__)

MANIFEST = "files.json"
UNFINISHED = f".checkpoint{PART}"  # in a run's folder: checkpoints that are being written or deleted


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the file that is wrong."""


def publish(written: Path, target: Path) -> None:
    """Add the list of files to a checkpoint, sync it and give it its name. It replaces one of the same name."""
    files = [path for path in sorted(written.rglob("*")) if path.is_file()]
    listed = {p.relative_to(written).as_posix(): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    write_json(written / MANIFEST, listed)
    sync_tree(written)
    if target.exists():  # a torn one that was made again
        shutil.rmtree(target)
    written.rename(target)
    sync(target.parent)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, by the name of the file; "" if nothing is."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if file_hash(path) != expected["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"its list of files, {MANIFEST}, is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its list of files, {MANIFEST}, is torn"
    return ""


def last_good(run: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none. A warning names newer ones that are damaged."""
    for checkpoint in checkpoint_folders(run):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        logger.warning("%s is damaged and left out: %s", checkpoint, wrong)
    return None


def checked(checkpoint: Path) -> Path:
    """The checkpoint, which is whole.

    Raises:
        CheckpointError: it is not; the message names the file, and another checkpoint of its run that is good.
    """
    if wrong := damage(checkpoint):
        others = [other for other in checkpoint_folders(checkpoint.parent) if other.name != checkpoint.name]
        good = next((other for other in others if not damage(other)), None)
        hint = f"; the last good one is {good}" if good else "; there is no other good one"
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be used: {wrong}{hint}")
    return checkpoint


def remove_old(run: Path, keep: int | None, best: str | None = None) -> None:
    """Leave `keep` checkpoints, all where it is None or 0; the newest and the best always."""
    found = checkpoint_folders(run)
    spared = {path.name for path in found[:1]} | ({Path(best).name} if best else set())
    others = [path for path in found if path.name not in spared]
    for old in others[max(0, keep - (len(found) - len(others))) :] if keep else ():
        (run / UNFINISHED).mkdir(exist_ok=True)
        old.rename(run / UNFINISHED / f"old-{old.name}")  # none is there in part, even to a kill now
    remove_unfinished(run)


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints without a name: those being deleted, and those of a writer that was killed."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
