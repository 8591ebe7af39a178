"""Utility: perplexity, MMLU, LAMBADA and generated answers without a hub, and lm-eval's tasks by name with one."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lpa import assets
from lpa.data import DataError, perplexity_text, questions
from lpa.messages import one_line

from ..bench import batches
from ..records import Record, Records
from ..sets import digest
from ..stats import bootstrap, mean, wilson
from .base import Row, Run, Settings, Suite, described, scored, share_row, skipped_note

LETTERS = "ABCD"
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
PERPLEXITY, MMLU, LAMBADA, ARITHMETIC, KNOWLEDGE = "perplexity", "mmlu", "lambada", "arithmetic", "knowledge"


class Utility(Suite):
    """Whether the model can still do what it could do before.

    Perplexity is of plain prose that was written for this project, paragraph by paragraph, without a template. MMLU
    is without examples, in the chat template, the likeliest of the four letters being the answer. LAMBADA is the last
    word of a passage as plain text. Arithmetic and knowledge are easy questions after GSM8K and MMLU, written for
    this project. They are answered in words; the number, or the choice that is named first, counts. A model
    that says one sentence to everything may keep its likelihoods, and loses these. lm-eval's tasks run as lm-eval
    defines them, in the chat template.
    """

    name = "utility"
    about = "perplexity, MMLU, LAMBADA, answers to easy questions, lm-eval's tasks"

    def data(self, settings: Settings) -> dict[str, dict[str, Any]]:
        found = {"prose": described("lpa/data/text.txt", perplexity_text().split("\n\n"))}
        for name in settings.utility_sets:
            read, _, source = _SETS[name]
            try:
                texts = [row["text"] for row in read()]
            except assets.AssetError as error:
                found[name] = {"source": "", "rows": 0, "used": 0, "sha256": "", "reason": one_line(error)}
                continue
            found[name] = described(source, texts, min(len(texts), settings.utility_limit or len(texts)))
        return found

    def measure(self, run: Run) -> None:
        self._perplexity(run)
        for name in run.settings.utility_sets:
            read, score, _ = _SETS[name]
            try:
                rows = _sample(read(), run.settings.utility_limit)
            except assets.AssetError as error:
                if not run.has(self.name, name, "-", "missing"):
                    run.add(self.name, name, "-", "missing", reason=one_line(error))
                continue
            todo = [row for row in rows if not run.has(self.name, name, row["id"])]
            for number, chunk in enumerate(batches(todo, run.bench.batch_size), 1):
                score(run, chunk)
                run.tick(f"utility {name}", len(rows) - len(todo) + number * run.bench.batch_size, len(rows))
        for task in run.settings.tasks:
            held = run.records.get((run.subject, self.name, task_name(task), "-", ""))
            if held is None or "reason" in held:  # the missing package may be installed by now
                run.tick(f"utility {task_name(task)}", 0, 1)
                _lm_eval(run, task)

    def _perplexity(self, run: Run) -> None:
        todo = []
        for number, text in enumerate(perplexity_text().split("\n\n")):
            if not run.has(self.name, PERPLEXITY, f"paragraph-{number:02d}"):
                todo.append((f"paragraph-{number:02d}", text, list(run.bench.tokenizer(text)["input_ids"])))
        for chunk in batches(todo, run.bench.batch_size):
            cut = [tokens[: run.bench.context] for _, _, tokens in chunk]
            rows = run.bench.log_probs(cut, [range(len(tokens) - 1) for tokens in cut])
            for (name, text, _), tokens, row in zip(chunk, cut, rows, strict=True):
                loss = -sum(float(row[place, token]) for place, token in enumerate(tokens[1:]))
                run.add(self.name, PERPLEXITY, name, sha256=digest(text), loss=loss, tokens=len(tokens) - 1)

    def rows(self, records: Records, subject: str, settings: Settings) -> list[Row]:
        rows = []
        if own := records.select(subject=subject, suite=self.name, set=PERPLEXITY):
            pairs = [(r["loss"], r["tokens"]) for r in own]
            low, high = bootstrap([pairs], _perplexity)
            rows.append(Row(subject, self.name, "prose", PERPLEXITY, _perplexity([pairs]), low, high,
                            sum(r["tokens"] for r in own), good="down", note="interval over paragraphs"))  # fmt: skip
        for name, metric in METRICS.items():
            own = records.select(subject=subject, suite=self.name, set=name, mode="")
            for missing in records.select(subject=subject, suite=self.name, set=name, mode="missing")[: not own]:
                rows.append(Row(subject, self.name, name, metric, None, note=missing["reason"]))
            if own:
                note = skipped_note(own)
                rows.append(share_row(subject, self.name, name, metric, [r["right"] for r in scored(own)], good="up",
                                      note=note))  # fmt: skip
        for task in map(task_name, settings.tasks):
            rows += _task_rows(subject, task, records.select(subject=subject, suite=self.name, set=task))
        return rows


def _perplexity(groups: Sequence[Sequence[tuple[float, int]]]) -> float:
    (pairs,) = groups
    return math.exp(sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs))


def read_mmlu() -> list[dict[str, Any]]:
    """MMLU's test questions: id, question, choices, answer (0 to 3), subject."""
    import datasets

    rows = datasets.Dataset.from_file(str(assets.fetch("mmlu") / "mmlu_test.arrow"))
    return [{"id": f"mmlu-{number:05d}", "text": row["question"], **row} for number, row in enumerate(rows, 1)]


def read_lambada() -> list[dict[str, Any]]:
    """LAMBADA's test passages: id, text."""
    lines = (assets.fetch("mmlu") / "lambada_test.jsonl").read_text(encoding="utf-8").split("\n")
    return [{"id": f"lambada-{n:04d}", "text": json.loads(line)["text"]} for n, line in enumerate(lines, 1) if line]


def _sample(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """The rows whose text has the least SHA-256: the same for every model."""
    return rows if limit is None else sorted(rows, key=lambda row: digest(row["text"] + row["id"]))[:limit]


def _read_questions(kind: str) -> list[dict[str, Any]]:
    return [{"text": json.dumps(row), **row} for row in questions() if row["kind"] == kind]


def _fitting(
    run: Run, name: str, chunk: Sequence[dict[str, Any]], text: Callable[[dict[str, Any]], str], room: int | None = None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows whose prompt fits, and its tokens; the others get a record of the error."""
    kept, tokens = [], []
    for row in chunk:
        try:
            tokens.append(run.bench.prompt_tokens(text(row), room=room))
            kept.append(row)
        except DataError as error:
            run.add("utility", name, row["id"], sha256=digest(row["question"]), error=str(error))
    return kept, tokens


def _score_mmlu(run: Run, chunk: Sequence[dict[str, Any]]) -> None:
    bench = run.bench
    answers = [bench.variants([letter]) for letter in LETTERS]

    def text(row: dict[str, Any]) -> str:
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
        return "\n".join([row["question"], *choices, "Answer with the letter of the right choice alone."])

    kept, tokens = _fitting(run, MMLU, chunk, text, room=4)
    if not kept:
        return
    for row, scores in zip(kept, bench.log_scores(tokens, answers), strict=True):
        right = max(range(4), key=scores.__getitem__) == row["answer"]
        run.add("utility", MMLU, row["id"], sha256=digest(row["question"]), right=right, scores=scores)


def _score_generated(run: Run, chunk: Sequence[dict[str, Any]]) -> None:
    kept, tokens = _fitting(run, chunk[0]["kind"], chunk, lambda row: row["question"])
    for row, said in zip(kept, run.bench.answers(tokens) if kept else [], strict=True):
        found = first_choice(said, row["choices"]) if "choices" in row else the_number(said)
        right = found is not None and found == (row["answer"] if "choices" in row else float(row["answer"]))
        run.add("utility", row["kind"], row["id"], sha256=digest(row["question"]), right=right, answer=said)


def the_number(answer: str) -> float | None:
    """The number that an answer gives: the first one after an equals sign, else the last.

    >>> the_number("3 + 4 = 7 apples in 2 bags"), the_number("It costs $1,200.50.")
    (7.0, 1200.5)
    """
    found = re.findall(rf"=\s*\$?({_NUMBER})", answer)[:1] or re.findall(_NUMBER, answer)[-1:]
    return float(found[0].replace(",", "")) if found else None


def first_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names first.

    >>> first_choice("It is rome, not Paris.", ["Paris", "Rome"])
    'Rome'
    """
    named = {choice: re.search(rf"\b{re.escape(choice)}\b", answer, re.IGNORECASE) for choice in choices}
    places = {choice: match.start() for choice, match in named.items() if match is not None}
    return min(places, key=places.__getitem__) if places else None


def _score_lambada(run: Run, chunk: Sequence[dict[str, Any]]) -> None:
    bench, texts, starts, kept = run.bench, [], [], []
    for row in chunk:
        context, _, word = row["text"].rstrip().rpartition(" ")
        before = list(bench.tokenizer(context)["input_ids"])
        tokens = list(bench.tokenizer(f"{context} {word}")["input_ids"])
        if len(tokens) > bench.context or tokens[: len(before)] != before:
            reason = "its last word does not begin a token" if len(tokens) <= bench.context else f"{len(tokens)} tokens"
            run.add("utility", LAMBADA, row["id"], sha256=digest(row["text"]), error=reason)
            continue
        texts.append(tokens)
        starts.append(len(before))
        kept.append(row)
    if not kept:
        return
    places = [range(start - 1, len(tokens) - 1) for start, tokens in zip(starts, texts, strict=True)]
    for row, tokens, start, table in zip(kept, texts, starts, bench.log_probs(texts, places), strict=True):
        right = table.argmax(-1).tolist() == tokens[start:]
        loss = -sum(float(table[i, token]) for i, token in enumerate(tokens[start:]))
        run.add("utility", LAMBADA, row["id"], sha256=digest(row["text"]), right=right, loss=loss)


_MMLU_ASSET = "{0.package} {0.version}".format(assets.get("mmlu"))
_QUESTIONS = "lpa/data/questions.jsonl"
# how a set is read, how a batch of it is scored, and its source
_SETS: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[Run, Sequence[dict[str, Any]]], None], str]] = {
    MMLU: (read_mmlu, _score_mmlu, _MMLU_ASSET),
    LAMBADA: (read_lambada, _score_lambada, _MMLU_ASSET),
    ARITHMETIC: (lambda: _read_questions(ARITHMETIC), _score_generated, _QUESTIONS),
    KNOWLEDGE: (lambda: _read_questions(KNOWLEDGE), _score_generated, _QUESTIONS),
}
GENERATED = "answers right"
METRICS = {MMLU: "accuracy", LAMBADA: "last word", ARITHMETIC: GENERATED, KNOWLEDGE: GENERATED}


def _lm_eval(run: Run, task: str) -> None:
    """Write the numbers of one lm-eval task and its score of every sample, or the reason why there are none."""
    if importlib.util.find_spec("lm_eval") is None:
        run.add("utility", task_name(task), "-", reason="lm-eval is not installed: pip install lm-eval")
        return
    try:
        found = _simple_evaluate(run, task)
    except Exception as error:  # unknown tasks, data that needs a hub: each raises in its own way
        run.add("utility", task_name(task), "-", reason=f"{type(error).__name__}: {one_line(error)}")
        return
    name = task if task in found["results"] else next(iter(found["results"]))  # a file names its task itself
    samples = found.get("samples", {})
    for part, rows in samples.items():
        for row in rows:
            scores = {name: _finite(row[name]) for name in row["metrics"] if isinstance(row[name], (int, float))}
            answer = row["filtered_resps"][0] if row["filtered_resps"] else None
            more: dict[str, Any] = {"answer": answer} if isinstance(answer, str) else {}
            run.add("utility", task_name(task), f"{part}-{row['doc_id']:05d}", f"sample:{row['filter']}",
                    sha256=row["doc_hash"], scores=scores, **more)  # fmt: skip
    values = {metric: _finite(value) for metric, value in found["results"][name].items()
              if isinstance(value, (int, float)) and not isinstance(value, bool)}  # fmt: skip
    better = {metric: bool(up) for metric, up in found.get("higher_is_better", {}).get(name, {}).items()}
    count = sum(len({row["doc_id"] for row in rows}) for rows in samples.values())
    # the last, so that a run that is stopped before does the task again
    run.add("utility", task_name(task), "-", values=values, higher_is_better=better, samples=count,
            version=found.get("versions", {}).get(name))  # fmt: skip


def _finite(value: float) -> float | None:
    """None for what lm-eval could not compute, such as a correlation of equal answers."""
    return float(value) if math.isfinite(value) else None


def _simple_evaluate(run: Run, task: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=run.model, tokenizer=run.bench.tokenizer, batch_size=run.bench.batch_size)
    templated = bool(run.bench.tokenizer.chat_template)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=[task], limit=run.settings.utility_limit, apply_chat_template=templated,
        system_instruction=run.settings.system_prompt if templated else None, random_seed=run.settings.seed,
        numpy_random_seed=run.settings.seed, torch_random_seed=run.settings.seed,
        fewshot_random_seed=run.settings.seed, bootstrap_iters=0,
    )  # fmt: skip
    return found


def task_name(task: str) -> str:
    """What a task is called in results: a YAML file by its name alone."""
    return Path(task).stem if task.endswith((".yaml", ".yml")) else task


def _task_rows(subject: str, task: str, records: Sequence[Record]) -> list[Row]:
    """Rows of a task from its record and those of its samples; intervals where a metric is the mean of its samples."""
    record = next((r for r in records if r["id"] == "-"), None)
    if record is None:
        return []
    if "reason" in record:
        return [Row(subject, "utility", task, "lm-eval", None, note=record["reason"])]
    rows = []
    for metric, value in record["values"].items():
        name, _, which = metric.partition(",")
        if name.endswith("_stderr") or name in ("alias", "sample_len"):
            continue
        good = "up" if record["higher_is_better"].get(name, True) else "down"
        n, low, high, unit = record["samples"], None, None, ""
        if value is None:
            rows.append(
                Row(subject, "utility", task, metric, None, n=n, good=good, note="lm-eval: not a finite number")
            )
            continue
        samples = [r for r in records if r["mode"] == f"sample:{which}"]
        own = [score for r in samples if (score := r["scores"].get(name)) is not None]
        if own and abs(mean(own) - value) < 1e-6:
            binary = set(own) <= {0.0, 1.0}
            n, unit = len(own), "%" if binary else ""
            low, high = wilson(sum(own), n) if binary else bootstrap([own], lambda groups: mean(groups[0]))
        rows.append(Row(subject, "utility", task, metric, value, low, high, n, unit, good, "lm-eval"))
    return rows
