"""Rows of anything that holds some: a file, a folder, a data set of the hub or in memory, each with where it stands."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from importlib.resources import files
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_SHARD = re.compile(r"(?P<split>\w+?)(-\d+(-of-\d+)?)?")  # train, train-0, train-00000-of-00002
_SPLIT = re.compile(r"(?<![a-z])(?P<split>train|test|validation)(?![a-z])")  # a word of pairs_train, train-pairs

Row = dict[str, Any]


class DataError(ValueError):
    """A data set cannot be used as it is; the message names the file and the row."""


class UnavailableError(DataError):
    """A data set of the hub is out of reach now; the message says why."""

    exit_status = 1  # of a command: the name may be right, so it is no wrong usage


def rows_of(source: Any, split: str = "train", **hub: Any) -> Iterator[tuple[str, Row]]:
    """(where, row) of every row.

    Args:
        source: the path of a file with one of `SUFFIXES`, or of a folder of them or saved by `datasets`; the name of a
            data set for `datasets.load_dataset`; a Dataset, a DatasetDict, a pandas DataFrame, a dict of columns
            (lists, arrays, columns of a Dataset), or an iterable of rows.
        split: of a DatasetDict, a named data set, or a folder whose files are named by split (train.csv,
            data/train-00000-of-00001.parquet). Other sources have none.
        hub: further arguments of `load_dataset`: name (of a configuration), revision, ...

    Raises:
        DataError: it cannot be read, holds no rows, or has no such split.
    """
    if isinstance(source, (str, Path)):
        yield from _at(source, split, hub)
        return
    for number, row in enumerate(_in_memory(source, split), 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is a {type(row).__name__} ({row!r:.60}); each must be a mapping of columns")
        yield f"row {number}", dict(row)


def shipped_rows(file: str) -> list[Row]:
    """The rows of a .jsonl file beside this module."""
    return [json.loads(line) for line in files("lpa.data").joinpath(file).read_text(encoding="utf-8").splitlines()]


def looks_like_a_file(name: str | Path) -> bool:
    """Whether a name has the ending of a table."""
    return Path(name).suffix.lower() in SUFFIXES


def some_of(rows: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def is_text(value: str) -> bool:
    """Whether a string can be written down: JSON's \\ud800 alone is half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_cells(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    """Every cell must be text that says something. `row["row"]` says where a row stands.

    Raises:
        DataError: there are no rows, or cells are empty, not text, or hold half a character.
    """
    if not rows:
        raise DataError(f"{name} has no rows; give at least one with {', '.join(columns)}")
    cells = [(row, column) for row in rows for column in columns]
    if empty := [f"{row['row']} ({column})" for row, column in cells if row[column] is None or row[column] == ""]:
        raise DataError(f"{name}: empty cells in {some_of(empty)}; fill them in or drop the rows")
    for row, column in cells:
        if not isinstance(row[column], str):
            raise DataError(f"{row['row']}: {column} is {row[column]!r:.80} ({type(row[column]).__name__}), not text")
    if broken := [f"{row['row']} ({column})" for row, column in cells if not is_text(row[column])]:
        raise DataError(f"{name}: {some_of(broken)}: half a character (a lone surrogate) is no text; repair the cells")
    if blank := [f"{row['row']} ({column})" for row, column in cells if not row[column].strip()]:
        raise DataError(f"{name}: empty cells in {some_of(blank)}; fill them in or drop the rows")


# ---- in memory -----------------------------------------------------------------------------------------------------


def _in_memory(source: Any, split: str) -> Iterable[Any]:
    if hasattr(source, "iterrows"):  # pandas, whose empty cells are of several kinds
        return source.astype(object).where(source.notna(), None).to_dict("records")
    if isinstance(source, Mapping):
        if source and all(isinstance(values, (list, tuple)) for values in source.values()):
            return _by_column(source)
        if split not in source:
            if source and all(map(_is_column, source.values())):
                return _by_column({name: list(values) for name, values in source.items()})
            raise DataError(f"there is no split {split!r}; there are {', '.join(map(str, source)) or 'none'}")
        rows: Iterable[Any] = source[split]
        return rows
    if not isinstance(source, Iterable):
        raise DataError(f"a {type(source).__name__} holds no rows; give a data set, a path, or a list of rows")
    return source


def _is_column(values: Any) -> bool:
    """Whether values are a column (an array, a Series, a column of a Dataset), not a table of several."""
    table = isinstance(values, (str, bytes, Mapping)) or hasattr(values, "column_names") or hasattr(values, "iterrows")
    return isinstance(values, Sized) and not table


def _by_column(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"the columns are of different lengths: {sizes}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# ---- by path or name -----------------------------------------------------------------------------------------------


def _at(source: str | Path, split: str, hub: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    path = Path(source).expanduser()
    if path.is_dir():
        if {"state.json", "dataset_dict.json"} & {file.name for file in path.iterdir()}:  # of `save_to_disk`
            import datasets

            saved = datasets.load_from_disk(str(path))
            parts = saved if isinstance(saved, dict) else {split: saved}
            yield from _numbered(path.name, _in_memory(parts, split))
            return
        for file in _files(path, split):
            yield from _file(file)
    elif path.is_file() or looks_like_a_file(path):
        yield from _file(path)
    else:
        yield from _numbered(str(source), _named(str(source), split, hub))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Row]]:
    return ((f"{name} row {number}", dict(row)) for number, row in enumerate(rows, 1))


def _files(folder: Path, split: str) -> list[Path]:
    """The tables of a split, or all where their names speak of none."""
    found = [f for part in (folder, folder / "data") if part.is_dir() for f in part.iterdir() if looks_like_a_file(f)]
    if not found:
        raise DataError(f"the folder {folder} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    splits = {
        file: match["split"] for file in found if (match := _SPLIT.search(file.stem) or _SHARD.fullmatch(file.stem))
    }
    named = list(splits.values())
    if {"train", "test", "validation"} & set(named) or any("-of-" in file.stem for file in found):
        own = [file for file in found if splits.get(file) == split]
        if not own:
            raise DataError(
                f"the folder {folder} has no split {split!r}; its files are of {', '.join(sorted(set(named)))}"
            )
        found = own
    return sorted(found)


def _named(name: str, split: str, hub: Mapping[str, Any]) -> Iterable[Any]:
    import datasets

    try:
        found: Iterable[Any] = datasets.load_dataset(name, split=split, **hub)
    except Exception as error:  # the library and its hub raise many kinds; of a wrong split or configuration this one
        kind = DataError if isinstance(error, ValueError) else UnavailableError
        raise kind(
            f"{name!r} is no file or folder here, and datasets cannot load it (split {split!r}): {error}"
        ) from error
    return found


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}; save it as one of these")
    try:
        if suffix == ".parquet":
            yield from _numbered(path.name, _parquet(path))
            return
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if suffix == ".json":
                yield from _numbered(path.name, _json(stream.read(), path))
            else:
                found = _jsonl(stream, path) if suffix == ".jsonl" else _csv(stream, path, suffix)
                yield from _numbered(path.name, found)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: it is not UTF-8 ({error}); save it in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parquet(path: Path) -> list[Any]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return rows


def _csv(stream: Iterable[str], path: Path, suffix: str) -> Iterator[Row]:
    delimiter = "," if suffix == ".csv" else "\t"
    reader = csv.DictReader(stream, strict=True, delimiter=delimiter)
    for row in reader:
        if None in row:
            header = ", ".join(reader.fieldnames or ())
            what = "commas" if delimiter == "," else "tabs"
            raise DataError(
                f"{path.name} line {reader.line_num} has more cells than the header ({header}); "
                f"put cells that contain {what} in double quotes"
            )
        yield row


def _json(text: str, path: Path) -> Iterable[Any]:
    """A list of objects, an object of columns, or one that holds either under a single name; or lines of objects."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl(text.splitlines(), path)
        raise DataError(f"{path.name} is not JSON: {error}") from error
    if isinstance(found, dict) and len(found) == 1 and isinstance(only := next(iter(found.values())), (list, dict)):
        found = only if all(isinstance(row, (dict, list)) for row in only) and only else found
    if isinstance(found, dict) and found and all(isinstance(values, list) for values in found.values()):
        return _by_column(found)
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path.name} row {number} is a {type(row).__name__}; each must be a JSON object")
    return rows


def _jsonl(stream: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name} line {number} is a {type(row).__name__}; each line must be a JSON object")
        yield row


# ---- conversations -------------------------------------------------------------------------------------------------


def is_conversation(value: Any) -> bool:
    """Whether a cell is a list of messages."""
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def turns_of(messages: Any, where: str) -> list[tuple[str, Any]]:
    """(role, text) of each message; text in parts is joined.

    Raises:
        DataError: it is no list of messages.
    """
    try:
        return [(message["role"], _content(message["content"])) for message in messages]
    except (TypeError, KeyError):
        raise DataError(f"{where}: messages must be a list of objects with role and content") from None


def _content(value: Any) -> Any:
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    return value


def first_exchange(messages: Any, where: str) -> tuple[Any, Any, bool]:
    """(prompt, response, whether that was all there is) of messages.

    Raises:
        DataError: there is none.
    """
    turns = turns_of(messages, where)
    for (role, prompt), (next_role, response) in itertools.pairwise(turns):
        if (role, next_role) == ("user", "assistant"):
            return prompt, response, len(turns) == 2
    raise DataError(f"{where}: messages hold no user message that an assistant message follows")
