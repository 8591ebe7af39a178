"""Read pairs and benign examples from the shipped statements, CSV, JSONL, folders and the `datasets` library."""

from __future__ import annotations

import csv
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import AGREE, DataError, Row, arm, statements

if TYPE_CHECKING:
    from datasets import Dataset

PAIR_COLUMNS = ("prompt", "rejected", "chosen")
BENIGN_COLUMNS = ("prompt", "response")
_OPTIONAL = ("id", "trait", "facet")
_SUFFIXES = (".csv", ".jsonl")


def perplexity_text() -> str:
    """To measure perplexity on: about 800 words of plain English prose, written for this project."""
    return _prose("text.txt")


def canary_text() -> str:
    """The same for training, where it is watched: 300 other words."""
    return _prose("canary_text.txt")


def _prose(file: str) -> str:
    lines = files("lpa.data").joinpath(file).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).strip()


def benign_requests() -> list[str]:
    """Benign requests to train on, a third of them alarming in wording; none is among those that are measured."""
    lines = files("lpa.data").joinpath("benign_train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def load_pairs(source: Any = None, *, kind: str = "undesirable", split: str = "train") -> Dataset:
    """Pairs to train or measure on: columns prompt, rejected, chosen, row, and id, trait, facet where there are any.

    Args:
        source: None for the shipped statements (the prompt is the statement; agreeing is rejected where it is
            undesirable, disagreeing where it is desirable); the path of a .csv or .jsonl file, or of a folder of them;
            the name of a data set for `datasets.load_dataset`; or a Dataset or rows already in memory.
        kind: of the shipped statements, an arm of `lpa.data.arms.SHIPPED`: "undesirable", "both", "ipip-both", ...
        split: "train", "heldout" or "canary" of the shipped statements; any split of a named data set. Files have none.

    `row` says where the pair comes from ("pairs.csv row 3", the header not counted); later messages use it.

    Raises:
        DataError: an unreadable file, a missing column, no rows, empty cells, or equal completions.
    Warns: duplicates (kept once) and a set of one row.
    """
    if source is None:
        return _dataset(arm(kind, split), PAIR_COLUMNS, "the shipped statements")
    rows = list(_read(source, PAIR_COLUMNS, split))
    name = _name(source)
    _check_cells(rows, PAIR_COLUMNS, name)
    if same := [row["row"] for row in rows if row["rejected"] == row["chosen"]]:
        raise DataError(
            f"{some_of(same)}: rejected and chosen are the same text; a pair needs two different completions"
        )
    return _dataset(rows, PAIR_COLUMNS, name)


def load_benign(source: Any = None, *, split: str = "train") -> Dataset:
    """Benign examples for the sft and kl terms: columns prompt, response; row, id, trait, facet as in `load_pairs`.

    Args:
        source: None for the shipped desirable statements, each answered "I agree with this statement."; else as in
            `load_pairs`, with columns prompt and response, or a column messages (role and content) of which the first
            user message and the answer to it are taken.
        split: as in `load_pairs`.

    Raises:
        DataError: as `load_pairs`, and messages without a user message that is answered.
    Warns: duplicates, a set of one row, and messages of which a part goes unused.
    """
    if source is None:
        rows = [{**_shared(r), "response": AGREE} for r in statements("desirable", split)]
        return _dataset(rows, BENIGN_COLUMNS, "the shipped statements")
    name = _name(source)
    rows = list(_read(source, BENIGN_COLUMNS, split, messages=True))
    _check_cells(rows, BENIGN_COLUMNS, name)
    return _dataset(rows, BENIGN_COLUMNS, name)


def _shared(row: Row) -> Row:
    return {"prompt": row["statement"], "row": f"statement {row['id']}", **_tags(row)}


def _tags(row: Mapping[str, Any]) -> Row:
    return {key: row[key] for key in _OPTIONAL if row.get(key) is not None}


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data set"


def some_of(rows: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def _read(source: Any, columns: Sequence[str], split: str, messages: bool = False) -> Iterator[Row]:
    """The rows of any source with their wanted columns and where they stand."""
    unused: list[str] = []
    for label, raw in _parts(source, split):
        row = dict(raw)
        where = row.get("row") if not isinstance(source, (str, Path)) else None
        where = where if isinstance(where, str) else label
        if messages and "messages" in row and not all(column in row for column in columns):
            row["prompt"], row["response"], whole = _first_exchange(row["messages"], where)
            if not whole:
                unused.append(where)
        if absent := [column for column in columns if column not in row]:
            wanted = ", ".join(columns) + (" (or messages)" if messages else "")
            found = ", ".join(str(key) for key in raw) or "none"
            raise DataError(f"{where} has no column {', '.join(absent)}; the columns must be {wanted}, found: {found}")
        yield {**{column: row[column] for column in columns}, "row": where, **_tags(row)}
    if unused:
        message = "only the first user message and its answer are used"
        warnings.warn(f"{_name(source)}: {message}; there are others in {some_of(unused)}", stacklevel=4)


def _parts(source: Any, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every row."""
    if not isinstance(source, (str, Path)):
        for number, row in enumerate(source, 1):
            yield f"row {number}", row
        return
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not found:
            raise DataError(f"the folder {path} holds no .csv or .jsonl file")
        for file in found:
            yield from _file(file)
    elif path.is_file() or path.suffix.lower() in _SUFFIXES:
        yield from _file(path)
    else:
        for number, row in enumerate(_named(str(source), split), 1):
            yield f"{source} row {number}", row


def _named(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library and its hub raise many kinds
        raise DataError(
            f"{name!r} is no file or folder here, and datasets cannot load it (split {split!r}): {error}"
        ) from error


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path} is neither .csv nor .jsonl; save it as one of these")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            read = _csv if path.suffix.lower() == ".csv" else _jsonl
            for number, row in enumerate(read(stream, path), 1):
                yield f"{path.name} row {number}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _csv(stream: Iterable[str], path: Path) -> Iterator[Row]:
    reader = csv.DictReader(stream, strict=True)
    for row in reader:
        if None in row:
            header = ", ".join(reader.fieldnames or ())
            raise DataError(
                f"{path.name} line {reader.line_num} has more cells than the header ({header}); "
                "put cells that contain commas in double quotes"
            )
        yield row


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


def _first_exchange(messages: Any, where: str) -> tuple[Any, Any, bool]:
    """(prompt, response, whether that was all there is)."""
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError):
        raise DataError(f"{where}: messages must be a list of objects with role and content") from None
    for (role, prompt), (next_role, response) in itertools.pairwise(turns):
        if (role, next_role) == ("user", "assistant"):
            return prompt, response, len(turns) == 2
    raise DataError(f"{where}: messages hold no user message that an assistant message follows")


def _check_cells(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    if not rows:
        raise DataError(f"{name} has no rows; give at least one with {', '.join(columns)}")
    cells = [(row, column) for row in rows for column in columns]
    if empty := [f"{row['row']} ({column})" for row, column in cells if row[column] is None or row[column] == ""]:
        raise DataError(f"{name}: empty cells in {some_of(empty)}; fill them in or drop the rows")
    for row, column in cells:
        if not isinstance(row[column], str):
            raise DataError(f"{row['row']}: {column} is {row[column]!r} ({type(row[column]).__name__}), not text")
    if broken := [f"{row['row']} ({column})" for row, column in cells if not is_text(row[column])]:
        raise DataError(f"{name}: {some_of(broken)}: half a character (a lone surrogate) is no text; repair the cells")
    if blank := [f"{row['row']} ({column})" for row, column in cells if not row[column].strip()]:
        raise DataError(f"{name}: empty cells in {some_of(blank)}; fill them in or drop the rows")


def is_text(value: str) -> bool:
    """Whether a string can be written down: JSON's \\ud800 alone is half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dataset(rows: Sequence[Row], columns: Sequence[str], name: str) -> Dataset:
    from datasets import Dataset

    once: dict[tuple[str, ...], Row] = {}
    for row in rows:
        once.setdefault(tuple(row[column] for column in columns), row)
    kept = list(once.values())
    if dropped := len(rows) - len(kept):
        warnings.warn(f"{name}: {dropped} duplicate row{'s' * (dropped > 1)}; each is kept once", stacklevel=3)
    if len(kept) == 1:
        warnings.warn(f"{name} has a single row; a batch cannot mix different prompts", stacklevel=3)
    present = [key for key in (*columns, "row", *_OPTIONAL) if any(key in row for row in kept)]
    return Dataset.from_dict({key: [row.get(key) for row in kept] for key in present})
