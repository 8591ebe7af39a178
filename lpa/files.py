"""Files that are there whole or not at all, after a kill or a power cut too, and what to say when a disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PART = ".part"  # ends the names of files that are being written
_NEARLY_FULL = 1 << 20  # bytes left on a disk: torch and safetensors do not always say why they failed


class WriteError(OSError):
    """Something could not be written; the message says what, why, and what to do."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and everything in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file. After a crash it has its old content or all of the new one."""
    draft = path.with_name(path.name + PART)
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any, *, nulls: bool = False) -> None:
    """Write a value as JSON to a file that is there whole or not at all.

    Args:
        nulls: numbers that are not finite, which JSON cannot hold, become null.

    Raises:
        ValueError: a number is not finite; the message says where it stands.
    """
    if nulls:
        value = _without_odd(value)
    elif odd := odd_number(value):
        raise ValueError(f"{path.name} cannot hold {odd[0]} = {odd[1]}: JSON has finite numbers alone")
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def odd_number(value: Any) -> tuple[str, float] | None:
    """(where it stands, the number) of the first number in a value that is not finite, which JSON cannot hold.

    >>> odd_number({"scores": [0.5, float("inf")]})
    ('scores.1', inf)
    """
    return next(_odd(value, ""), None)


def _odd(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place.lstrip(".") or "the value", value
    for key, part in _parts(value):
        yield from _odd(part, f"{place}.{key}")


def _without_odd(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_odd(part) for key, part in value.items()}
    return [_without_odd(part) for part in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder to write files into; when that has gone well, they are moved into `folder`, JSON last.

    A folder that has a model's or an adapter's configuration then has its weights too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".files{PART}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        sync_tree(part)
        files = [path for path in part.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def writing(what: str, folder: Path, lost: str = "") -> Iterator[None]:
    """Turn what fails in writing into a `WriteError`.

    Args:
        what: names the file in the message.
        lost: tells what earlier work is still there, and what to do next.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # torch, safetensors and tokenizers each raise kinds of their own
        reason = _reason(error, folder)
        if reason is None:
            raise
        raise WriteError(f"cannot write {what} in {folder}: {reason}{lost and '; '}{lost}") from error


def _reason(error: Exception, folder: Path) -> str | None:
    """Why writing failed, in plain words; None where the error is about something else."""
    number = getattr(error, "errno", None)
    if number is None and (written := re.search(r"\(os error (\d+)\)", str(error))):  # by Rust
        number = int(written[1])
    if number == errno.EFBIG or "File too large" in str(error):
        return "a file is larger than this process may write (ulimit -f)"
    try:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    except OSError:
        free = None
    full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    # an error that a mistake in the written value could also raise says little about the disk
    vague = isinstance(error, (OSError, RuntimeError)) or type(error) in (Exception, SafetensorError)
    if full or (vague and free is not None and free < _NEARLY_FULL):
        return "no space is left" + ("" if free is None else f" ({free / 1e6:.1f} MB free)")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"it cannot be written to ({error})"
    about_it = number is not None or isinstance(error, OSError)
    return f"{error}" if about_it or (isinstance(error, RuntimeError) and "write" in str(error).lower()) else None


def writable(folder: Path) -> bool:
    """Whether a folder is writable; for one that does not exist, whether its nearest existing parent is."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
