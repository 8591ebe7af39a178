"""Generated utility: what is taken of an answer in words, and that one sentence to everything is worth nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lpa.data import questions
from lpa.evaluation import evaluate
from lpa.evaluation.bench import Bench
from lpa.evaluation.stats import wilson
from lpa.evaluation.suites.utility import GENERATED, first_choice, the_number

from ...support.speakers import random_model, speaker, tokenizer

CITIES = ["London", "Rome", "Paris", "New York"]
OPTIONS: dict[str, Any] = {"suites": ["utility"], "utility_sets": ("arithmetic", "knowledge"), "device": "cpu",
                           "max_new_tokens": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "number"),
    [("7", 7), ("He has 3 + 4 = 7 apples.", 7), ("That is $1,250.", 1250), ("It is -2.5 degrees.", -2.5),
     ("3 + 4 = 7, for 2 friends", 7), ("of 7 apples 3 are red", 3), ("seven", None), ("", None)],
)  # fmt: skip
def test_which_number_counts(answer: str, number: float | None) -> None:
    assert the_number(answer) == number


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("The capital is Paris, not Rome.", "Paris"), ("It is new york.", "New York"), ("Rome. Or Paris?", "Rome"),
     ("A city in the north", None), ("Parisian", None), ("I do not agree with this statement.", None), ("", None)],
)  # fmt: skip
def test_the_first_choice_named_counts(answer: str, choice: str | None) -> None:
    assert first_choice(answer, CITIES) == choice


def test_the_shipped_questions_can_be_answered() -> None:
    rows = questions()
    assert Counter(row["kind"] for row in rows) == {"arithmetic": 60, "knowledge": 60}
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == 120
    own = [row for row in rows if row["kind"] == "knowledge"]
    places = Counter(row["choices"].index(row["answer"]) for row in own)
    assert places == dict.fromkeys(range(4), 15)
    for row in own:
        assert len(set(row["choices"])) == 4
        assert first_choice(row["question"], [row["answer"]]) is None, row["id"]  # its question does not give it away
    for row in rows:
        if row["kind"] == "arithmetic":
            assert float(row["answer"]) != the_number(row["question"]), row["id"]


def test_one_sentence_to_everything_is_worth_nothing() -> None:
    found = evaluate(
        speaker("I do not agree with this statement."), tokenizer=tokenizer(), **OPTIONS | {"max_new_tokens": 10}
    )
    assert found.value("base", "utility", GENERATED, "arithmetic") == 0
    assert found.value("base", "utility", GENERATED, "knowledge") == 0


def test_answers_are_scored_one_by_one_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = {row["question"]: row for row in questions()}
    asked: list[str] = []
    tokens = Bench.prompt_tokens

    def noted(self: Bench, prompt: str, *args: Any, **kwargs: Any) -> list[int]:
        asked.append(prompt)
        return tokens(self, "the cat", *args, **kwargs)

    def answers(self: Bench, prompts: Any, *_: Any) -> list[str]:
        own = [solved[text.split("\n")[0]] for text in asked[-len(prompts) :]]
        return [f"It is {row['answer']}." if row["id"] <= "a45" or row["id"] > "k30" else "No." for row in own]

    monkeypatch.setattr(Bench, "prompt_tokens", noted)
    monkeypatch.setattr(Bench, "answers", answers)
    found = evaluate(random_model(), tokenizer=tokenizer(), **OPTIONS)
    for name, right in (("arithmetic", 45), ("knowledge", 30)):
        row = next(row for row in found.rows if row.set == name)
        assert (row.value, row.n, row.unit, row.good) == (right / 60, 60, "%", "up")
        assert (row.low, row.high) == wilson(right, 60)
        assert {r["answer"]: r["right"] for r in found.records.select(set=name)}["No."] is False
        assert found.info["data"][name] | {"sha256": ""} == {
            "source": "lpa/data/questions.jsonl", "rows": 60, "used": 60, "sha256": ""}  # fmt: skip
