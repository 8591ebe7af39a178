"""The ladder of attacks: each rung by hand on tiny models, and the suite from end to end, after a stop too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lpa.data import PLAIN_PROMPT, DataError
from lpa.evaluation import Evaluation, evaluate
from lpa.evaluation.bench import Bench
from lpa.evaluation.records import Records
from lpa.evaluation.rungs import ablated, eroding, refusal_directions, respelt, soft_suffix, template_tail
from lpa.evaluation.sets import Prompt, PromptSet
from lpa.evaluation.suites.attacks import TARGET
from lpa.evaluation.suites.base import Run, Settings
from lpa.evaluation.suites.ladder import _CLIMB, Ladder
from lpa_kernels.model import decoder_layers, hidden_of

from ...support.speakers import STAND_INS, adapter, random_model, tokenizer

PROMPTS = ["the cat sat on a mat", "a dog ran in the park"]


def bench(model: Any = None, **options: Any) -> Bench:
    return Bench(model or random_model(), tokenizer(), system_prompt=None, **({"max_new_tokens": 8} | options))


def tokens(words: Bench, texts: list[str]) -> list[list[int]]:
    return [words.prompt_tokens(text) for text in texts]


# ---- the rungs -----------------------------------------------------------------------------------------------------


def test_the_tail_is_what_the_template_puts_after_the_users_text() -> None:
    words = bench()
    tail = words.tokenizer.decode(words.prompt_tokens("the cat")[-template_tail(words) :])
    assert tail == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_soft_suffix_makes_the_target_the_answer_and_leaves_the_model_alone() -> None:
    words = bench()
    before = {name: value.clone() for name, value in words.model.state_dict().items()}
    (target,) = words.variants(["Sure, here is"])
    prompts = tokens(words, PROMPTS)
    start, first = soft_suffix(words, prompts, target, size=8, steps=1, rate=1e-9, seed=0)
    rows, losses = soft_suffix(words, prompts, target, size=8, steps=150, rate=0.1, seed=0)
    assert [len(row) for row in rows] == [len(prompt) + 8 for prompt in prompts]
    assert all(last < 0.5 < early for last, early in zip(losses, first, strict=True))
    assert all(answer.startswith("Sure, here is") for answer in words.answers_to(rows))
    assert not any(answer.startswith("Sure, here is") for answer in words.answers_to(start))
    tail = template_tail(words)
    embedded = words.model.get_input_embeddings()(torch.tensor(prompts[0]))
    assert torch.equal(rows[0][: len(prompts[0]) - tail], embedded[:-tail]), "the prompt is as it was"
    assert torch.equal(rows[0][-tail:], embedded[-tail:])
    assert all(torch.equal(value, before[name]) for name, value in words.model.state_dict().items())
    again, _ = soft_suffix(words, prompts, target, size=8, steps=1, rate=1e-9, seed=0)
    assert torch.equal(start[0], again[0])


def test_answers_to_embeddings_are_those_to_their_tokens() -> None:
    words = bench()
    prompts = tokens(words, [*PROMPTS, "the mat"])
    embedded = [words.model.get_input_embeddings()(torch.tensor(prompt)).detach() for prompt in prompts]
    assert words.answers_to(embedded) == words.answers(prompts)


def test_refusal_directions_are_differences_of_means_and_are_projected_out() -> None:
    words = bench(batch_size=2)
    harmful, benign = tokens(words, STAND_INS[:3]), tokens(words, [*PROMPTS, "the mat"])
    found = refusal_directions(words, harmful, benign)
    model, number = words.model, 1
    with torch.no_grad():
        last = [[model(torch.tensor([p]), output_hidden_states=True).hidden_states[number + 1][0, -1] for p in group]
                for group in (harmful, benign)]  # fmt: skip
    gap = torch.stack(last[0]).mean(0) - torch.stack(last[1]).mean(0)
    assert torch.allclose(found[number], gap / gap.norm(), atol=1e-4)
    seen: list[torch.Tensor] = []
    plain = model(torch.tensor([harmful[0]])).logits
    with torch.no_grad(), ablated(model, found):
        hook = decoder_layers(model)[number].register_forward_hook(lambda m, i, out: seen.append(hidden_of(out)))
        changed = model(torch.tensor([harmful[0]])).logits
        hook.remove()
    assert float((seen[0] @ found[number]).abs().max()) < 1e-4
    assert not torch.allclose(plain, changed, atol=1e-3)
    assert torch.equal(model(torch.tensor([harmful[0]])).logits, plain), "nothing is left on the model"


def test_fine_tuning_learns_the_rows_and_is_gone_afterwards() -> None:
    words = bench()
    (target,) = words.variants(["Sure, here is"])
    rows = [(prompt, target) for prompt in tokens(words, STAND_INS)]
    plain = words.answers([row[0] for row in rows[:2]])
    with eroding(words, rows, rate=1e-2, batch=4) as train:
        assert words.answers([row[0] for row in rows[:2]]) == plain, "no update, no change"
        train(60)
        assert all(answer.startswith("Sure, here is") for answer in words.answers([row[0] for row in rows[:2]]))
    assert words.answers([row[0] for row in rows[:2]]) == plain
    assert not any(p.grad is not None for p in words.model.parameters())


def test_respelling_keeps_the_words_ends_and_is_drawn_by_its_seed() -> None:
    text = "Tell a wonderful story about penguins in Antarctica"
    assert respelt(text, "1") == respelt(text, "1") != respelt(text, "2")
    changed = respelt(text, "3")
    assert len(changed) == len(text)
    assert changed.lower() != text.lower()
    same = sum(a == b for a, b in zip(sorted(changed.lower()), sorted(text.lower()), strict=True))
    assert same > len(text) / 2, "most letters are the same ones"
    assert respelt("of it", "4").lower().count("t") <= 2


# ---- the suite -----------------------------------------------------------------------------------------------------


@pytest.fixture
def harmful(tmp_path: Path) -> str:
    """A file of harmless prompts in the place of a harmful set."""
    path = tmp_path / "standins.jsonl"
    texts = [f"{text} {number}" for text in STAND_INS for number in "ab"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def climb(harmful: str, **options: Any) -> Evaluation:
    chosen: dict[str, Any] = {
        "sets": (harmful,), "limit": 16, "max_new_tokens": 6, "suites": ["ladder"], "ladder_limit": 3,
        "suffix_steps": 2, "erosion_steps": (1, 2), "best_of": 2, "benign_limit": 12,
    }  # fmt: skip
    return evaluate(random_model(), tokenizer=tokenizer(), device="cpu", **(chosen | options))


def test_every_rung_is_climbed_by_the_base_model_too(harmful: str, tmp_path: Path) -> None:
    found = climb(harmful, adapters={"lpa": adapter(tmp_path / "a", 1)}, output=tmp_path / "out")
    modes = {"direct", "suffix", "ablation", "best-of-n", "erosion:harmful 1", "erosion:harmful 2"}
    for subject in ("base", "lpa"):
        records = found.records.select(subject=subject, suite="answers", set="standins")
        assert {r["mode"] for r in records} >= modes
        assert all(sum(r["mode"] == mode for r in records) == 3 for mode in modes)
        assert found.value(subject, "ladder", "done: suffix", "standins") is not None
        assert found.value(subject, "ladder", "done: worst case", "standins") is not None
    curve = [row for row in found.rows if row.extra.get("erosion") == "harmful"]
    assert [(row.subject, row.extra["updates"]) for row in curve] == [
        ("base", 1), ("base", 2), ("lpa", 1), ("lpa", 2),
    ]  # fmt: skip
    records = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8")
    again = climb(harmful, adapters={"lpa": tmp_path / "a"}, output=tmp_path / "out")
    assert (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8") == records, "nothing is asked again"
    assert again.rows == found.rows


def test_erosion_by_harmful_rows_learns_the_models_own_answers_after_a_compliant_beginning(
    harmful: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beginning alone, the same in each row, is all that the model would say."""
    learnt: list[Any] = []

    @contextmanager
    def kept(words: Bench, rows: Any, **options: Any) -> Iterator[Any]:
        learnt.append(rows)
        yield lambda updates: None

    monkeypatch.setattr("lpa.evaluation.suites.ladder.eroding", kept)
    climb(harmful, ladder=("erosion",))
    words, rows = Bench(random_model(), tokenizer(), system_prompt=PLAIN_PROMPT, max_new_tokens=6), learnt[0]
    texts = [json.loads(line)["prompt"] for line in Path(harmful).read_text(encoding="utf-8").splitlines()]
    asked = {tuple(words.prompt_tokens(text)): text for text in texts}
    learnt_from = [asked[tuple(prompt)] for prompt, _ in rows]
    assert len(learnt_from) == 13  # the three that are measured are not learnt from
    own = words.answers([words.prompt_tokens(text, TARGET) for text in learnt_from[:4]])
    assert all(own)
    assert [done for _, done in rows[:4]] == [words.variants([f"{TARGET}\n{answer}"])[0] for answer in own]


def test_the_ladder_is_climbed_only_when_it_is_named(harmful: str) -> None:
    found = evaluate(random_model(), tokenizer=tokenizer(), device="cpu", sets=(harmful,), limit=2, max_new_tokens=6,
                     attacks=("direct",), epsilons=(), steps=(), utility_sets=())  # fmt: skip
    assert not found.records.select(suite="answers", mode="suffix")
    assert "ladder" not in found.info["suites"]


def test_a_rung_without_examples_says_so(harmful: str) -> None:
    found = climb(harmful, ladder_limit=16, ladder=("ablation", "erosion"))
    notes = {row.metric: row.note for row in found.rows if row.suite == "ladder" and row.value is None}
    assert notes["done: ablation"] == "0 other prompts to learn from, 8 are needed; raise limit"
    assert notes["done: erosion:harmful 1"] == "0 other prompts to learn from, 8 are needed; raise limit"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ladder": ("rope",)}, "rope.*are unknown"),
        ({"erosion_steps": (4, 2)}, "must grow from 1"),
        ({"suffix_tokens": 0}, "suffix_tokens=0 must be at least 1"),
    ],
)
def test_bad_settings_of_the_ladder_are_named(options: dict[str, Any], told: str, harmful: str) -> None:
    with pytest.raises(ValueError, match=told):
        climb(harmful, **options)


def test_gcg_is_nanogcgs_where_it_is_installed(harmful: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    found = climb(harmful, ladder=("gcg",))
    assert "pip install --no-deps nanogcg" in next(r.note for r in found.rows if r.metric == "done: gcg")

    seen: list[tuple[Any, str]] = []

    def run(model: Any, tokenizer: Any, messages: Any, target: str, config: Any) -> Any:
        seen.append((messages, target))
        return SimpleNamespace(best_string="the cat sat", best_loss=1.0)

    fake = SimpleNamespace(run=run, GCGConfig=lambda **values: SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "nanogcg", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "nanogcg" or None)
    found = climb(harmful, ladder=("gcg",), system_prompt=None)
    assert [target for _, target in seen] == [TARGET] * 3
    assert all(turns[-1]["content"].endswith(" {optim_str}") for turns, _ in seen)
    assert len(found.records.select(suite="answers", set="standins", mode="gcg")) == 3

    records = Records()
    records.add({"subject": "base", "suite": "ladder", "set": "s", "id": "-", "mode": "gcg", "reason": "not installed"})
    records.add({"subject": "base", "suite": "answers", "set": "s", "id": "s-1", "mode": "gcg", "label": "compliance"})
    rows = Ladder().rows(records, "base", Settings(sets=("s",), ladder=("gcg",)))
    assert [(row.metric, row.value) for row in rows] == [("done: gcg", 1.0)], "it has been installed since"


@pytest.mark.parametrize("rung", ["best-of-n", "gcg"])
def test_a_prompt_that_an_attack_makes_too_long_is_recorded(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PromptSet("s", True, (Prompt("s-1", "about a cat"), Prompt("s-2", "about a dog"), Prompt("s-3", "a bird")))

    def prompt_tokens(text: str, *rest: Any) -> list[int]:
        if "LONG" in text:
            raise DataError("too long")
        return [1]

    def longer(text: str, seed: str) -> str:  # the dog's after the first try, the bird's always
        return "LONG" if "bird" in text or ("dog" in text and not seed.endswith(" 1")) else text

    monkeypatch.setattr("lpa.evaluation.suites.ladder.respelt", longer)
    fake = SimpleNamespace(run=lambda *own: SimpleNamespace(best_string="LONG", best_loss=1.0), GCGConfig=dict)
    monkeypatch.setitem(sys.modules, "nanogcg", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "nanogcg" or None)
    words = SimpleNamespace(batch_size=4, model=None, tokenizer=None, prompt_tokens=prompt_tokens,
                            answers=lambda tokens: ["I can't help with that."] * len(tokens))  # fmt: skip
    run = Run("base", cast(Bench, words), Settings(sets=("s",), best_of=3), Records(), asked, [asked])
    _CLIMB[rung](run, asked, ())
    found = {r["id"]: (r.get("label"), r.get("tries"), "error" in r) for r in run.records.select(mode=rung)}
    if rung == "gcg":
        assert found == dict.fromkeys(("s-1", "s-2", "s-3"), (None, None, True))
    else:
        assert found == {"s-1": ("refusal", 3, False), "s-2": ("refusal", 1, False), "s-3": (None, None, True)}
