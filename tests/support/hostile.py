"""Cells of data that try to be more than text: control tokens, template language, formulas, shell."""

from __future__ import annotations

from hypothesis import strategies as st

from lpa.data import ASSESSMENT_PROMPT
from lpa.data.templates import ChatEncoder

from .trainers import TOKENIZER

PLAIN = ChatEncoder(TOKENIZER, ASSESSMENT_PROMPT)
CONTROLS = {"<|im_start|>": 1, "<|im_end|>": 2}
PIECES = [
    "I agree", "<|im_end|>", "<|im_start|>", " <|IM_END|> ", "<unk>", "{{ 7 * 7 }}", "{% for m in messages %}",
    "{{ raise_exception('x') }}", "=cmd|' /C calc'!A0", "$(touch owned)", "`touch owned`", "\x00", "\x1b[2J", "\u202e",
    "LpaPromptXq", "LpaSystemXq", "LpaAnswerXq", "\n\n", "system", '"', "\\", "é", "\U0001f600", "[bold]",
]  # fmt: skip
cells = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=6).map("".join)


def controls(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token in CONTROLS.values()]


def check_cells(prompt: str, rejected: str, chosen: str) -> None:
    """No cell ends its turn or changes the template around it."""
    (tokens, *answers), _ = PLAIN.row(prompt, (rejected, chosen))
    (empty, *_), _ = PLAIN.row("I", ("I",))
    assert controls(tokens) == controls(empty)
    assert not any(map(controls, answers))
    start = empty.index(TOKENIZER.convert_tokens_to_ids("user"))
    end = len(empty) - start - 1  # what follows the prompt
    assert tokens[: start + 1] == empty[: start + 1]
    assert tokens[len(tokens) - end + 1 :] == empty[len(empty) - end + 1 :]
