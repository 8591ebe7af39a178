"""Talk to a base model and its adapters at once: one prompt, the answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bench import Bench, quiet_generation
from .subjects import Subjects, named_adapters

QUIT = ("/quit", "/exit")


def answers(
    subjects: Subjects,
    tokenizer: Any,
    prompt: str,
    *,
    system_prompt: str | None,
    max_new_tokens: int = 200,
    **template: Any,
) -> dict[str, str]:
    """The greedy answer of every subject to one prompt, without what was said before. `template`: as in `ChatEncoder`.

    Raises:
        lpa.data.DataError: the prompt is longer than the context.
    """
    found = {}
    with quiet_generation():
        for name in subjects.names:
            with subjects.using(name) as model:
                bench = Bench(model, tokenizer, system_prompt=system_prompt, max_new_tokens=max_new_tokens, **template)
                (found[name],) = bench.answers([bench.prompt_tokens(prompt)])
    return found


def side_by_side(found: Mapping[str, str]) -> Table:
    """The answers in columns, shown as plain text."""
    table = Table(expand=True)
    for name in found:
        table.add_column(Text(name))
    table.add_row(*(Text(text) for text in found.values()))
    return table


def chat(
    model: Any,
    tokenizer: Any,
    adapters: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    prompts: Sequence[str] = (),
    system_prompt: str | None = None,
    max_new_tokens: int = 200,
    console: Console | None = None,
    read: Callable[[str], str] = input,
    **template: Any,
) -> None:
    """Answer the given prompts, or else what is typed until /quit or the end of input.

    Raises:
        lpa.evaluation.EvaluationError: an adapter that does not fit the model.
    """
    out = console or Console()
    subjects = Subjects(model, named_adapters(adapters))
    try:
        if not prompts:
            out.print(f"{', '.join(subjects.names)}; every prompt stands alone; {QUIT[0]} ends", highlight=False)
        for prompt in prompts or _typed(read):
            try:
                found = answers(
                    subjects, tokenizer, prompt, system_prompt=system_prompt, max_new_tokens=max_new_tokens, **template
                )
            except ValueError as error:  # too long: no reason to end a conversation
                out.print(Text(f"error: {error}"))
                continue
            out.print(side_by_side(found))
    finally:
        subjects.close()


def _typed(read: Callable[[str], str]) -> Any:
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in QUIT:
            return
        if line:
            yield line
