"""MixAT's loop is Continuous-AdvTrain's with three more things: token 0, a ratio, and a flag; its callers find it."""

from __future__ import annotations

import pytest
import torch

from lpa_kernels.compat import EmbeddingSpaceAttack, mixat
from tests.support.batches import llama
from tests.support.foreign import continuous
from tests.support.models import DEVICE, VOCAB


def test_it_is_the_parent_with_a_flag_and_token_0_by_choice() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, 9), generator=draw).to(DEVICE)
    targets = torch.where(torch.arange(9, device=DEVICE) >= 5, ids, -100)
    targets[0, 6] = ids[0, 6] = 0
    attention = torch.ones_like(ids)
    model = llama()
    weights = model.get_input_embeddings().weight.detach()
    sign = {"type": "sign", "lr": 1e-3}
    options = {"response_key": "", "tokenizer": None, "iters": 4, "opt_config": sign, "eps": 0.05}
    parent = EmbeddingSpaceAttack(weights, **options).attack(model, ids, targets, attention)
    ours = mixat.EmbeddingSpaceAttack(weights, **options, is_zero_a_valid_index=True)
    found = ours.attack(model, ids, targets, attention, ratio=0.5)
    assert len(found) == 6
    assert found[5] is False
    assert all(torch.equal(a, b) for a, b in zip(found[:3], parent[:3], strict=True))
    assert found[3:5] == parent[3:5]
    dropped = mixat.EmbeddingSpaceAttack(weights, **options).attack(model, ids, targets, attention)
    assert dropped[2][0, 6] == 1  # no target, and so a token to attack, as there
    assert dropped[3] != parent[3]
    adversarial = ours.get_adv_embeddings(*found[:3], is_gcg=False)
    assert torch.equal(adversarial, found[0] + found[1] * found[2])


def test_a_mixed_attack_perturbs_the_rewritten_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public classes make the loop by its name in their module, which is where the migration puts ours."""
    monkeypatch.setattr(continuous, "EmbeddingSpaceAttack", mixat.EmbeddingSpaceAttack)
    ids = torch.arange(1, 19, device=DEVICE).view(2, 9)
    targets = torch.where(torch.arange(9, device=DEVICE) >= 5, ids, -100)
    attention, model = torch.ones_like(ids), llama()
    weights = model.get_input_embeddings().weight.detach()
    options = {"iters": 4, "opt_config": {"type": "sign", "lr": 1e-3}, "eps": 0.05}
    mixed = continuous.MixedAttack(weights, "", "", None, lambda prompt: prompt.flip(0), **options)
    plain = mixat.EmbeddingSpaceAttack(weights, "", None, **options)
    turned = torch.cat([ids[:, :5].flip(1), ids[:, 5:]], 1)
    for ratio, same in ((None, ids.clone()), (1.0, turned)):
        found = mixed.attack(model, ids.clone(), targets, attention, ratio)
        wanted = plain.attack(model, same, targets, attention)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert found[3:] == (*wanted[3:5], ratio is not None)
        assert found[3][-1] < found[3][0]
