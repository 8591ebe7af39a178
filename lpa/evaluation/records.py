"""What was measured, one JSON line a prompt, so that a stopped run can continue."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import odd_number
from ..run_folder import RECORDS, TEXTS

_KEY = ("subject", "suite", "set", "id", "mode")

Record = dict[str, Any]
Key = tuple[str, ...]


def key_of(record: Record) -> Key:
    """What tells a record from all others: subject, suite, set, id and mode."""
    return tuple(str(record.get(name, "")) for name in _KEY)


class Records:
    """The records of one run, in memory and, with a folder, on disk.

    `records.jsonl` holds ids, hashes, judgements and scores, and the answers to prompts that are not harmful. What
    was answered to harmful prompts goes to `texts.local.jsonl` (with the prompts if `keep_texts`), which the folder's
    .gitignore keeps out of commits.

    Args:
        read_only: the files stay as they are; another process may be writing to them.
    """

    def __init__(self, folder: Path | None = None, keep_texts: bool = False, read_only: bool = False) -> None:
        self.folder, self.keep_texts = None if read_only else folder, keep_texts
        self._records: dict[Key, Record] = {}
        if folder is None:
            return
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*.local.jsonl\n", encoding="utf-8")
        for record in _read_lines(folder / RECORDS, mend=not read_only):
            self._records[key_of(record)] = record
        for text in _read_lines(folder / TEXTS, mend=not read_only):
            if (key := key_of(text)) in self._records:
                self._records[key].update({k: text[k] for k in ("answer", "prompt") if k in text})

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: Key) -> Record | None:
        """The record with that key, with its answer where it is known here."""
        return self._records.get(key)

    def select(self, **values: str) -> list[Record]:
        """The records with these values (subject=..., suite=..., set=..., mode=...), in the order of writing."""
        return [r for r in self._records.values() if all(r.get(name, "") == value for name, value in values.items())]

    def add(self, record: Record, harmful: bool = False) -> None:
        """Keep a record and write it out at once. With `harmful`, prompt and answer go to the local file alone.

        Raises:
            FloatingPointError: a score is NaN, which would count as an answer, or infinite.
        """
        key = key_of(record)
        if odd := odd_number(record):
            raise FloatingPointError(
                f"{', '.join(filter(None, key))}: {odd[0]} is {odd[1]}; look for NaN in the model's weights, or load "
                "it in bfloat16 or float32"
            )
        self._records[key] = record
        if self.folder is None:
            return
        texts = {name: record[name] for name in ("answer", "prompt") if name in record}
        shared = {name: value for name, value in record.items() if name != "prompt"}
        if harmful:
            shared.pop("answer", None)
            if not self.keep_texts:
                texts.pop("prompt", None)
            if texts:
                _append(self.folder / TEXTS, {name: record.get(name, "") for name in _KEY} | texts)
        _append(self.folder / RECORDS, shared)


def _append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _read_lines(path: Path, *, mend: bool) -> Iterator[Record]:
    """The records of a file. A last line that a kill cut off is left out, and with `mend` removed."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) and mend:
        warnings.warn(f"{path.name} ends in a line that was cut off; it is dropped and measured again", stacklevel=3)
        os.truncate(path, len(whole))  # written anew, all of it would be lost to a kill
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); remove the line or the file") from error
