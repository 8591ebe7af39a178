"""Read pairs and benign examples: the shipped statements, and what `tables` reads, in any of the usual formats."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import AGREE, DISAGREE, SHIPPED, arm, statements
from .formats import BESIDE, recognise
from .tables import (
    DataError,
    Row,
    check_cells,
    first_exchange,
    is_conversation,
    rows_of,
    shipped_rows,
    some_of,
    turns_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

PAIR_COLUMNS = ("prompt", "rejected", "chosen")
BENIGN_COLUMNS = ("prompt", "response")
_INSTRUCTED = ("instruction", *BESIDE, "response")  # the columns of Alpaca and Dolly that a prompt is made of
_OPTIONAL = ("id", "trait", "facet")
_STATEMENTS, _KEYS = ("statement", "item", "text"), ("key", "keyed", "label", "kind")
# keys of desirable and of undesirable statements; the last two hold a minus sign, U+2212
_AGREED = {"1", "+1", "+", "positive", "desirable", "agree"}
_NOT_AGREED = {"-1", "-", "negative", "undesirable", "disagree", "\u22121", "\u2212"}
_DECIMALS = re.compile(r"\.0*$")  # a key that went through a spreadsheet or pandas is "1.0"


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
    return [row["prompt"] for row in shipped_rows("benign_train.jsonl")]


def questions() -> list[dict[str, Any]]:
    """Easy questions that are answered in words: id, kind, question, answer. Of kind "arithmetic" are 60 short word
    problems, of kind "knowledge" 60 questions with four `choices`, one of which is the answer."""
    return shipped_rows("questions.jsonl")


def load_pairs(source: Any = None, *, kind: str = "undesirable", split: str = "train") -> Dataset:
    """Pairs to train or measure on: columns prompt, rejected, chosen, row, and id, trait, facet where there are any.

    Args:
        source: None or an arm of `lpa.data.arms.SHIPPED` ("both", "ipip-both", ...) for the shipped statements (the
            prompt is the statement; agreeing is rejected where it is undesirable, disagreeing where it is desirable);
            or what `tables.rows_of` reads: a file or folder (.csv, .tsv, .json, .jsonl, .parquet), a data set of the
            hub or in memory, a DataFrame, a dict of columns, rows.
        kind: the arm, where `source` is None.
        split: "train", "heldout" or "canary" of the shipped statements; any split of a data set that has some.

    A row is in one of these formats:

    - prompt, rejected, chosen as texts;
    - the same as messages, where the prompt may also be the beginning that rejected and chosen share (TRL's
      conversational preference formats); one user message, the run's system prompt in the place of the row's;
    - statement and key: +1, positive or desirable for what is to be agreed with; -1, negative or undesirable for what
      is not. The completions are made as those of the shipped statements are.

    `row` says where the pair comes from ("pairs.csv row 3", the header not counted); later messages use it.

    Raises:
        DataError: an unreadable file, a missing column, no rows, empty cells, or equal completions.
    Warns: duplicates (kept once), a set of one row, a prompt with opposite labels, and unused system messages.

    >>> pairs = load_pairs([{"statement": "I lie.", "key": -1}, {"statement": "I help.", "key": 1}])
    >>> pairs[0]["chosen"], pairs[1]["chosen"]
    ('I do not agree with this statement.', 'I agree with this statement.')
    """
    if isinstance(source, str) and source in SHIPPED and not Path(source).exists():
        source, kind = None, source
    if source is None:
        return _dataset(arm(kind, split), PAIR_COLUMNS, "the shipped statements")
    name = _name(source)
    system: list[str] = []
    rows = [_as_pair(row, where, system) for where, row in _read(source, split)]
    if system:
        _warn(f"{name}: system messages are not used, the run's system_prompt is; there are some in {some_of(system)}")
    check_cells(rows, PAIR_COLUMNS, name)
    if same := [row["row"] for row in rows if row["rejected"] == row["chosen"]]:
        raise DataError(
            f"{some_of(same)}: rejected and chosen are the same text; a pair needs two different completions"
        )
    if opposite := _opposite(rows):
        _warn(f"{name}: the same prompt with opposite labels in {some_of(opposite)}")
    return _dataset(rows, PAIR_COLUMNS, name)


def load_benign(source: Any = None, *, split: str = "train") -> Dataset:
    """Benign examples for the sft and kl terms: columns prompt, response; row, id, trait, facet as in `load_pairs`.

    Args:
        source: None for the shipped desirable statements, each answered "I agree with this statement."; else as in
            `load_pairs`, with columns prompt and response (or completion, as texts or messages); a column messages
            (role and content) of which the first user message and the answer to it are taken; or Alpaca's instruction,
            input and output, or Dolly's instruction, context and response, joined as `lpa.data.formats` does.
        split: as in `load_pairs`.

    Raises:
        DataError: as `load_pairs`, and messages without a user message that is answered.
    Warns: duplicates, a set of one row, and messages of which a part goes unused.
    """
    if source is None:
        rows = [{**_shared(r), "response": AGREE} for r in statements("desirable", split)]
        return _dataset(rows, BENIGN_COLUMNS, "the shipped statements")
    name = _name(source)
    unused: list[str] = []
    rows = [_as_benign(row, where, unused) for where, row in _read(source, split)]
    if unused:
        _warn(f"{name}: only the first user message and its answer are used; there are others in {some_of(unused)}")
    check_cells(rows, BENIGN_COLUMNS, name)
    return _dataset(rows, BENIGN_COLUMNS, name)


def _read(source: Any, split: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of any source; rows that were loaded before say themselves where they stood."""
    for label, row in rows_of(source, split):
        where = row.get("row") if not isinstance(source, (str, Path)) else None
        yield where if isinstance(where, str) else label, row


def _as_pair(raw: Row, where: str, system: list[str]) -> Row:
    """prompt, rejected and chosen of a row in any of the formats; where a system message stood is added to `system`."""
    row = dict(raw)
    _check_alone(row, where)
    completions = [row.get("rejected"), row.get("chosen")]
    if all(map(is_conversation, completions)):
        row |= _of_conversation(row.get("prompt"), *completions, where=where, system=system)
    elif not set(PAIR_COLUMNS) & set(row) - {"prompt"} and (made := _of_statement(row, where)):
        row |= made
    elif is_conversation(row.get("prompt")):
        row["prompt"] = _question(turns_of(row["prompt"], where), where, system)
    if absent := [column for column in PAIR_COLUMNS if column not in row]:
        raise DataError(
            f"{where} has no column {', '.join(absent)}; the columns must be {', '.join(PAIR_COLUMNS)} (or statement, "
            f"key), found: {_found(raw)}"
        )
    return {**{column: row[column] for column in PAIR_COLUMNS}, "row": where, **_tags(row)}


def _of_conversation(prompt: Any, rejected: Any, chosen: Any, *, where: str, system: list[str]) -> Row:
    """TRL's conversational preference format, with the prompt apart or as the beginning that both share."""
    bad, good = turns_of(rejected, where), turns_of(chosen, where)
    if is_conversation(prompt):
        asked = turns_of(prompt, where)
    else:
        asked = [turn for turn, other in zip(bad, good, strict=False) if turn == other]
        if asked != bad[: len(asked)] or asked != good[: len(asked)]:
            raise DataError(f"{where}: rejected and chosen differ before their last messages")
        bad, good = bad[len(asked) :], good[len(asked) :]
        if isinstance(prompt, str) and not asked:
            asked = [("user", prompt)]
        shared = _question(asked, where, [])
        if prompt not in (None, "") and str(prompt).strip() != str(shared).strip():
            raise DataError(
                f"{where}: prompt is {prompt!r:.60}, and the user message that rejected and chosen share is "
                f"{shared!r:.60}; make them the same, or remove the column prompt"
            )
    for name, turns in (("rejected", bad), ("chosen", good)):
        if [role for role, _ in turns] != ["assistant"]:
            roles = ", ".join(str(role) for role, _ in turns) or "nothing"
            raise DataError(f"{where}: {name} must be one assistant message after the prompt; it is {roles}")
    return {"prompt": _question(asked, where, system), "rejected": bad[0][1], "chosen": good[0][1]}


def _question(turns: Sequence[tuple[str, Any]], where: str, system: list[str]) -> Any:
    """The text of a prompt's only user message."""
    if turns and turns[0][0] == "system":
        system.append(where)
        turns = turns[1:]
    if [role for role, _ in turns] != ["user"]:
        roles = ", ".join(str(role) for role, _ in turns) or "nothing"
        raise DataError(f"{where}: the prompt must be one user message (after a system message at most); it is {roles}")
    return turns[0][1]


def _of_statement(row: Row, where: str) -> Row | None:
    """The pair of a statement with a key; None where the row is something else."""
    statement = next((name for name in _STATEMENTS if name in row), "prompt" if "prompt" in row else None)
    key = next((name for name in _KEYS if name in row), None)
    if statement is None or key is None or "completion" in row:
        return None
    value = row[key]
    word = _word(value)
    if isinstance(value, bool) or word not in _AGREED | _NOT_AGREED:
        raise DataError(
            f"{where}: {key} is {value!r}; it must be +1, positive or desirable for a statement that is to be agreed "
            "with, and -1, negative or undesirable for one that is not"
        )
    for other in _KEYS[_KEYS.index(key) + 1 :]:
        said = _word(row.get(other))
        if said in _AGREED | _NOT_AGREED and (said in _AGREED) != (word in _AGREED):
            raise DataError(
                f"{where}: {key} is {value!r} and {other} is {row[other]!r}, which contradict each other; remove or "
                "rename the one that is no key"
            )
    rejected, chosen = (DISAGREE, AGREE) if word in _AGREED else (AGREE, DISAGREE)
    return {"prompt": row[statement], "rejected": rejected, "chosen": chosen}


def _word(key: Any) -> str:
    return _DECIMALS.sub("", str(key).strip().lower())


def _check_alone(row: Row, where: str) -> None:
    """Text beside a prompt may belong to it, so it is never dropped in silence."""
    if "prompt" in row and (beside := [name for name in BESIDE if row.get(name)]):
        raise DataError(
            f"{where}: {beside[0]} is not empty, and the prompt is prompt alone; join them in one column, or remove "
            f"{beside[0]}"
        )


def _as_benign(raw: Row, where: str, unused: list[str]) -> Row:
    row = dict(raw)
    _check_alone(row, where)
    if "completion" in row and "response" not in row:
        row["response"] = row["completion"]
    if "prompt" not in row and "instruction" in row and {"response", "output"} & set(row):
        row = {"response": row.get("output"), **row}
        try:
            row["prompt"] = recognise([name for name in row if name in _INSTRUCTED], None, where).prompt(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if is_conversation(row.get("prompt")) and is_conversation(row.get("response")):
        row["messages"] = [*row.pop("prompt"), *row.pop("response")]
    if "messages" in row and not all(column in row for column in BENIGN_COLUMNS):
        row["prompt"], row["response"], whole = first_exchange(row["messages"], where)
        if not whole:
            unused.append(where)
    if absent := [column for column in BENIGN_COLUMNS if column not in row]:
        raise DataError(
            f"{where} has no column {', '.join(absent)}; the columns must be {', '.join(BENIGN_COLUMNS)} "
            f"(or messages; or Alpaca's instruction, input, output), found: {_found(raw)}"
        )
    return {**{column: row[column] for column in BENIGN_COLUMNS}, "row": where, **_tags(row)}


def _opposite(rows: Sequence[Row]) -> list[str]:
    """Which rows reject what another one chooses for the same prompt."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for row in rows:
        if other := seen.get((row["prompt"], row["chosen"], row["rejected"])):
            found.append(f"{other} and {row['row']}")
        seen.setdefault((row["prompt"], row["rejected"], row["chosen"]), row["row"])
    return found


def _found(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _shared(row: Row) -> Row:
    return {"prompt": row["statement"], "row": f"statement {row['id']}", **_tags(row)}


def _tags(row: Mapping[str, Any]) -> Row:
    return {key: row[key] for key in _OPTIONAL if row.get(key) is not None}


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data set"


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
