"""The defence's losses: benign terms, preference losses, and the same weights by either engine and checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from lpa.training.losses import BenignBatch, benign_terms
from lpa.training.step import LPAStep
from tests.support.tiny import tiny_model
from tests.support.trainers import TOKENIZER, assert_same, logged, trainer_of, weights

BENIGN = [{"prompt": "Write a list", "response": "one two"}]


def test_standard_kl_is_that_of_the_textbook() -> None:
    torch.manual_seed(0)
    model = tiny_model(50)
    batch = BenignBatch(torch.randint(50, (2, 6)), torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool())
    base = batch.logits(tiny_model(50, seed=1)).detach()
    total, terms = benign_terms(model, batch, {"kl": 0.5, "sft": 0.25}, batch.count, "standard", base)
    total = total.detach()
    logits, other = model(batch.ids).logits, tiny_model(50, seed=1)(batch.ids).logits
    kls, losses = [], []
    for example, position in batch.mask.nonzero().tolist():
        new = torch.distributions.Categorical(logits=logits[example, position - 1].double())
        old = torch.distributions.Categorical(logits=other[example, position - 1].double())
        kls.append(torch.distributions.kl_divergence(old, new))
        losses.append(-new.log_prob(batch.ids[example, position]))
    kl, sft = torch.stack(kls).mean().detach(), torch.stack(losses).mean().detach()
    assert float(terms["kl"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(terms["sft"]) == pytest.approx(float(sft), rel=1e-5)
    assert float(total) == pytest.approx(float(0.5 * kl + 0.25 * sft), rel=1e-5)


MORE: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.3, "sft_coef": 0.2},
    {"toward_coef": 0, "away_coef": 0, "dpo_coef": 1.0, "kl_coef": 0.3, "attack_toward_coef": 0, "attack_away_coef": 0,
     "attack_dpo_coef": 1.0},
    {"toward_coef": 0, "away_coef": 0, "ipo_coef": 1.0, "reference_free": True},
]  # fmt: skip


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize(("dtype", "rate", "within"), [(torch.float64, 1e-3, 1e-4), (torch.float32, 2e-4, 1e-4)])
def test_engines_and_checkpointing_give_the_same_weights(
    tmp_path: Path, more: dict[str, Any], dtype: torch.dtype, rate: float, within: float
) -> None:
    """In float32 at a lower rate: Adam makes whole steps of gradients that are rounding alone."""
    runs = []
    kinds = [("reference", False), ("packed", False), ("reference", True), ("packed", True)]
    for engine, checkpointing in kinds if more == {} else kinds[:2]:
        model = tiny_model(len(TOKENIZER)).to(dtype)
        trainer = trainer_of(
            tmp_path,
            model=model,
            attack_engine=engine,
            gradient_checkpointing=checkpointing,
            lpa_steps=3,
            attack_steps=2,
            gradient_accumulation_steps=1,
            learning_rate=rate,
            **more,
        )
        passes: list[None] = []
        inner = trainer.model.get_base_model().model.layers[1].mlp.down_proj
        inner.register_forward_hook(lambda *_, passes=passes: passes.append(None))
        start = weights(trainer)
        trainer.train()
        moved = max(float((w - start[name]).abs().max()) for name, w in weights(trainer).items())
        assert moved > rate
        runs.append((weights(trainer), logged(trainer), len(passes)))
    for values, log, _ in runs[1:]:
        assert_same(values, runs[0][0], within)
        assert log[-1]["defence_total"] == pytest.approx(runs[0][1][-1]["defence_total"], abs=1e-4)
    if len(runs) == 4:
        assert runs[2][2] > runs[0][2]  # blocks were run again in the backward pass
        assert runs[3][2] > runs[1][2]


def test_benign_terms_enter_every_so_many_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(
        tmp_path, attack_steps=0, kl_coef=0.3, sft_coef=0.2, benign_every=3, lpa_steps=2, gradient_accumulation_steps=1
    )
    losses = LPAStep.losses
    found: list[tuple[float, dict[str, float]]] = []

    def watched(step: LPAStep, micro: Any) -> Any:
        total, terms = losses(step, micro)
        found.append((total.item(), {name: float(value) for name, value in terms.items()}))
        return total, terms

    monkeypatch.setattr(LPAStep, "losses", watched)
    trainer.train()
    assert [sorted(terms) for _, terms in found] == [
        ["away", "kl", "sft", "toward"], ["away", "toward"], ["away", "toward"], ["away", "kl", "sft", "toward"]
    ]  # fmt: skip
    for total, terms in found:
        weights = {name: coef * (3 if name in ("kl", "sft") else 1) for name, coef in trainer.args.coefs.items()}
        assert total == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-5)
    assert [entry["defence_sft"] for entry in logged(trainer)] == pytest.approx(
        [found[0][1]["sft"], found[3][1]["sft"]]
    )
    assert logged(trainer)[0]["defence_toward"] == pytest.approx(found[1][1]["toward"])


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_preference_losses_mirror_the_attack(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"toward_coef": 0, "away_coef": 0, f"{name}_coef": 2.0, "preference_beta": 0.5, "lpa_steps": 1}
    trainer = trainer_of(tmp_path, attack_steps=0, lora_r=2, **settings)
    for weight in [p for n, p in trainer.model.named_parameters() if "lora_B" in n]:
        weight.data.normal_(std=0.1)
    found: list[tuple[Any, float]] = []
    losses = LPAStep.losses

    def watched(step: LPAStep, micro: Any) -> Any:
        total, terms = losses(step, micro)
        found.append((micro, total.item()))
        assert total.item() == pytest.approx(float(terms[name]) * 2 / 4)  # a micro-batch holds 2 of the 4 pairs
        return total, terms

    monkeypatch.setattr(LPAStep, "losses", watched)
    gaps: list[float] = []

    def expected(micro: Any, model: Any) -> Tensor:
        sums = []
        for text in ("chosen", "rejected"):
            ids, mask = getattr(micro.pairs, f"{text}_ids"), getattr(micro.pairs, f"{text}_mask")
            log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            sums.append(log_probs.sum(1) / (mask[:, 1:].sum(1) if name == "ipo" else 1))
        return (sums[0] - sums[1]).detach()

    def at_first_update(*_: Any) -> Any:
        for micro, total in found:
            new = expected(micro, trainer.model)
            with trainer.model.disable_adapter():
                gap = new - expected(micro, trainer.model)
            each = -F.logsigmoid(0.5 * gap) if name == "dpo" else (gap - 1) ** 2
            assert total == pytest.approx(float(each.mean()) / 2, rel=1e-4)
            gaps.append(float(gap.abs().max()))
        raise InterruptedError

    trainer._clip_grad_norm = at_first_update
    with pytest.raises(InterruptedError):
        trainer.train()
    assert len(gaps) == 2
    assert max(gaps) > 0.01


def test_a_preference_loss_needs_its_reference(tmp_path: Path) -> None:
    settings = {"toward_coef": 0, "away_coef": 0, "dpo_coef": 1.0, "lora": False, "lpa_steps": 1}
    with pytest.raises(ValueError, match=r"dpo_coef=1.0 needs the base model"):
        trainer_of(tmp_path, **settings)
    started = {"lora": True, "peft_config": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="olora")}
    with pytest.raises(ValueError, match=r"the base model, and adapters with init_lora_weights='olora' change"):
        trainer_of(tmp_path, **settings | started)
    for more in ({"reference_free": True}, {"ref_model": tiny_model(len(TOKENIZER))}):
        trainer = trainer_of(tmp_path, **settings, **more)
        trainer.train()
        assert logged(trainer)[0]["defence_dpo"] > 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_leave_no_base_model(tmp_path: Path, bias: str) -> None:
    """peft does not switch them off: the KL term would be to a model that moves along."""

    def start(kl: float, **settings: Any) -> Any:
        with_biases = settings.pop("attention_bias", True)
        adapters = LoraConfig(target_modules=["q_proj"], r=2, bias=settings.pop("bias", bias))
        model = tiny_model(len(TOKENIZER), attention_bias=with_biases)
        coefs = {"kl_coef": kl, "sft_coef": 0.5, "lpa_steps": 1}
        return trainer_of(tmp_path, model=model, benign_dataset=BENIGN, peft_config=adapters, **coefs, **settings)

    with pytest.raises(
        ValueError, match=f"kl_coef=1.0 needs the base model, and adapters with bias='{bias}' change it"
    ):
        start(1.0)
    start(1.0, bias="none")
    start(1.0, attention_bias=False)
    trainer = start(1.0, ref_model=tiny_model(len(TOKENIZER), attention_bias=True))
    assert any(name.endswith(".bias") for name in weights(trainer))
    start(0.0).train()


def test_benign_rows_alone_reach_the_head(tmp_path: Path) -> None:
    model = tiny_model(50)
    batch = BenignBatch(torch.randint(50, (2, 6)), torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]]).bool())
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: sizes.append(out.shape[:-1].numel()))
    full = model(batch.ids).logits
    before, at = batch.logits(model), batch.logits(model, at=True)
    assert torch.allclose(before, full[:, :-1][batch.mask[:, 1:]], atol=1e-5)
    assert torch.allclose(at, full[batch.mask], atol=1e-5)
    assert sizes == [12, 4, 4]
