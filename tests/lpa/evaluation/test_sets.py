"""Prompt sets in the formats in which people have them; harmless texts stand in the place of harmful ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lpa.evaluation import evaluate
from lpa.evaluation.sets import Choice, PromptSet, load_set
from lpa.evaluation.suites import Settings
from tests.support.speakers import STAND_INS, random_model, tokenizer

ONE, TWO, THREE = STAND_INS[:3]
FORMATS: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, str]]]] = {
    # name -> (format, rows, (tag, prompt) of what is used as a harmful set)
    "HarmBench": (
        "HarmBench",
        [{"Behavior": ONE, "FunctionalCategory": "standard", "SemanticCategory": "x", "Tags": "", "ContextString": "",
          "BehaviorID": "a"},
         {"Behavior": TWO, "FunctionalCategory": "contextual", "SemanticCategory": "x", "Tags": "", "BehaviorID": "b",
          "ContextString": "A park."},
         {"Behavior": THREE, "FunctionalCategory": "copyright", "SemanticCategory": "x", "Tags": "", "BehaviorID": "c",
          "ContextString": ""}],
        [("standard", ONE), ("contextual", f"A park.\n\n---\n\n{TWO}")],
    ),
    "HarmBench on the hub": ("HarmBench", [{"prompt": ONE, "context": "A park.", "category": "x"}],
                             [("x", f"A park.\n\n---\n\n{ONE}")]),
    "JailbreakBench": (
        "JailbreakBench",
        [{"Index": 0, "Goal": ONE, "Target": "Sure", "Behavior": "a label", "Category": "x", "Source": "y"}],
        [("x", ONE)],
    ),
    "StrongREJECT": ("StrongREJECT", [{"category": "x", "source": "y", "forbidden_prompt": ONE}], [("x", ONE)]),
    "AdvBench": ("AdvBench", [{"goal": ONE, "target": "Sure"}], [("", ONE)]),
    "XSTest": (
        "XSTest",
        [{"id": 1, "prompt": ONE, "type": "homonyms", "label": "safe", "focus": "x", "note": ""},
         {"id": 2, "prompt": TWO, "type": "contrast_homonyms", "label": "unsafe", "focus": "x", "note": ""}],
        [("contrast_homonyms", TWO)],
    ),
    "XSTest without labels": (
        "XSTest",
        [{"id": 1, "type": "homonyms", "prompt": ONE, "focus": "x", "note": ""},
         {"id": 2, "type": "contrast_homonyms", "prompt": TWO, "focus": "x", "note": ""}],
        [("contrast_homonyms", TWO)],
    ),
    "OR-Bench": ("column prompt", [{"prompt": ONE, "category": "x"}], [("x", ONE)]),
    "WildGuard": (
        "column prompt",
        [{"prompt": ONE, "adversarial": "x", "prompt_harm_label": "unharmful"},
         {"prompt": TWO, "adversarial": "x", "prompt_harm_label": "harmful"}],
        [("", TWO)],
    ),
    "Dolly": (
        "Dolly",
        [{"instruction": ONE, "context": "A cat.", "response": "no", "category": "x"},
         {"instruction": TWO, "context": "", "response": "no", "category": "x"}],
        [("x", f"{ONE}\n\nA cat."), ("x", TWO)],
    ),
    "SORRY-Bench": ("SORRY-Bench", [{"question_id": 1, "category": "2", "turns": [ONE], "prompt_style": "base"}],
                    [("2", ONE)]),
    "Do-Not-Answer": (
        "Do-Not-Answer",
        [{"id": 1, "risk_area": "a", "types_of_harm": "x", "specific_harms": "b", "question": ONE, "GPT4_score": "no"}],
        [("x", ONE)],
    ),
    "Alpaca": (
        "Alpaca",
        [{"instruction": ONE, "input": "A cat.", "output": "no"}, {"instruction": TWO, "input": "", "output": "no"}],
        [("", f"{ONE}\n\nA cat."), ("", TWO)],
    ),
    "messages": (
        "messages",
        [{"messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": ONE},
                       {"role": "assistant", "content": "no"}]},
         {"messages": [{"role": "user", "content": [{"type": "text", "text": TWO}]}]}],
        [("", ONE), ("", TWO)],
    ),
    "a prompt of messages": ("column prompt", [{"prompt": [{"role": "user", "content": ONE}]}], [("", ONE)]),
    "a column": ("column question", [{"question": ONE, "answer": "no"}], [("", ONE)]),
}  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]], ending: str = ".jsonl", name: str = "own") -> str:
    path = folder / f"{name}{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def prompts(found: PromptSet) -> list[tuple[str, str]]:
    assert not found.reason
    return [(prompt.tag, prompt.text) for prompt in found.prompts]


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        (name, ending)
        for name in FORMATS
        for ending in (".jsonl", ".csv")
        if ending == ".jsonl" or "messages" not in name
    ],
)
def test_a_format_is_recognised_by_its_header(name: str, ending: str, tmp_path: Path) -> None:
    known, rows, expected = FORMATS[name]
    found = load_set(written(tmp_path, rows, ending))
    assert found.format == known
    assert prompts(found) == expected
    assert sum(found.left_out.values()) == len(rows) - len(expected)


@pytest.mark.parametrize("name", ["XSTest", "XSTest without labels"])
def test_labels_sort_the_rows_of_a_set(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, FORMATS[name][1])
    harmful, benign = load_set(path), load_set(path, harmful=False)
    assert prompts(harmful) == [("contrast_homonyms", TWO)]
    assert prompts(benign) == [("homonyms", ONE)]
    assert harmful.described()["left_out"] == {"safe": 1}
    assert benign.described()["left_out"] == {"unsafe": 1}
    assert (harmful.harmful, benign.harmful) == (True, False)
    assert harmful.name != benign.name, "their records lie in one file"
    only = load_set(written(tmp_path, FORMATS[name][1][:1], name="some"))
    assert only.reason == "some.jsonl holds no prompts (1 safe left out)"


def test_what_is_called_benign_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path, split, **how: [{"prompt": ONE, "category": "x"}])
    for name, choice in (("someone/or-bench", Choice(config="or-bench-hard-1k")),
                         ("JailbreakBench/JBB-Behaviors", Choice(config="behaviors", split="benign"))):  # fmt: skip
        assert "are benign and no harm; use --benign-set" in load_set(name, choice=choice).reason
        assert load_set(name, harmful=False, choice=choice).total == 1
    path = written(tmp_path, FORMATS["OR-Bench"][1], name="or-bench-80k")
    assert load_set(path).reason == "or-bench-80k.jsonl holds no prompts (1 safe left out)"
    assert load_set(path, harmful=False).total == 1
    assert load_set("someone/or-bench", choice=Choice(config="or-bench-toxic")).total == 1
    for name in ("harmbench", "jailbreakbench", "hex-phi"):
        assert "they are no benign set" in load_set(name, harmful=False).reason
    assert "the prompts are harmful; use --set" in load_set("someone/harmful_set", harmful=False).reason


def test_the_name_of_a_file_sorts_rows_that_do_not_say_what_they_are(tmp_path: Path) -> None:
    row = {"Index": 0, "Goal": ONE, "Target": "Sure", "Behavior": "a label", "Category": "x", "Source": "y"}
    folder = tmp_path / "JBB-Behaviors"
    folder.mkdir()
    benign = written(folder, [row | {"Goal": TWO}], ".csv", "benign-behaviors")
    written(folder, [row], ".csv", "harmful-behaviors")
    assert load_set(benign).reason == "benign-behaviors.csv holds no prompts (1 safe left out)"
    for harmful, text, why in ((True, ONE, "safe"), (False, TWO, "unsafe")):
        found = load_set(str(folder), harmful=harmful)
        assert (prompts(found), found.left_out) == ([("x", text)], {why: 1})
    saved = tmp_path / "harmful-set"
    DatasetDict({name: Dataset.from_list([{"prompt": ONE}]) for name in ("benign", "other")}).save_to_disk(saved)
    assert (
        load_set(str(saved), choice=Choice(split="benign")).reason == "harmful-set holds no prompts (1 safe left out)"
    )
    assert load_set(str(saved), choice=Choice(split="other")).total == 1
    labelled = written(tmp_path, [{"prompt": ONE, "label": "unsafe"}], name="safe_prompts")
    assert load_set(labelled).total == 1, "a row's own label comes first"
    (tmp_path / "benign.txt").write_text(ONE)
    assert "are benign and no harm; use --benign-set" in load_set(str(tmp_path / "benign.txt")).reason


def test_a_label_that_says_neither_safe_nor_harmful_is_an_error(tmp_path: Path) -> None:
    for column, label in (("label", 0), ("label", "odd"), ("prompt_harm_label", "odd")):
        path = written(tmp_path, [{"prompt": ONE, column: label}, {"prompt": TWO, column: 1}])
        told = load_set(path).reason
        assert told.startswith(f"own.jsonl row 1: {column}={label!r} is none of safe, benign, "), told
        assert f"--set-filter {column}=VALUE" in told
        assert prompts(load_set(path, choice=Choice(where={column: "1"}))) == [("", TWO)]
    path = written(tmp_path, [{"prompt": ONE, "label": "Harmless"}, {"prompt": TWO, "label": None}])
    assert prompts(load_set(path)) == [("", TWO)]


@pytest.mark.parametrize("column", ["is_safe", "Safe", "harmful", "is_harmful", "unsafe", "toxic", "toxicity"])
@pytest.mark.parametrize("words", [("true", "false"), (1, 0), ("Yes", "no"), (True, False), ("1.0", "0.0")])
def test_a_column_of_yes_and_no_sorts_the_rows_of_a_set(column: str, words: tuple[Any, Any], tmp_path: Path) -> None:
    yes, no = words if "safe" in column.lower() and column != "unsafe" else words[::-1]
    for ending in (".jsonl", ".csv"):
        path = written(tmp_path, [{"prompt": ONE, column: yes}, {"prompt": TWO, column: no}], ending)
        harmful, benign = load_set(path), load_set(path, harmful=False)
        assert (prompts(harmful), harmful.left_out) == ([("", TWO)], {"safe": 1})
        assert (prompts(benign), benign.left_out) == ([("", ONE)], {"unsafe": 1})


def test_a_column_of_yes_and_no_that_does_not_say_it_of_the_prompt_is_refused(tmp_path: Path) -> None:
    for rows, told in (
        ([{"prompt": ONE, "toxicity": 0.7}], "row 1: toxicity=0.7 is none of true, yes, 1"),
        ([{"prompt": ONE, "is_safe": "odd"}], "row 1: is_safe='odd' is none of true, yes, 1"),
        ([{"prompt": ONE, "is_safe": 1, "response": "x"}], "row 1: is_safe may be of the prompt or of the response"),
        ([{"prompt": ONE, "safe": 1, "toxic": 1}], "row 1: safe=1 and toxic=1 contradict each other"),
    ):
        path = written(tmp_path, rows)
        for harmful in (True, False):
            assert f"own.jsonl {told}" in load_set(path, harmful=harmful).reason
        column, value = list(rows[0].items())[1]
        if "contradict" not in told:
            assert f"--set-filter {column}=VALUE" in load_set(path).reason
        assert load_set(path, choice=Choice(where={column: str(value)})).total == 1
    path = written(tmp_path, [{"harmful": ONE, "topic": "x"}])
    assert load_set(path, choice=Choice(column="harmful")).total == 1, "the column of the prompts is no label"


@pytest.mark.parametrize("beside", ["context", "input"])
def test_text_beside_a_prompt_is_never_dropped_unasked(beside: str, tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": ONE, beside: ""}, {"prompt": TWO, beside: "A park."}])
    assert f"own.jsonl row 2: {beside} is not empty, and the prompt is prompt alone; " in load_set(path).reason
    assert prompts(load_set(path, choice=Choice(column="prompt"))) == [("", ONE), ("", TWO)]


def test_a_choice_that_a_set_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(ONE)
    table, folder = written(tmp_path, [{"prompt": ONE}]), tmp_path / "folder"
    folder.mkdir()
    written(folder, [{"prompt": ONE}], name="one")
    every = {"column": "prompt", "filter": {"prompt": ONE}, "split": "test", "config": "x"}
    for name, options in ((str(tmp_path / "own.txt"), every), ("harmbench", every), ("benign", every),
                          ("jailbreakbench", ("column", "split", "config")), (table, ("split", "config")),
                          (str(folder), ("split", "config"))):  # fmt: skip
        for option in options:
            choice = Choice(**{"where" if option == "filter" else option: every[option]})
            told = load_set(name, choice=choice).reason
            assert told.startswith(f"--set-{option} has no effect on {Path(name).name}; leave it out"), (told, name)
    written(folder, [{"prompt": TWO}], name="test")
    (folder / "one.jsonl").rename(folder / "train.jsonl")
    assert prompts(load_set(str(folder), choice=Choice(split="test"))) == [("", TWO)]


def test_a_choice_for_benign_sets_leaves_the_default_sets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lpa.evaluation import session

    asked: dict[str, Any] = {}

    def load(name: str, limit: int | None, harmful: bool = True, choice: Choice | None = None) -> PromptSet:
        asked[name] = choice
        return PromptSet(name, harmful, reason="not asked here")

    monkeypatch.setattr(session, "load_set", load)
    own = Choice(column="x")
    for sets, expected in (((), None), (("a.csv",), own)):
        asked.clear()
        evaluate(random_model(), tokenizer=tokenizer(), device="cpu", suites=["harm"], benign_sets=("b.csv",),
                 set_column="x", **({"sets": sets} if sets else {}))  # fmt: skip
        assert asked.pop("b.csv") == own
        assert all(choice == expected for name, choice in asked.items() if name != "benign")
        assert len(asked) == (2 if sets else 5)


def test_the_hub_is_asked_for_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **how: asked.append((path, how)) or [{"prompt": ONE, "x": "y"}]
    )
    load_set("someone/set@1234", choice=Choice(config="small", split="test"))
    load_set("jailbreakbench", choice=Choice(where={"x": "y"}))
    assert asked == [
        ("someone/set", {"split": "test", "name": "small", "revision": "1234"}),
        ("JailbreakBench/JBB-Behaviors", {"split": "harmful", "name": "behaviors"}),
    ]


def test_a_column_and_a_filter(tmp_path: Path) -> None:
    rows = [{"prompt": "no", "text": ONE, "lang": "en"}, {"prompt": "no", "text": TWO, "lang": "de"}]
    path = written(tmp_path, rows)
    assert "prompt and text could hold the prompts; say --set-column" in load_set(path).reason
    found = load_set(path, choice=Choice(column="text", where={"lang": "de"}))
    assert prompts(found) == [("", TWO)]
    assert found.left_out == {"filtered": 1}
    assert found.prompts[0].id == "own-0002"
    assert "has no column 'topic'; it has prompt, text, lang" in load_set(path, choice=Choice(column="topic")).reason
    missing = load_set(path, choice=Choice(column="text", where={"topic": "x"})).reason
    assert "--set-filter topic=...: own.jsonl has no such column" in missing
    with pytest.raises(ValueError, match=r"set_filter='lang' must be column=value"):
        Settings(set_filter=("lang",))
    assert Settings(set_filter=("lang=a=b",)).choice.where == {"lang": "a=b"}


def test_empty_prompts_are_counted_and_other_cells_refused(tmp_path: Path) -> None:
    found = load_set(written(tmp_path, [{"prompt": ONE}, {"prompt": None}, {"prompt": " "}, {"other": 1}]))
    assert prompts(found) == [("", ONE)]
    assert found.described()["left_out"] == {"empty": 3}
    for cell, told in ((7, "7 (int), not text"), ([ONE], "(list), not text"), ("\ud800", "half a character"),
                       ([{"role": "user", "content": ONE}] * 2, "a conversation of 2 user messages")):  # fmt: skip
        reason = load_set(written(tmp_path, [{"prompt": ONE}, {"prompt": cell}])).reason
        assert "own.jsonl row 2: " in reason
        assert told in reason


def test_a_text_that_a_file_repeats_is_asked_once(tmp_path: Path) -> None:
    rows = [{"prompt": ONE}, {"prompt": TWO}, {"prompt": ONE}]
    found = load_set(written(tmp_path, rows))
    assert [text for _, text in prompts(found)] == [ONE, TWO]
    assert found.total == 2
    assert found.described()["left_out"] == {"repeated": 1}
    assert len(load_set(written(tmp_path, rows), limit=2).prompts) == 2


def test_a_set_is_shown_with_one_row(tmp_path: Path) -> None:
    found = load_set(written(tmp_path, FORMATS["HarmBench"][1]))
    assert found.shown == (f"own: 2 of 2 prompts of own.jsonl (HarmBench), left out: 1 copyright; the first is {ONE!r}")


def test_benign_sets_are_measured_and_never_counted_as_harm(tmp_path: Path) -> None:
    path, told = written(tmp_path, FORMATS["XSTest"][1], name="xstest"), []
    found = evaluate(
        random_model(), tokenizer=tokenizer(), device="cpu", suites=["harm", "overrefusal", "attacks"],
        attacks=("direct",), sets=(path,), benign_sets=(path,), limit=4, max_new_tokens=4, tell=told.append,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in told] == ["xstest", "xstest (benign)"]
    by = {(row.suite, row.metric): row for row in found.rows if row.set == "xstest (benign)"}
    assert set(by) == {("harm", "benign error"), ("overrefusal", "not done")}
    assert all(row.n == 1 for row in by.values())
    assert {row.n for row in found.rows if row.set == "xstest" and row.metric in ("harm error", "done: direct")} == {1}
    assert found.info["data"]["xstest (benign)"]["left_out"] == {"unsafe": 1}


def test_a_benchmark_of_harm_is_no_benign_set_unless_its_name_says_so(tmp_path: Path) -> None:
    for header in ("Behavior,FunctionalCategory", "forbidden_prompt,category", "goal,target", "question,types_of_harm"):
        for name, usable in (("mine.csv", False), ("benign-mine.csv", True)):
            file = tmp_path / name
            file.write_text(f"{header}\nBake a cake,standard\n")
            found = load_set(str(file), harmful=False)
            assert (len(found.prompts) == 1) == usable, (header, name)
