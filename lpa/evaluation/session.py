"""`evaluate`: measure a base model and adapters side by side, prompt by prompt; a stopped run continues."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data import ChatEncoder, rendering
from ..environment import versions
from ..files import write_json, write_text
from ..models import DEFAULT_MODEL, check_sites, load, outline
from ..run_folder import RESULTS, RUN, TABLE
from .bench import Bench, quiet_generation
from .judges import judge_answers, judge_of
from .records import Records
from .sets import BENIGN, HARM_SETS, PromptSet, load_set, set_name
from .subjects import BASE, EvaluationError, Subjects, check_adapters, named_adapters
from .suites import SUITES, Row, Run, Settings
from .table import as_markdown, as_table
from .verdict import verdict_rows
from .vllm import VLLM, check_installed

logger = logging.getLogger(__name__)

# Settings that only add records: a stopped run may continue with other values of these.
_FREE = ("sets", "benign_sets", "set_column", "set_filter", "set_split", "set_config", "attacks", "epsilons", "steps",
         "utility_sets", "tasks", "ladder", "judge", "judge_prompt")  # fmt: skip


@dataclass
class Evaluation:
    """The result.

    Attributes:
        rows: of the table. subjects: in order, the base model first. records: of every prompt.
        info: what run.json holds: settings, data, subjects, versions, command.
        folder: where it was written, or None.
    """

    rows: list[Row]
    subjects: list[str]
    records: Records
    info: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def table(self, full: bool = False) -> Any:
        """A rich table, for `rich.print`."""
        return as_table(self.rows, self.subjects, full)

    def markdown(self, full: bool = False) -> str:
        """The table in Markdown."""
        return as_markdown(self.rows, self.subjects, full)

    def value(self, subject: str, suite: str, metric: str, where: str | None = None) -> float | None:
        """One number of the table.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if (row.subject, row.suite, row.metric) == (subject, suite, metric) and where in (None, row.set):
                return row.value
        raise KeyError(f"no row {subject!r}, {suite!r}, {metric!r}, {where!r}")

    def verdict(self, subject: str) -> str:
        """What the numbers amount to."""
        return next(row.metric for row in self.rows if row.suite == "verdict" and row.subject == subject)


def evaluate(
    model: Any = DEFAULT_MODEL,
    adapters: Mapping[str, str | Path] | Sequence[str | Path] = (),
    *,
    tokenizer: Any = None,
    suites: Sequence[str] | None = None,
    output: str | Path | None = None,
    settings: Settings | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    keep_texts: bool = False,
    command: str | None = None,
    tick: Callable[[str, int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a base model and adapters side by side.

    Args:
        model: what `lpa.models.load` takes, or a model (then with its `tokenizer`), which is unchanged afterwards.
        adapters: folders of PEFT adapters, by name or "NAME=PATH".
        suites: of `SUITES`; by default all but "ladder".
        output: the folder for records and results. A stopped run of the same settings in it is continued. None
            keeps everything in memory.
        settings: or, as further keyword arguments, the fields of `Settings`.
        device: by default the first GPU, else the CPU.
        keep_texts: write the harmful prompts beside the answers to them, in the file that is kept out of commits.
        command: recorded as what made this.
        tick: called with (what, done, total) as prompts are done.
        tell: called with a line for each set that is a file or on the hub: how it was read, and its first prompt.

    Raises:
        EvaluationError: no suite or an unknown one, an adapter that does not fit, a set that is misnamed or malformed,
            a judge or generator that is not installed or cannot be loaded, or a folder that holds another evaluation.
        lpa.models.ModelError, lpa.assets.AssetError: no model.
    """
    # a limit on the harmful sets alone holds for the benign one too
    wanted = settings or Settings(**({"benign_limit": options["limit"]} if "limit" in options else {}) | options)
    if settings is not None and options:
        raise EvaluationError(f"give settings or {', '.join(options)}, not both")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size} must be at least 1")
    chosen = _suites(suites)
    paths = named_adapters(adapters)
    check_adapters(paths)
    if isinstance(model, (str, Path)) and wanted.sites:
        check_sites(outline(model), wanted.sites)
    judge = judge_of(wanted.judge, wanted.judge_prompt) if wanted.judge and "attacks" in chosen else None
    if wanted.generator == "vllm":
        if not isinstance(model, (str, Path)):
            raise EvaluationError("generator='vllm' loads the model itself; give its folder or hub name")
        check_installed()
    benign = load_set(BENIGN, wanted.benign_limit, harmful=False)
    # the default sets have no choice: beside benign sets it is about those
    choice = None if wanted.benign_sets and wanted.sets == HARM_SETS else wanted.choice
    more_benign = [
        _right(load_set(name, wanted.benign_limit, harmful=False, choice=wanted.choice))
        for name in wanted.benign_sets if {"harm", "overrefusal"} & set(chosen)
    ]  # fmt: skip
    found = {
        name: _right(load_set(name, wanted.limit, choice=choice))
        for name in sorted(wanted.sets, key=HARM_SETS.__contains__)  # what needs no download is checked first
        if {"harm", "attacks", "ladder"} & set(chosen)
    }
    harmful = [found[name] for name in wanted.sets if name in found]
    wanted = replace(
        wanted, sets=tuple(map(set_name, wanted.sets)),
        benign_sets=tuple(set_name(name, harmful=False) for name in wanted.benign_sets)
    )  # fmt: skip
    for prompts in (*harmful, *more_benign):
        if prompts.reason:
            logger.warning("%s is unavailable: %s", prompts.name, prompts.reason)
        elif prompts.format and tell is not None:
            tell(prompts.shown)
    if isinstance(model, (str, Path)):
        name, (model, own) = str(model), load(model, dtype=dtype)
        tokenizer = tokenizer or own
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(where)
    else:
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        raise EvaluationError("a model was given without its tokenizer; hand it over as tokenizer=")
    folder = None if output is None else Path(output).expanduser()
    if wanted.chat_template_date is None and rendering.prints_date(tokenizer):
        wanted = replace(wanted, chat_template_date=_first_date(folder) or rendering.today())
    ChatEncoder(  # raises now for a wrong template or variable, not at every prompt
        tokenizer,
        wanted.system_prompt,
        chat_template_kwargs=wanted.chat_template_kwargs,
        date=wanted.chat_template_date,
    )
    subjects = Subjects(model, paths)
    try:
        info = _info(name, subjects, chosen, wanted, [benign, *more_benign, *harmful], command)
        if folder is not None:
            info = _continued(folder, info)
        records = Records(folder, keep_texts)
        if folder is not None:
            write_json(folder / RUN, info)
        engine: VLLM | None = None
        for subject in subjects.names:
            with subjects.using(subject) as measured, quiet_generation():
                bench = Bench(measured, tokenizer, system_prompt=wanted.system_prompt, batch_size=batch_size,
                              max_new_tokens=wanted.max_new_tokens, date=wanted.chat_template_date,
                              chat_template_kwargs=wanted.chat_template_kwargs)  # fmt: skip
                if wanted.generator == "vllm":
                    dtype = info["dtype"]
                    engine = engine or VLLM(subjects.paths[BASE], paths, dtype, bench.context)
                    bench.generate = engine.of(subject)
                run = Run(subject, bench, wanted, records, benign, _there(harmful), _there(more_benign))
                for suite in chosen:
                    if tick is not None:
                        run.tick = _named(tick, subject)
                    SUITES[suite].measure(run)
        if judge is not None:
            texts = {(p.name, prompt.id): prompt.text for p in harmful for prompt in p.prompts}
            place = next(subjects.model.parameters()).device
            judge_answers(judge, records, texts, subjects.names, wanted.sets, place)
    finally:
        subjects.close()
    names = list(info["subjects"])
    rows = table_rows(records, names, chosen, wanted, [*harmful, *more_benign])
    result = Evaluation(rows, names, records, info, folder)
    if folder is not None:
        # a mean of nothing is no number, which is null here
        write_json(folder / RESULTS, {"subjects": names, "rows": [asdict(row) for row in rows]}, nulls=True)
        write_text(folder / TABLE, result.markdown())
    return result


def _there(sets: Sequence[PromptSet]) -> list[PromptSet]:
    return [prompts for prompts in sets if not prompts.reason]


def table_rows(
    records: Records, subjects: Sequence[str], suites: Sequence[str], settings: Settings, harmful: Sequence[PromptSet]
) -> list[Row]:
    """All rows, suite by suite, then those of unavailable sets, then the verdicts."""
    rows = [row for suite in suites for subject in subjects for row in SUITES[suite].rows(records, subject, settings)]
    for prompts in harmful:
        if prompts.reason:
            rows += [
                Row(name, "not measured", prompts.name, "unavailable", None, note=prompts.reason) for name in subjects
            ]
    return rows + verdict_rows(rows, records, subjects, settings)


def _right(prompts: PromptSet) -> PromptSet:
    """The set, or an error where its name, its file or what is chosen of it is wrong."""
    if prompts.mistake:
        raise EvaluationError(f"the set {prompts.name}: {prompts.reason}")
    return prompts


def _suites(names: Sequence[str] | None) -> list[str]:
    usual = [name for name, suite in SUITES.items() if not suite.optional]
    chosen = list(dict.fromkeys(usual if names is None else names))
    if not chosen:
        raise EvaluationError(f"no suite to run; choose among {', '.join(SUITES)}")
    if unknown := [name for name in chosen if name not in SUITES]:
        raise EvaluationError(f"no suite is called {unknown[0]!r}; choose among {', '.join(SUITES)}")
    return chosen


def _named(tick: Callable[[str, int, int], None], subject: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: tick(f"{subject}: {what}", min(done, total), total)


def _info(
    name: str, subjects: Subjects, suites: list[str], settings: Settings, sets: Sequence[PromptSet], command: str | None
) -> dict[str, Any]:
    model = subjects.model
    data = {prompts.name: prompts.described() for prompts in sets}
    for suite in suites:
        data |= SUITES[suite].data(settings)
    return {
        "model": name,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "subjects": {
            subject: {"path": subjects.paths.get(subject, ""), "fingerprint": subjects.fingerprint(subject)}
            for subject in subjects.names
        },
        "suites": suites,
        "settings": settings.as_dict(),
        "data": data,
        "versions": versions() | {"platform": f"{platform.system()} {platform.machine()}"},
        "commands": [command or " ".join(map(str, sys.argv))],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _first_date(folder: Path | None) -> str | None:
    """The date in the prompts of an earlier run in this folder."""
    if folder is None or not (folder / RUN).is_file():
        return None
    date: str | None = json.loads((folder / RUN).read_text(encoding="utf-8"))["settings"].get("chat_template_date")
    return date


def _continued(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The run's description, joined with that of an earlier run in this folder.

    Raises:
        EvaluationError: the folder holds an evaluation of something else, or under other settings.
    """
    path = folder / RUN
    if not path.is_file():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {old['settings'].get(name)!r} and is now {value!r}"
        for name, value in new["settings"].items()
        if name not in _FREE and name in old["settings"] and old["settings"][name] != value
    ]
    for name, subject in new["subjects"].items():
        if name in old["subjects"] and old["subjects"][name]["fingerprint"] != subject["fingerprint"]:
            changed.append(f"the weights of {name} have changed")
    for name, data in new["data"].items():
        if (was := old["data"].get(name, {}).get("sha256")) and data["sha256"] and was != data["sha256"]:
            changed.append(f"the texts of the set {name} have changed")
    if old["settings"].get("judge") not in (None, new["settings"]["judge"]) and new["settings"]["judge"]:
        changed.append(f"judge was {old['settings']['judge']!r}")
    if changed:
        raise EvaluationError(f"{folder} holds another evaluation: {'; '.join(changed)}; use another output folder")
    logger.info("continuing the evaluation in %s", folder)
    merged = {**new, "started": old["started"], "commands": [*old["commands"], *new["commands"]]}
    merged["subjects"] = old["subjects"] | new["subjects"]
    merged["data"] = old["data"] | new["data"]
    merged["suites"] = list(dict.fromkeys([*old["suites"], *new["suites"]]))
    return merged
