"""The before/after table: log-probabilities, shares and perplexity against plain computations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lpa.data import PairCollator, load_pairs
from lpa.evaluation.measure import ROWS, attack_of, completion_log_probs, labels, margins, measure, perplexity, table
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


def test_measure_and_its_table(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER)).train()
    config = tiny_config(tmp_path)
    found = measure(model, TOKENIZER, config, attacked_rows=3)
    assert set(ROWS) <= set(found)
    assert found["disagree_undesirable_n"] == 12
    assert found["disagree_undesirable_attacked_n"] == 3
    assert all(0 <= found[name] <= 1 for name in ROWS if name != "perplexity")
    assert found["disagree_undesirable_attacked_margin"] < found["disagree_undesirable_margin"]
    assert model.training  # left as it was
    assert "  under a latent attack (n=3)" in labels(found).values()
    assert table(found, found).row_count == 5
    with pytest.raises(ValueError, match="attacked_rows=-1 must be 0"):
        measure(model, TOKENIZER, config, attacked_rows=-1)
    clean = measure(model, TOKENIZER, config, attacked_rows=0)
    assert "agree_desirable_attacked" not in clean
    assert clean["agree_desirable"] == found["agree_desirable"]
    assert table(clean, None).row_count == 3


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
