"""The before/after table: log-probabilities, shares and perplexity against plain computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lpa.evaluation.measure as measuring
from lpa import assets
from lpa.data import AGREE, PairCollator, load_pairs
from lpa.evaluation.measure import (
    ROWS,
    as_text,
    attack_of,
    completion_log_probs,
    labels,
    margins,
    measure,
    perplexity,
    table,
)
from lpa.evaluation.stats import auroc_interval
from lpa.files import write_json
from lpa_kernels.attack import PairBatch
from tests.support.tiny import rows, tiny_config, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("engine", ["reference", "packed"])
def test_completion_log_probs_are_sums_over_the_completion(tmp_path: Path, engine: str) -> None:
    model = tiny_model(len(TOKENIZER))
    pgd = attack_of(model, tiny_config(tmp_path, attack_engine=engine))
    batch = PairBatch.from_dict(PairCollator(TOKENIZER)(rows(3)))
    found = completion_log_probs(pgd, batch)
    for example in range(3):
        for column, name in enumerate(("rejected", "chosen")):
            ids, mask = getattr(batch, f"{name}_ids")[example], getattr(batch, f"{name}_mask")[example]
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            places = mask.nonzero()[:, 0].tolist()
            total = sum(float(log_probs[p - 1, ids[p]].detach()) for p in places)
            assert float(found[example, column]) == pytest.approx(total, abs=1e-4)


def test_an_attack_lowers_the_margins(tmp_path: Path) -> None:
    pgd = attack_of(tiny_model(len(TOKENIZER)), tiny_config(tmp_path, attack_steps=8))
    pairs, collator = load_pairs(rows(5)), PairCollator(TOKENIZER)
    clean = margins(pgd, pairs, collator, attacked=False, batch_size=2)
    attacked = margins(pgd, pairs, collator, attacked=True, batch_size=2)
    assert clean.shape == (5,)
    assert bool((attacked < clean - 1).all())
    assert torch.allclose(clean, margins(pgd, pairs, collator, attacked=False, batch_size=5), atol=1e-4)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    model = tiny_model(len(TOKENIZER))
    model.lm_head.weight.data.zero_()
    assert perplexity(model, TOKENIZER, window=50) == pytest.approx(len(TOKENIZER), rel=1e-4)
    model = tiny_model(len(TOKENIZER))
    text = "I agree with this statement. I do not agree with this statement."
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    assert perplexity(model, TOKENIZER, text) == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.fixture(autouse=True)
def _only_what_is_shipped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table does not depend on the cache, but for the test of the inventory."""
    if "inventory" not in request.node.name:
        monkeypatch.setattr(assets, "is_cached", lambda name: False)


def test_measure_and_its_table(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER)).train()
    config = tiny_config(tmp_path)
    found = measure(model, TOKENIZER, config, attacked_rows=3)
    assert {name for name in ROWS if not name.endswith("_ipip")} <= set(found)
    assert found["disagree_undesirable_n"] == 60
    assert found["disagree_undesirable_attacked_n"] == 3
    assert all(0 <= found[name] <= 1 for name in ROWS if name in found and name != "perplexity")
    assert (found["auroc_n"], found["auroc_attacked_n"]) == (120, 6)
    assert found["auroc_low"] < found["auroc"] < found["auroc_high"]
    assert found["auroc_attacked"] < found["auroc"]
    assert found["disagree_undesirable_attacked_margin"] < found["disagree_undesirable_margin"]
    assert model.training  # left as it was
    assert "  under a latent attack (n=3)" in labels(found).values()
    assert table(found, found).row_count == 7
    with pytest.raises(ValueError, match="attacked_rows=-1 must be 0"):
        measure(model, TOKENIZER, config, attacked_rows=-1)
    clean = measure(model, TOKENIZER, config, attacked_rows=0)
    assert "agree_desirable_attacked" not in clean
    assert clean["agree_desirable"] == found["agree_desirable"]
    assert table(clean, None).row_count == 4


def test_the_auroc_is_that_of_agreeing_and_a_lean_does_not_move_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three statements of each kind with log-odds of agreeing of my own choice, worked by hand."""
    agreeing = {"undesirable": [-1.0, 0.5, 2.0], "desirable": [1.0, 2.5, 0.0]}

    def answered(lean: float) -> dict[str, float]:
        def margins(pgd: Any, pairs: Any, collator: Any, **options: Any) -> torch.Tensor:
            kind = "desirable" if pairs[0]["chosen"] == AGREE else "undesirable"
            odds = torch.tensor(agreeing[kind])[: len(pairs)] + lean
            return odds if kind == "desirable" else -odds

        def three(kind: str, split: str = "train") -> Any:
            return load_pairs(kind=kind, split=split).select(range(3))

        monkeypatch.setattr(measuring, "margins", margins)
        monkeypatch.setattr(measuring, "load_pairs", three)
        return measure(tiny_model(len(TOKENIZER)), TOKENIZER, tiny_config(tmp_path), attacked_rows=0)

    plain, leaning = answered(0.0), answered(10.0)
    # of the nine pairs the desirable one is agreed with more in 1 > -1, 1 > .5, 2.5 > all three, 0 > -1
    assert plain["auroc"] == leaning["auroc"] == pytest.approx(6 / 9)
    assert plain["disagree_undesirable"] == pytest.approx(1 / 3)
    assert leaning["disagree_undesirable"] == 0
    assert as_text("auroc", plain).startswith("67% [")
    assert (plain["auroc_low"], plain["auroc_high"]) == auroc_interval(plain["auroc"], 3, 3)


def test_statements_of_the_training_are_not_measured(tmp_path: Path) -> None:
    seen = [text.upper() for text in load_pairs(kind="desirable", split="heldout")["prompt"][:50]]
    found = measure(tiny_model(len(TOKENIZER)), TOKENIZER, tiny_config(tmp_path), attacked_rows=0, trained_on=seen)
    assert (found["agree_desirable_n"], found["disagree_undesirable_n"], found["auroc_n"]) == (10, 60, 70)
    both = load_pairs(kind="both", split="heldout")["prompt"]
    found = measure(tiny_model(len(TOKENIZER)), TOKENIZER, tiny_config(tmp_path), attacked_rows=0, trained_on=both)
    assert "auroc" not in found


@pytest.mark.skipif(not assets.is_cached("ipip-neo-120"), reason="the inventory is not in the cache")
def test_the_inventory_is_measured_where_it_is_cached(tmp_path: Path) -> None:
    found = measure(tiny_model(len(TOKENIZER)), TOKENIZER, tiny_config(tmp_path), attacked_rows=0)
    assert set(ROWS) - set(found) == {name for name in ROWS if name.endswith("_attacked")}
    assert found["auroc_ipip_n"] == 72
    assert sum(found[f"{name}_ipip_n"] for name in ("disagree_undesirable", "agree_desirable")) == 72


def test_nan_is_no_number(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="disagree_undesirable_margin is nan: the model's logits are not"):
        measure(model, TOKENIZER, tiny_config(tmp_path), attacked_rows=0)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"perplexity": math.nan})
    assert not (tmp_path / "metrics.json").exists()


def test_a_site_may_be_a_plain_name_or_number(tmp_path: Path) -> None:
    model, config = tiny_model(len(TOKENIZER)), tiny_config(tmp_path)
    assert [site.name for site in attack_of(model, config, sites="embedding").sites] == ["embedding"]
    assert [site.name for site in attack_of(model, config, sites=1).sites] == ["mlp:1"]


@pytest.mark.parametrize("text", ["", "the"])
def test_perplexity_needs_a_token_after_another(text: str) -> None:
    with pytest.raises(ValueError, match=r"the text has [01] tokens?; perplexity needs at least 2"):
        perplexity(tiny_model(len(TOKENIZER)), TOKENIZER, text)
