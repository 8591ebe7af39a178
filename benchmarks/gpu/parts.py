"""What a piece has found, one JSON file each, written whole or not at all; and all of them in one bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Part = dict[str, Any]
TAIL = 3000  # characters of a log that are kept


def write(path: Path, values: Any) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def path_of(out: Path, piece: str) -> Path:
    """Where a piece's part is."""
    return out / f"{piece}.part.json"


def read(path: Path) -> Part | None:
    """A part; None where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "cases" in found else None


def tail(path: Path, characters: int = TAIL) -> str:
    """The end of a log."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - characters))
        return stream.read().decode("utf-8", "replace")


def collect(out: Path, pieces: Iterable[str]) -> dict[str, Part]:
    """The parts that there are, by piece, in the pieces' order."""
    found = {piece: read(path_of(out, piece)) for piece in pieces}
    return {piece: part for piece, part in found.items() if part is not None}


def bundle(out: Path, pieces: Iterable[str], target: Path) -> None:
    """All parts in one file, with the ends of their logs."""
    write(target, {"parts": collect(out, pieces)})


def unbundle(source: Path, out: Path) -> list[str]:
    """Put the parts of a bundle where this run's are, but for those that are there already. Returns their names.

    Raises:
        ValueError: the file is no bundle.
    """
    try:
        held = json.loads(source.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is no bundle of parts ({error}); give what --bundle has written") from error
    new = [piece for piece in held if read(path_of(out, piece)) is None]
    for piece in new:
        write(path_of(out, piece), held[piece])
    return new
