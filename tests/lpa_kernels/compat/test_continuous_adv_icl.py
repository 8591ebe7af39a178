"""ContinuousAttacker gives what a plain loop of its kind gives, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpa_kernels.compat import continuous_adv_icl
from lpa_kernels.compat.continuous_adv_icl import NORMS, ContinuousAttacker, singular_spread
from tests.support.batches import llama
from tests.support.foreign import continuous
from tests.support.models import DEVICE, VOCAB

SETTINGS: dict[str, Any] = {"steps": 10, "step_size": 1e-2, "radius": 0.05}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts padded on the left, targets on the right, with their masks."""
    draw = torch.Generator().manual_seed(0)
    prompt, target = torch.randint(1, VOCAB, (3, 7), generator=draw), torch.randint(1, VOCAB, (3, 4), generator=draw)
    prompt_mask, target_mask = torch.ones_like(prompt), torch.ones_like(target)
    prompt_mask[0, :3], target_mask[1, 2:] = 0, 0
    return tuple(t.to(DEVICE) for t in (prompt, prompt_mask, target, target_mask))  # type: ignore[return-value]


def plain(model: Any, norm: str, prompt: Tensor, there: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """The same in the plain way: full logits, the perturbed embeddings as the variable."""
    embed = model.get_input_embeddings()
    clean, after = embed(prompt).detach(), embed(target).detach()
    moved = clean.clone()
    mask = torch.cat([there, torch.ones_like(scored)], 1)
    for _ in range(SETTINGS["steps"]):
        moved.requires_grad_()
        logits = model(inputs_embeds=torch.cat([moved, after], 1), attention_mask=mask).logits
        log_probs = logits[:, -target.shape[1] - 1 : -1].log_softmax(-1).gather(2, target[..., None])[..., 0]
        (grad,) = torch.autograd.grad(-(log_probs * scored).mean(), moved)
        grad = grad.sign() if norm == "l-infty" else grad / (grad.norm(dim=-1, keepdim=True) + 1e-6)
        delta = (moved.detach() - SETTINGS["step_size"] * grad - clean) * there[..., None]
        if norm == "l-infty":
            delta = delta.clamp(-SETTINGS["radius"], SETTINGS["radius"])
        else:
            delta = delta * (SETTINGS["radius"] / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        moved = clean + delta
    return moved - clean


@pytest.mark.parametrize("norm", NORMS)
def test_the_perturbation_is_that_of_a_plain_loop(norm: str) -> None:
    model = llama(lora=True)
    prompt, there, target, scored = batch()
    wanted = plain(model, norm, prompt, there, target, scored)
    model.train()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    found = ContinuousAttacker(**SETTINGS, norm_type=norm).attack_embeds(
        model, None, prompt, there, target, scored, DEVICE
    )
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(found.abs().max()) > 0.01
    assert not bool(found[there == 0].any())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert model.training


def test_no_steps_or_no_radius_run_no_pass() -> None:
    prompt, there, target, scored = batch()
    for changed in ({"steps": 0}, {"radius": 0}):
        found = ContinuousAttacker(**SETTINGS | changed).attack_embeds(
            llama(), None, prompt, there, target, scored, DEVICE
        )
        assert not bool(found.any())
        assert found.shape == (*prompt.shape, 32)


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="norm_type='l1' is unknown; use one of l-infty, l2"):
        ContinuousAttacker(**SETTINGS, norm_type="l1")


def test_the_singular_value_term_and_its_gradient() -> None:
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32, requires_grad=True)
    spread = singular_spread(weight)
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    assert torch.allclose(spread, ((values - values.mean()).square().sum() / 5).sqrt())
    (grad,) = torch.autograd.grad(spread, weight)
    assert torch.allclose(grad, left @ torch.diag((values - values.mean()) / 5 / spread.detach()) @ right, atol=1e-6)
    assert continuous_adv_icl.singular_spread(weight.to(torch.bfloat16)).dtype == torch.float32


def test_a_trainer_finds_it_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "ContinuousAttacker", ContinuousAttacker)
    model = llama(lora=True)
    trainer = continuous.AdversarialTrainer(model, SETTINGS | {"norm_type": "l2"})
    prompt, there, target, scored = batch()
    inputs = {"prompt_ids": prompt, "prompt_mask": there, "harmful_ids": target, "harmful_mask": scored,
              "safe_ids": target.flip(1)}  # fmt: skip
    losses = []
    for _ in range(3):
        wanted = plain(model.eval(), "l2", prompt, there, target, scored)
        loss, delta = trainer.step(inputs)
        losses.append(loss)
        assert torch.allclose(delta, wanted, atol=1e-5)
    assert losses[-1] < losses[0]
    assert model.training
