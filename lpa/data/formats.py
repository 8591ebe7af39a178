"""The formats of prompt sets, recognised by their whole header: where a prompt stands, and what sorts its rows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import DataError, Row, is_conversation, turns_of

# columns of which one alone holds the prompts, where the format is none of those below
COLUMNS = ("prompt", "question", "instruction", "goal", "Goal", "Behavior", "behavior", "query", "text")
_TAGS = ("category", "tag")
# columns of text that a prompt may need, which no column alone gives
BESIDE = ("context", "input")
_LABELS = {"safe": False, "benign": False, "harmless": False, "unharmful": False, "unsafe": True, "harmful": True}
_LABEL_COLUMNS = ("label", "prompt_harm_label")  # the latter is WildGuard's
# columns of yes or no, alone or after "is_": whether a yes says harmful
_YES_MEANS = _LABELS | {"toxic": True, "toxicity": True}
_YES_OR_NO = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}
_ANSWERS = ("response", "answer", "completion", "output")


def sorts(column: str) -> bool:
    """Whether a column of this name tells which rows are harmful."""
    return column in _LABEL_COLUMNS or _yes_means(column) is not None


def _yes_means(column: str) -> bool | None:
    return _YES_MEANS.get(str(column).strip().lower().removeprefix("is_"))


def _labelled(row: Row) -> bool | None:
    """Whether its labels call a row harmful; None for a row without one.

    Raises:
        DataError: a label says neither, may be the answer's, or says what another one denies.
    """
    said = {name: _harm(name, row) for name in row if sorts(name) and row[name] not in (None, "")}
    if len(set(said.values())) > 1:
        labels = " and ".join(f"{name}={row[name]!r:.30}" for name in said)
        raise DataError(f"{labels} contradict each other on whether the prompt is harmful; correct the row")
    return next(iter(said.values()), None)


def _harm(column: str, row: Row) -> bool:
    """What the label in this column says."""
    yes, label = _yes_means(column), str(row[column]).strip().lower()
    known: Mapping[str, bool] = _LABELS if yes is None else _YES_OR_NO
    way_out = f"take the rows that you mean with --set-filter {column}=VALUE, or rename the column"
    if label not in known:
        raise DataError(
            f"{column}={row[column]!r:.30} is none of {', '.join(known)}, so it does not tell whether the prompt is "
            f"harmful; {way_out}"
        )
    if yes is None:
        return known[label]
    if beside := [name for name in _ANSWERS if row.get(name)]:
        raise DataError(f"{column} may be of the prompt or of the {beside[0]} beside it; {way_out}")
    return known[label] == yes


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        columns: a header that has all of these is of this format; where `alone`, one that has no others.
        prompt: the prompt of a row, not checked. tags: columns, the first of which that is there groups the prompts.
        left_out: why a row is not used; "" for those that are.
        is_harmful: whether a row says of itself that it is harmful; None where it says nothing.
        of_harm: rows of this format are harmful where neither they nor their name say otherwise.
    """

    name: str
    columns: frozenset[str]
    prompt: Callable[[Row], Any]
    tags: Sequence[str] = _TAGS
    left_out: Callable[[Row], str] = lambda row: ""
    is_harmful: Callable[[Row], bool | None] = _labelled
    alone: bool = False
    of_harm: bool = False

    def tag(self, row: Row) -> str:
        """What groups the prompt with others."""
        return next((str(row[name]) for name in self.tags if row.get(name)), "")


def recognise(header: Sequence[str], column: str | None, where: str) -> Format:
    """The format of a set with this header.

    Args:
        column: the one that holds the prompts, where it is given.

    Raises:
        DataError: there is no such column; or none, or several, that could hold prompts.
    """
    if column is not None:
        if column not in header:
            raise DataError(f"{where} has no column {column!r}; it has {_named(header)}")
        return Format(
            f"column {column}",
            frozenset({column}),
            lambda row: _asked(row[column]),
            is_harmful=lambda row: _labelled({name: value for name, value in row.items() if name != column}),
        )
    for known in FORMATS:
        if known.columns == set(header) or (known.columns <= set(header) and not known.alone):
            return known
    found = [name for name in COLUMNS if name in header]
    if len(found) == 1:
        return _by_column(found[0])
    if found:
        raise DataError(f"{where} has {_named(header)}: {' and '.join(found)} could hold the prompts; say --set-column")
    raise DataError(f"{where} has {_named(header)}; one of the columns {', '.join(COLUMNS)} is needed, or --set-column")


def _named(header: Sequence[str]) -> str:
    # a file without a header has a prompt where a name should be, which is not for results
    return ", ".join(map(str, header)) if all(len(str(name)) < 30 for name in header) else "no names of columns"


def _by_column(name: str) -> Format:
    """A column that nobody named. Text beside it may belong to the prompt, so it is an error."""

    def prompt(row: Row) -> Any:
        if beside := [other for other in BESIDE if row.get(other)]:
            raise DataError(
                f"{beside[0]} is not empty, and the prompt is {name} alone; join them in one column, or say "
                f"--set-column {name} to leave {beside[0]} out"
            )
        return _asked(row[name])

    return Format(f"column {name}", frozenset({name}), prompt)


def _asked(cell: Any) -> Any:
    """The only user message of a conversation; any other cell as it is."""
    if not is_conversation(cell):
        return cell
    asked = [text for role, text in turns_of(cell, "the prompt") if role == "user"]
    if len(asked) != 1:
        raise DataError(f"a conversation of {len(asked)} user messages, and a prompt is one")
    return asked[0]


def _in_context(request: str, context: str) -> Callable[[Row], Any]:
    """A request below the text that it is about, where there is one."""
    return lambda row: f"{row[context]}\n\n---\n\n{row[request]}" if row.get(context) and row[request] else row[request]


def _instruction(beside: str) -> Callable[[Row], Any]:
    """An instruction above the text that it is about, where there is one."""

    def prompt(row: Row) -> Any:
        if other := [name for name in BESIDE if name != beside and row.get(name)]:
            raise DataError(f"both {beside} and {other[0]} stand beside the instruction; join them in one column")
        return f"{row['instruction']}\n\n{row[beside]}" if row[beside] and row["instruction"] else row["instruction"]

    return prompt


def _only_turn(row: Row) -> Any:
    turns = row["turns"]
    if isinstance(turns, str) and turns.startswith("["):  # a list in a cell of a CSV file
        turns = ast.literal_eval(turns)
    if isinstance(turns, (list, tuple)) and len(turns) != 1:
        raise DataError(f"a conversation of {len(turns)} turns, and a prompt is one")
    return turns if isinstance(turns, str) else turns and turns[0]


def _xstest(row: Row) -> bool:
    """By the label, which early releases lack: there the type says which prompts are the unsafe contrasts."""
    label = _labelled(row)
    return str(row["type"]).startswith("contrast") if label is None else label


def _copyright(row: Row) -> str:
    # reciting a text is judged by comparison with it, not here
    return "copyright" if row.get("FunctionalCategory") == "copyright" else ""


_HARMBENCH = (_in_context("Behavior", "ContextString"), ("FunctionalCategory", "SemanticCategory"), _copyright)
FORMATS = (
    Format("HarmBench", frozenset({"Behavior", "ContextString"}), *_HARMBENCH, of_harm=True),
    Format("HarmBench", frozenset({"Behavior", "FunctionalCategory"}), *_HARMBENCH, of_harm=True),
    Format("HarmBench", frozenset({"prompt", "context", "category"}), _in_context("prompt", "context"), alone=True),
    Format("JailbreakBench", frozenset({"Goal", "Behavior"}), lambda row: row["Goal"], ("Category",)),
    Format("StrongREJECT", frozenset({"forbidden_prompt"}), lambda row: row["forbidden_prompt"], of_harm=True),
    Format("AdvBench", frozenset({"goal", "target"}), lambda row: row["goal"], of_harm=True),
    Format("XSTest", frozenset({"prompt", "type", "focus"}), lambda row: row["prompt"], ("type",), is_harmful=_xstest),
    Format("SORRY-Bench", frozenset({"turns", "category"}), _only_turn),
    Format(
        "Do-Not-Answer",
        frozenset({"question", "types_of_harm"}),
        lambda row: row["question"],
        ("types_of_harm",),
        of_harm=True,
    ),
    Format("Alpaca", frozenset({"instruction", "input"}), _instruction("input")),
    Format("Dolly", frozenset({"instruction", "context", "response"}), _instruction("context")),
    Format("messages", frozenset({"messages"}), lambda row: _asked(row["messages"])),
)
