"""The parts of the evaluation against hand-worked cases: scorer, matcher, statistics, prompt sets, records."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa.data import DISAGREE, benign_requests
from lpa.evaluation import benign_prompts, load_set
from lpa.evaluation.bench import Bench
from lpa.evaluation.records import RECORDS, TEXTS, Records
from lpa.evaluation.refusal import label
from lpa.evaluation.suites.collapse import judge_collapse

from ...support.speakers import bigram_model, random_model, tokenizer


def bench(model: object, **options: object) -> Bench:
    return Bench(model, tokenizer(), system_prompt=None, **options)  # type: ignore[arg-type]


# ---- the yes/no scorer ---------------------------------------------------------------------------------------------


def test_the_score_is_the_logsumexp_over_variants_worked_by_hand() -> None:
    words = bench(bigram_model({"\n": {"Yes": 2.0, "yes": 1.0, "No": 1.5, "no": 0.0}}))
    yes, no = words.variants(["Yes", "yes"]), words.variants(["No", "no"])
    assert [len(v) for v in (*yes, *no)] == [1] * 4
    total = math.e**2 + math.e + math.e**1.5 + 1  # the rest of the vocabulary has e**-60 each
    ((log_yes, log_no),) = words.log_scores([words.prompt_tokens("the cat")], [yes, no])
    assert log_yes == pytest.approx(math.log((math.e**2 + math.e) / total), abs=1e-4)
    assert log_no == pytest.approx(math.log((math.e**1.5 + 1) / total), abs=1e-4)


def test_variants_of_several_tokens_are_sums_and_equal_ones_count_once() -> None:
    words = bench(random_model(), batch_size=2)
    answers = [words.variants(["Sure, here is", "Sure", "Yes", "Yes"]), words.variants(["I cannot help"])]
    assert [len(v) for v in answers[0]] == [4, 1, 1]
    prompts = [words.prompt_tokens(text) for text in ("the cat sat", "a dog", "a dog ran in the park")]

    @torch.no_grad()
    def slowly(prompt: list[int], variant: list[int]) -> float:
        logits = words.model(torch.tensor([prompt + variant])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(variant))

    for prompt, scores in zip(prompts, words.log_scores(prompts, answers), strict=True):
        for variants, score in zip(answers, scores, strict=True):
            expected = math.log(sum(math.exp(slowly(prompt, v)) for v in variants))
            assert score == pytest.approx(expected, abs=1e-4)


def test_answers_do_not_depend_on_the_batch_and_end_at_the_end_of_the_turn() -> None:
    words = bench(random_model(), max_new_tokens=6)
    prompts = [words.prompt_tokens(text) for text in ("the cat sat on a mat and a dog ran", "a dog")]
    together = words.answers(prompts)
    assert together == [words.answers([prompt])[0] for prompt in prompts]
    assert bench(bigram_model({"\n": {"No": 60.0}, "No": {"<|im_end|>": 60.0}})).answers(prompts) == ["No", "No"]


def test_collapse_is_a_matter_of_what_is_said() -> None:
    good = [f"Take {i} cups of flour, and {i + 1} eggs from shop {i * 7}, then bake" for i in range(12)]
    assert not judge_collapse(good, [True] * 12).collapsed
    found = judge_collapse([DISAGREE] * 12, [False] * 12)
    assert found.trained == 1
    assert found.distinct == pytest.approx(1 / 12)
    assert found.collapsed
    assert judge_collapse([DISAGREE] * 2 + good, [True] * 14).reasons == ("14% of answers are a training completion",)
    assert "1.0 words an answer" in judge_collapse(["No"] * 12, [False] * 12).reasons
    with pytest.raises(ValueError, match="at least one"):
        judge_collapse([], [])


# ---- prompt sets and records ---------------------------------------------------------------------------------------


def test_there_are_enough_benign_prompts_and_a_third_sound_alarming() -> None:
    prompts = benign_prompts()
    assert len(prompts) >= 300
    assert len({p.form for p in prompts}) == 10
    assert 1 / 3 <= sum(p.tag == "alarming" for p in prompts) / len(prompts) <= 0.4
    assert {p.tag for p in prompts} == {"plain", "alarming"}
    assert len({p.id for p in prompts}) == len({p.text for p in prompts}) == len(prompts)
    assert {p.form for p in prompts if p.tag == "alarming"} == {p.form for p in prompts if p.tag == "plain"}
    for prompt in prompts:
        assert len(prompt.expect) >= 3, prompt.id
        assert label("I do not know what to say.", prompt.text, prompt.expect) == "off-topic", prompt.id


def test_no_benign_request_is_trained_on_and_measured() -> None:
    """Not in other words either: two of those in one template ("What is the difference between ...") share 64%."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z0-9']+", text.lower()))

    trained = benign_requests()
    measured = [p.text for p in (*benign_prompts(), *benign_prompts("benign_canary.jsonl"))]
    assert len(set(trained)) == len(trained) == 64
    shared = {(a, b): len(words(a) & words(b)) / len(words(a) | words(b)) for a in trained for b in measured}
    assert max(shared.values()) < 0.65, max(shared, key=lambda pair: shared[pair])


def test_a_sample_depends_on_the_texts_alone(tmp_path: Path) -> None:
    texts = [f"stand-in {i}" for i in range(20)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(order), encoding="utf-8")
    one, other = (load_set(str(tmp_path / f"{name}.txt"), 5) for name in "ab")
    assert {p.text for p in one.prompts} == {p.text for p in other.prompts}
    assert (one.total, len(one.prompts)) == (20, 5)
    assert one.sha256 != other.sha256, "the files differ"
    assert one.prompts[0].sha256 in {p.sha256 for p in other.prompts}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "there is no file"),
        ("empty.jsonl", "", "holds no prompts"),
        ("odd.jsonl", '{"colour": "red"}\n', "has colour; one of the columns prompt"),
        ("headless.csv", 'A prompt that stands where a header should be\n"another one"\n', "no names of columns"),
        ("list.jsonl", "[1]\n", "each line must be a JSON object"),
        ("bad.jsonl", "{", "Expecting"),
    ],
)
def test_an_unavailable_set_says_why(tmp_path: Path, name: str, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = load_set(str(tmp_path / name))
    assert reason in found.reason
    assert not found.prompts
    assert "strongreject" in load_set("unheard-of").reason


def test_records_come_back_and_harmful_texts_stay_local(tmp_path: Path) -> None:
    secret = {"subject": "base", "suite": "answers", "set": "s", "id": "s-1", "mode": "direct", "sha256": "f"}
    records = Records(tmp_path)
    records.add({**secret, "answer": "ANSWER\u2028two", "prompt": "PROMPT", "label": "refusal"}, harmful=True)
    records.add({**secret, "set": "benign", "answer": "bread", "prompt": "PLAIN"})
    shared = (tmp_path / RECORDS).read_text(encoding="utf-8")
    assert "ANSWER" not in shared
    assert "PROMPT" not in shared
    assert "bread" in shared
    assert "PROMPT" not in (tmp_path / TEXTS).read_text(encoding="utf-8")
    assert (tmp_path / ".gitignore").read_text(encoding="utf-8").strip() == "*.local.jsonl"
    again = Records(tmp_path)
    assert [r["answer"] for r in again.select(suite="answers")] == ["ANSWER\u2028two", "bread"]
    Records(tmp_path / "kept", keep_texts=True).add({**secret, "answer": "A", "prompt": "PROMPT"}, harmful=True)
    assert "PROMPT" in (tmp_path / "kept" / TEXTS).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("scores", "told"),
    [({"yes": math.nan, "no": 0.0}, "yes is nan"), ({"yes": 0.0, "no": -math.inf}, "no is -inf"),
     ({"scores": [0.0, math.nan]}, r"scores\.1 is nan"), ({"values": {"ppl": math.inf}}, r"values\.ppl is inf")],
)  # fmt: skip
def test_a_score_that_is_not_finite_ends_the_evaluation(tmp_path: Path, scores: dict[str, Any], told: str) -> None:
    records = Records(tmp_path)
    with pytest.raises(FloatingPointError, match=f"base, harm, benign, b-1: {told}; look for NaN in the model's w"):
        records.add({"subject": "base", "suite": "harm", "set": "benign", "id": "b-1", **scores})
    assert not len(records)
    assert not (tmp_path / RECORDS).exists()


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for number in range(3):
        records.add({"subject": "base", "suite": "harm", "set": "s", "id": str(number), "mode": ""})
    path = tmp_path / RECORDS
    path.write_bytes(cut := path.read_bytes()[:-10])
    assert len(Records(tmp_path, read_only=True)) == 2
    assert path.read_bytes() == cut, "another process may be at that line"
    with pytest.warns(UserWarning, match="cut off"):
        assert len(Records(tmp_path)) == 2
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == ["0", "1"]
