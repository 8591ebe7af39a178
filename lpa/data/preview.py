"""Show which tokens of a pair are prompt, rejected, chosen and attacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from .collate import PairCollator

_STYLES = {"prompt": "cyan", "rejected": "red", "chosen": "green"}
_ATTACKED = "underline"


def preview(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    system_prompt: str | None = None,
    max_length: int | None = None,
    attack_on: str = "prompt+completions",
    console: Console | None = None,
    **chat: Any,
) -> None:
    """Print each pair's tokens: coloured on a terminal; elsewhere a line each (part, position, id, text, attacked).

    Args:
        rows: pairs as `load_pairs` gives them. console: where to print; standard output by default.
        The others are `PairCollator`'s.
    """
    console = console or Console()
    collate = PairCollator(tokenizer, system_prompt=system_prompt, max_length=max_length, attack_on=attack_on, **chat)
    if console.is_terminal:
        legend = [Text(f" {name} ", _STYLES[name]) for name in _STYLES]
        console.print(*legend, Text(" attacked ", _ATTACKED))
    for number, row in enumerate(rows, 1):
        console.print(Text(f"\n{row.get('row') or f'row {number}'}", "bold"))
        for part, tokens in _parts(tokenizer, {name: value[0] for name, value in collate([row]).items()}).items():
            if console.is_terminal:
                texts = [
                    (_harmless(text), f"{_STYLES[part]} {_ATTACKED if attacked else ''}")
                    for _, _, text, attacked in tokens
                ]
                console.print(Text.assemble((f"{part}: ", "dim"), *texts))
                continue
            for position, token, text, attacked in tokens:
                line = f"{part:8} {position:5d} {token:7d} {text!r:24} {'attacked' if attacked else '-'}"
                console.print(Text(line), soft_wrap=True)


def _harmless(text: str) -> str:
    """Control characters of a cell as escapes: raw ones would steer the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def _parts(tokenizer: Any, batch: Mapping[str, Any]) -> dict[str, list[tuple[int, int, str, bool]]]:
    """(position, id, text, attacked) of the tokens of each part."""
    parts = {}
    for part, texts in (("prompt", "rejected"), ("rejected", "rejected"), ("chosen", "chosen")):
        ids, attacked = batch[f"{texts}_ids"].tolist(), batch["attack_mask"].tolist()
        where = batch[f"{part}_mask"].nonzero().flatten().tolist()
        parts[part] = [(i, ids[i], tokenizer.decode([ids[i]]), attacked[i]) for i in where]
    return parts
