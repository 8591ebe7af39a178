"""Gradients flow to the perturbations through frozen quantised weights, in every engine and shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpa_kernels.attack import LatentPGD, loop
from lpa_kernels.model.head import plain_head
from lpa_kernels.model.trim import trimmable

from ...support.batches import assert_same, attack_with, llama, pairs, with_lora
from ...support.quantized import IntLinear, RoundingLinear, dequantised, quantised

SITES = ["embedding", "mlp:0"]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    few = quantised(llama())
    plain = dequantised(few)  # before peft changes the other
    return with_lora(few), with_lora(plain)


@pytest.mark.parametrize("engine", ["reference", "packed"])
def test_an_attack_through_integer_weights_equals_one_through_their_values(models: Any, engine: str) -> None:
    few, plain = models
    before = {n: p.clone() for n, p in few.named_parameters()}
    assert sum(p.dtype == torch.int8 for p in before.values()) == 28
    found, wanted = (attack_with(m, pairs(), SITES, e) for m, e in ((few, engine), (plain, "reference")))
    assert_same(found, wanted, losses=1e-5)
    for name, p in few.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad == ("lora_" in name)


def test_a_stack_refuses_integer_weights_by_name(models: Any) -> None:
    with pytest.raises(RuntimeError, match=r"engine='stack' cannot run .*q_proj is .*IntLinear, not a frozen"):
        attack_with(models[0], pairs(), SITES, "stack")


def test_the_defence_trains_adapters_through_integer_weights(models: Any) -> None:
    grads = []
    for model in models:
        pgd = LatentPGD(model, SITES, step_size=0.05, steps=2, engine="packed")
        batch = pairs()
        rows = pgd.rows(batch, pgd.attack(batch))
        loss = nn.functional.cross_entropy(rows.logits, rows.labels)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    assert len(grads[0]) == 56
    for name, plain in grads[1].items():
        assert float(plain.abs().max()) > 0
        assert torch.allclose(grads[0][name], plain, atol=1e-4), name


def test_a_quantised_head_is_run_by_the_model(monkeypatch: Any) -> None:
    base = llama()
    assert plain_head(quantised(base))
    whole = quantised(base, skip=())
    assert not plain_head(whole)
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)
    calls: list[int] = []
    whole.lm_head.register_forward_hook(lambda *_: calls.append(1))
    found = attack_with(whole, pairs(), SITES, "packed")
    assert len(calls) >= 3
    assert_same(found, attack_with(dequantised(whole), pairs(), SITES, "packed"), losses=1e-5)


def test_the_last_feed_forward_may_be_trimmed() -> None:
    model = quantised(llama())
    pgd = LatentPGD(model, SITES)
    assert trimmable(model, pgd.sites) is model.model.layers[-1].mlp


def test_layers_that_mix_tokens_are_neither_trimmed_nor_a_hindrance() -> None:
    """Their logits depend on what else is in a pass, by what a rounding changes."""
    model = quantised(llama(), RoundingLinear)
    assert trimmable(model, LatentPGD(model, SITES).sites) is None
    found = attack_with(model, pairs(), SITES, "auto")
    assert found.losses[2]["total"] < found.losses[0]["total"]


def test_adapters_are_not_merged_into_integers(models: Any) -> None:
    with pytest.raises(ValueError, match=r"the weight under an adapter is quantised \(torch.int8\); use merge_ad"):
        attack_with(models[0], pairs(), SITES, "packed", merge_adapters=True)


def test_adapters_are_not_merged_into_packed_bits_with_a_float_dtype() -> None:
    model = with_lora(dequantised(quantised(llama())))
    weight: Any = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    weight.quant_state = object()  # what bitsandbytes' 4-bit weights carry, stored as bfloat16 for FSDP
    with pytest.raises(ValueError, match=r"quantised \(torch.float32\)"):
        attack_with(model, pairs(), SITES, "packed", merge_adapters=True)


def test_the_stand_in_computes_like_a_plain_layer() -> None:
    plain = nn.Linear(8, 4, bias=False)
    layer = IntLinear(plain)
    assert torch.allclose(layer.dequantised().weight, plain.weight, atol=0.01)
    assert not torch.equal(layer.dequantised().weight, plain.weight)
