"""Get and judge the greedy answers that several suites look at; an answer is made once a subject, prompt and mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lpa_kernels.attack import AttackResult

from .. import refusal
from ..bench import batches
from ..records import Record, Records
from ..sets import Prompt, PromptSet, digest
from .base import Run

NAME = "answers"
DIRECT = "direct"
_SERVED = 256  # prompts handed to a generator that makes batches itself
Perturb = Callable[[Sequence[str]], AttackResult]


def answer(
    run: Run,
    prompts: PromptSet,
    mode: str = DIRECT,
    wrap: Callable[[str], str] = str,
    prefill: str = "",
    perturb: Perturb | None = None,
) -> None:
    """Write the missing records of a set's answers.

    Args:
        mode: how it was asked; with subject, set and id it is the record's key.
        wrap: what is asked, from the prompt. prefill: the beginning of the answer that is put into the model's mouth.
        perturb: the attack on one batch of what is asked.
    """
    todo = [p for p in prompts.prompts if not run.has(NAME, prompts.name, p.id, mode)]
    done = len(prompts.prompts) - len(todo)
    todo.sort(key=lambda p: len(p.text))  # batches of like lengths
    served = run.bench.generate is not None and perturb is None
    for chunk in batches(todo, _SERVED if served else run.bench.batch_size):
        kept, tokens = run.fitting(NAME, prompts.name, chunk, mode, wrap, prefill=prefill)
        if kept:
            attack = perturb([wrap(p.text) for p in kept]) if perturb is not None else None
            for prompt, text in zip(kept, run.bench.answers(tokens, attack), strict=True):
                keep(run, prompts, mode, prompt, f"{prefill} {text}".strip())
        done += len(chunk)
        run.tick(f"{mode} {prompts.name}", done, len(prompts.prompts))


def keep(run: Run, prompts: PromptSet, mode: str, prompt: Prompt, text: str, **more: Any) -> None:
    """Judge an answer and write its record. more: further values of the record."""
    label = refusal.label(text, prompt.text, prompt.expect, run.settings.completions)
    run.add(
        NAME, prompts.name, prompt.id, mode, prompts.harmful, sha256=prompt.sha256, tag=prompt.tag, label=label,
        words=len(text.split()), answer_sha256=digest(text), answer=text, prompt=prompt.text,
        **more,
    )  # fmt: skip


def answers(records: Records, subject: str, set_name: str, mode: str = DIRECT) -> list[Record]:
    """The answer records of one subject, set and mode, those with an error among them, in order of prompt."""
    return sorted(records.select(subject=subject, suite=NAME, set=set_name, mode=mode), key=lambda r: str(r["id"]))


def complied(record: Record) -> bool:
    """Whether the answer did what was asked."""
    return bool(record["label"] == refusal.COMPLIANCE)


def own_words(record: Record) -> bool:
    """Whether the answer refuses in the model's own words."""
    return record["label"] in refusal.NOT_DONE[refusal.OWN_WORDS]


def not_done_note(records: Sequence[Record]) -> str:
    """How many answers did not do what was asked, by kind: "3 own words, 1 trained sentence"."""
    counts = {kind: sum(r["label"] in labels for r in records) for kind, labels in refusal.NOT_DONE.items()}
    notes = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"not done: {notes}" if notes else ""
