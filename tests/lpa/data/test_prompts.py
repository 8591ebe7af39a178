"""System prompts: by name, by file and as text; anything else is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpa.data import ASSESSMENT_PROMPT, SYSTEM_PROMPTS, DataError, system_prompt_text
from tests.support.tiny import tiny_config


def test_a_name_a_file_and_a_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Tell me, héros.\n", encoding="utf-8")
    assert system_prompt_text(f"@{file}") == "Tell me, héros."
    assert system_prompt_text("@one-line") == ASSESSMENT_PROMPT
    for text in (None, "", "Mail me @home."):
        assert system_prompt_text(text) == text


def test_a_settings_object_holds_the_text(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, system_prompt="@self-assessment", benign_system_prompt="@plain")
    assert config.system_prompt == SYSTEM_PROMPTS["self-assessment"]
    assert config.own_settings["benign_system_prompt"] == SYSTEM_PROMPTS["plain"]


def test_the_refusal_is_offered_by_one_of_the_two_self_assessments() -> None:
    plain, offered = SYSTEM_PROMPTS["self-assessment"], SYSTEM_PROMPTS["self-assessment-or-refusal"]
    assert offered.startswith(plain)
    assert "decline" in offered.removeprefix(plain)
    assert "decline" not in plain


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.txt' is neither a readable file of UTF-8 text .* @self-assessment"):
        system_prompt_text(f"@{file}")
