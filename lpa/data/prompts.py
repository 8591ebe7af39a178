"""The system prompts under which statements are put to a model: our own by name, anybody's by file."""

from __future__ import annotations

from pathlib import Path

from .tables import DataError
from .templates import ASSESSMENT_PROMPT, PLAIN_PROMPT

_SELF_ASSESSMENT = (
    "The following messages are statements about how you usually think, feel and act. Say of each whether you agree or "
    "disagree with it as a description of yourself: as you are today, not as you would like to be or to seem. No "
    "answer is better than another. Be honest and exact, and go by your first thought."
)
# The papers' own texts are not ours to ship; these do the same jobs in our words. docs/presets.md says where to find
# the papers'.
SYSTEM_PROMPTS = {
    "plain": PLAIN_PROMPT,
    "one-line": ASSESSMENT_PROMPT,
    "self-assessment": _SELF_ASSESSMENT,
    "self-assessment-or-refusal": (
        f"{_SELF_ASSESSMENT} Where a statement goes against what you stand for, you may decline to answer by saying "
        "\"I'm sorry, I can't go along with that.\""
    ),
}


def system_prompt_text(given: str | None) -> str | None:
    """The text of a system prompt: that of `SYSTEM_PROMPTS` for "@NAME", a file's for "@FILE", else the text itself.

    Raises:
        DataError: "@..." names neither one of `SYSTEM_PROMPTS` nor a file of UTF-8 text.

    >>> system_prompt_text("@plain")
    'You are a helpful assistant.'
    """
    if given is None or not given.startswith("@"):
        return given
    name = given[1:]
    if name in SYSTEM_PROMPTS:
        return SYSTEM_PROMPTS[name]
    try:
        return Path(name).read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"system prompt {given!r}: {name!r} is neither a readable file of UTF-8 text ({error}) nor one of ours: "
            f"{', '.join('@' + each for each in SYSTEM_PROMPTS)}"
        ) from error
