"""`evaluate`: measure a base model and adapters side by side, prompt by prompt; a stopped run continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data import ChatEncoder, rendering
from ..files import write_json, write_text
from ..models import DEFAULT_MODEL, check_sites, load, outline
from ..run_folder import RESULTS, RUN, TABLE, held
from .bench import Bench, quiet_generation
from .continuing import continued, date_in, description
from .judges import Judging, judge_answers, judge_of
from .records import Records
from .sets import BENIGN, HARM_SETS, PromptSet, load_set, set_name
from .subjects import BASE, EvaluationError, Subjects, check_adapters, named_adapters, warn_of_templates
from .suites import READERS, SUITES, Row, Run, Settings
from .table import as_markdown, as_table
from .verdict import verdict_rows
from .vllm import VLLM, check_installed

logger = logging.getLogger(__name__)


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
        ValueError: another process writes to the folder.
        lpa.models.ModelError, lpa.assets.AssetError: no model.
    """
    wanted = _settings(settings, options)
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size} must be at least 1")
    chosen, paths = _suites(suites), named_adapters(adapters)
    check_read([*options, *(["judge"] if wanted.judge else [])], chosen)
    check_adapters(paths)
    judge = _check(model, chosen, wanted)
    wanted_sets, wanted_benign = _set_names(wanted)
    sets = _load_sets(chosen, wanted)
    _say_how_read(sets.named, tell)
    wanted = replace(wanted, sets=wanted_sets, benign_sets=wanted_benign)
    named = isinstance(model, (str, Path))
    name, model, tokenizer = _loaded(model, tokenizer, dtype, device)
    folder = None if output is None else Path(output).expanduser()
    if wanted.chat_template_date is None and rendering.prints_date(tokenizer):
        wanted = replace(wanted, chat_template_date=date_in(folder) or rendering.today())
    # raises now for a wrong template or variable, not at every prompt
    ChatEncoder(tokenizer, wanted.system_prompt, **wanted.chat_options)
    warn_of_templates(paths, tokenizer)
    subjects = Subjects(model, paths)
    if named:  # what was loaded as an adapter is a subject too, from that folder
        subjects.paths = dict.fromkeys(subjects.names, name) | subjects.paths
    with ExitStack() as until:
        until.callback(subjects.close)
        if folder is not None:
            until.enter_context(held(folder))
        info = continued(folder, description(name, subjects, chosen, wanted, sets.everything, command))
        records = Records(folder, keep_texts)
        _check_rows(records, sets.everything)
        if folder is not None:
            write_json(folder / RUN, info)
        _measure(subjects, tokenizer, batch_size, chosen, wanted, sets, records, tick)
        if judge is not None:
            texts = {(p.name, prompt.id): prompt.text for p in sets.harmful for prompt in p.prompts}
            judge_answers(judge, records, texts, subjects.names, wanted.sets, subjects.device)
        names = list(info["subjects"])
        rows = table_rows(records, names, info["suites"], Settings.of(info["settings"]), sets.named)
        result = Evaluation(rows, names, records, info, folder)
        if folder is not None:
            # a mean of nothing is no number, which is null here
            write_json(folder / RESULTS, {"subjects": names, "rows": [asdict(row) for row in rows]}, nulls=True)
            write_text(folder / TABLE, result.markdown())
        return result


# ---- before a model is loaded --------------------------------------------------------------------------------------


def _settings(given: Settings | None, options: dict[str, Any]) -> Settings:
    """Those that were given, or those that the options make."""
    if given is None:
        # a limit on the harmful sets alone holds for the benign one too
        return Settings(**{"benign_limit": options["limit"], **options} if "limit" in options else options)
    if options:
        raise EvaluationError(f"give settings or {', '.join(options)}, not both")
    return given


def _suites(names: Sequence[str] | None) -> list[str]:
    usual = [name for name, suite in SUITES.items() if not suite.optional]
    chosen = list(dict.fromkeys(usual if names is None else names))
    if not chosen:
        raise EvaluationError(f"no suite to run; choose among {', '.join(SUITES)}")
    if unknown := [name for name in chosen if name not in SUITES]:
        raise EvaluationError(f"no suite is called {unknown[0]!r}; choose among {', '.join(SUITES)}")
    return chosen


def check_read(
    given: Iterable[str], suites: Sequence[str] | None = None, called: Mapping[str, str] | None = None
) -> None:
    """Refuse settings that none of the suites reads.

    Args:
        given: fields of `Settings` that were set. called: what they are called where they were given.

    Raises:
        EvaluationError: it names the setting, and the suites that read it.
    """
    chosen = _suites(suites)
    for name in given:
        if name in READERS and not set(READERS[name]) & set(chosen):
            setting, readers = (called or {}).get(name, name), " or ".join(READERS[name])
            raise EvaluationError(f"{setting} is read by the suite {readers}, which is not among {', '.join(chosen)}; "
                                  "add it, or leave the setting out")  # fmt: skip


def _set_names(settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the sets are called in results, harmful and benign ones; records of two with one name would be mixed."""
    harmful = tuple(map(set_name, settings.sets))
    benign = tuple(set_name(name, harmful=False) for name in settings.benign_sets)
    named = (BENIGN, *harmful, *benign)  # the shipped benign set is always asked
    if twice := [name for name in named if named.count(name) > 1]:
        raise EvaluationError(f"two sets would be called {twice[0]!r}; name each set once, and give files other names")
    return harmful, benign


def _check(model: Any, suites: Sequence[str], settings: Settings) -> Judging | None:
    """The judge, where there is one; refuses sites that a named model does not have, and vLLM without a name."""
    named = isinstance(model, (str, Path))
    if named and settings.sites:
        check_sites(outline(model), settings.sites)
    if settings.judge_prompt and not settings.judge:
        raise EvaluationError("judge_prompt is a judge's question, and there is no judge; give one as judge")
    judge = judge_of(settings.judge, settings.judge_prompt) if settings.judge else None
    if settings.generator == "vllm":
        if not named:
            raise EvaluationError("generator='vllm' loads the model itself; give its folder or hub name")
        check_installed()
    return judge


@dataclass(frozen=True)
class _Sets:
    """The prompts: the shipped benign ones, and of the sets that were named the harmful and the benign ones. Those that
    are unavailable are among them.
    """

    benign: PromptSet
    harmful: list[PromptSet]
    more_benign: list[PromptSet]

    @property
    def named(self) -> list[PromptSet]:
        return [*self.harmful, *self.more_benign]

    @property
    def everything(self) -> list[PromptSet]:
        return [self.benign, *self.more_benign, *self.harmful]


def _load_sets(suites: Sequence[str], settings: Settings) -> _Sets:
    """Those that the suites ask for; what needs no download is checked first.

    Raises:
        EvaluationError: the name or the file of one, or what is chosen of it, is wrong.
    """
    benign = load_set(BENIGN, settings.benign_limit, harmful=False)
    more_benign, found = [], {}
    if {"harm", "overrefusal"} & set(suites):
        more_benign = [
            _right(load_set(name, settings.benign_limit, harmful=False, choice=settings.choice))
            for name in settings.benign_sets
        ]
    if {"harm", "attacks", "ladder"} & set(suites):
        # the default sets have no choice: beside benign sets it is about those
        choice = None if settings.benign_sets and settings.sets == HARM_SETS else settings.choice
        for name in sorted(settings.sets, key=HARM_SETS.__contains__):
            found[name] = _right(load_set(name, settings.limit, choice=choice))
    return _Sets(benign, [found[name] for name in settings.sets if name in found], more_benign)


def _right(prompts: PromptSet) -> PromptSet:
    """The set, or an error where its name, its file or what is chosen of it is wrong."""
    if prompts.mistake:
        raise EvaluationError(f"the set {prompts.name}: {prompts.reason}")
    return prompts


def _say_how_read(sets: Sequence[PromptSet], tell: Callable[[str], None] | None) -> None:
    for prompts in sets:
        if prompts.reason:
            logger.warning("%s is unavailable: %s", prompts.name, prompts.reason)
        elif prompts.format and tell is not None:
            tell(prompts.shown)


# ---- with it -------------------------------------------------------------------------------------------------------


def _loaded(model: Any, tokenizer: Any, dtype: str, device: str | torch.device | None) -> tuple[str, Any, Any]:
    """(the model's name, the model, its tokenizer), loaded where a name was given."""
    if isinstance(model, (str, Path)):
        name, (model, own) = str(model), load(model, dtype=dtype)
        tokenizer = tokenizer or own
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        raise EvaluationError("a model was given without its tokenizer; hand it over as tokenizer=")
    return name, model, tokenizer


def _measure(
    subjects: Subjects, tokenizer: Any, batch_size: int, suites: Sequence[str], settings: Settings, sets: _Sets,
    records: Records, tick: Callable[[str, int, int], None] | None,
) -> None:  # fmt: skip
    """Write the records that are not there yet, subject by subject and suite by suite."""
    harmful, more_benign = ([each for each in own if not each.reason] for own in (sets.harmful, sets.more_benign))
    served = settings.generator == "vllm"
    with closing(VLLM(subjects.paths[BASE], subjects.adapters, subjects.dtype)) if served else nullcontext() as engine:
        for subject in subjects.names:
            with subjects.using(subject) as model, quiet_generation():
                bench = Bench(model, tokenizer, system_prompt=settings.system_prompt, batch_size=batch_size,
                              max_new_tokens=settings.max_new_tokens, **settings.chat_options)  # fmt: skip
                if engine is not None:
                    bench.generate, bench.context = engine.of(subject), min(bench.context, engine.context)
                run = Run(subject, bench, settings, records, sets.benign, harmful, more_benign)
                if tick is not None:
                    run.tick = _named(tick, subject)
                for suite in suites:
                    SUITES[suite].measure(run)


def _check_rows(records: Records, sets: Sequence[PromptSet]) -> None:
    """Refuse to go on where ids, which are numbers of rows, have come to stand for other prompts.

    Raises:
        EvaluationError: they have.
    """
    for prompts in sets:
        texts = {prompt.id: prompt.sha256 for prompt in prompts.prompts}
        asked = [record for suite in ("answers", "harm") for record in records.select(suite=suite, set=prompts.name)]
        for record in asked:
            now = texts.get(record["id"])
            if now is not None and record.get("sha256", now) != now:
                raise EvaluationError(
                    f"row {record['id']} of the set {prompts.name} was another prompt; put its rows back in their "
                    "order, or use another output folder"
                )


def _named(tick: Callable[[str, int, int], None], subject: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: tick(f"{subject}: {what}", min(done, total), total)


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
