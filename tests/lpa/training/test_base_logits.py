"""The base model is asked once for each benign row that fits, and its logits are those of a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpa.training import base_logits
from lpa.training.losses import BenignBatch
from tests.support.faults import run_out
from tests.support.tiny import rows, tiny_model
from tests.support.trainers import TOKENIZER, assert_same, logged, trainer_of, weights

BENIGN = [{"prompt": row["prompt"], "response": " ".join(["I agree with this"] * (1 + i % 3))}
          for i, row in enumerate(rows(6, "desirable"))]  # fmt: skip
RUN: dict[str, Any] = {"benign_dataset": BENIGN, "kl_coef": 0.3, "lpa_steps": 4}


def noting(passes: list[int]) -> Any:
    """`BenignBatch.logits` that notes the rows of every pass without gradients, which is the base model's."""
    logits = BenignBatch.logits

    def watched(batch: BenignBatch, model: Any, *, at: bool = False) -> Any:
        if not torch.is_grad_enabled():
            passes.append(len(batch.ids))
        return logits(batch, model, at=at)

    return watched


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int, **settings: Any) -> tuple[Any, list[int]]:
    """A trained trainer whose base model's logits may take `kept` bytes, and the rows of its passes."""
    passes: list[int] = []
    trainer = trainer_of(folder, **RUN, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(base_logits.BaseLogits.__init__, "__defaults__", ((), 0, kept))
        patch.setattr(BenignBatch, "logits", noting(passes))
        trainer.train()
    return trainer, passes


CASES: list[dict[str, Any]] = [
    {},
    {"sft_coef": 0.2, "offload_attacks": True},
    {"lora": False, "ref_model": tiny_model(len(TOKENIZER), seed=1)},
]


@pytest.mark.parametrize("settings", CASES)
def test_kept_logits_train_what_new_ones_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    (kept, once), (anew, every) = (run(tmp_path, monkeypatch, size, **settings) for size in (10**9, 0))
    assert (sorted(once), every) == ([1] * 6, [2] * 8)  # four LPA steps of two micro-batches of two rows, six in all
    assert_same(weights(kept), weights(anew), within=2e-6)
    for one, other in zip(logged(kept), logged(anew), strict=True):
        assert one["defence_kl"] == pytest.approx(other["defence_kl"], rel=1e-5, abs=1e-7)
    assert logged(kept)[-1]["defence_kl"] > 1e-6


def test_rows_that_do_not_fit_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(text["response"].split()) for text in BENIGN[:4]) * len(TOKENIZER) * 4
    some, passes = run(tmp_path, monkeypatch, size + 1)
    assert some.base_logits.fit == 4
    assert sorted(some.base_logits._kept) == [0, 1, 2, 3]
    anew, every = run(tmp_path, monkeypatch, 0)
    assert 6 < sum(passes) < sum(every)
    assert_same(weights(some), weights(anew), within=2e-6)


def test_kept_logits_are_bitwise_those_of_a_row_in_any_batch(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **RUN)
    places = [(0, 2), (2, 1, 2), (2,)]
    batches = [
        BenignBatch.from_dict(trainer.benign_collator([trainer.benign[i] for i in each]), rows=each) for each in places
    ]
    one, other = base_logits.BaseLogits.for_run(trainer), base_logits.BaseLogits.for_run(trainer)
    found = [one.of(batch) for batch in batches]
    assert torch.equal(other.of(batches[1]), found[1])  # of another history
    assert torch.equal(found[1][-batches[2].count :], found[2])
    for batch, logits in zip(batches, found, strict=True):
        with trainer.base_model() as base, torch.no_grad():
            assert torch.allclose(logits, batch.logits(base), atol=1e-5)


def test_micro_batches_in_parts_keep_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path, monkeypatch, 10**9)
    parts = trainer_of(tmp_path, **RUN)
    run_out(monkeypatch, parts, "attack", {1})
    parts.train()
    assert parts._memory.size == 1
    assert_same(weights(parts), weights(whole), within=2e-6)


def test_what_is_not_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **RUN)
    assert base_logits.BaseLogits.for_run(trainer).fit == 6
    collate = trainer.benign_collator
    trainer.benign_collator = lambda rows: collate(rows)
    assert base_logits.BaseLogits.for_run(trainer).fit == 0
    public = trainer_of(tmp_path, **RUN, kl="public", normaliser="micro")
    assert base_logits.BaseLogits.for_run(public).fit == 0
