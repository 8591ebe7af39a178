"""What an inner loop borrows of a model: adapters, flags, gradient hooks and modes come back as they were."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lpa_kernels.attack import adapters_off
from lpa_kernels.attack.probe import can_pack
from lpa_kernels.model import modes
from lpa_kernels.model.facts import model_key
from lpa_kernels.model.frozen import can_freeze
from lpa_kernels.model.modes import cast_adapters, frozen_eval, inner_mode, merged_adapters
from lpa_kernels.model.walk import modules_of, parameters_of

from ...support.batches import assert_same, attack_with, llama, pairs, with_lora
from ...support.models import DEVICE, tiny

SITES = ["embedding", "mlp:1"]
ENGINES = ["packed", "reference"]


def flags(model: Any) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_reference_pass_switches_no_gradient_on(frozen: bool) -> None:
    """PEFT's own context turns every adapter's requires_grad on when it ends."""
    model = llama(lora=True)
    if frozen:
        model.requires_grad_(False)
    before = flags(model)
    with frozen_eval(model):
        with adapters_off(model):
            pass
        assert not any(flags(model))
    assert flags(model) == before
    for engine in ENGINES:
        attack_with(model, pairs(), SITES, engine, coefs={"dpo": 1.0}, steps=1)
        assert flags(model) == before
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        _ = 1 / 0
    assert flags(model) == before


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weights_leaves_no_reference(start: str) -> None:
    """peft takes it out of the base weights, so the model without the adapter is another one."""
    model = llama()
    tokens = torch.arange(8, device=DEVICE)[None]
    with torch.no_grad():
        before = model(tokens).logits
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(tokens).logits, before, atol=1e-2)
    with pytest.raises(ValueError, match=f"the adapter 'default' has init_lora_weights='{start}'"), adapters_off(model):
        pass


def test_hooks_on_gradients_survive() -> None:
    """DDP hangs its all-reduce on gradient accumulators, which data of another dtype in a parameter would end."""
    model = with_lora(llama().to(torch.bfloat16))
    wanted = [p for p in model.parameters() if p.requires_grad]
    fired: list[int] = []
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in wanted]  # as DDP keeps them
    for accumulator in accumulators:
        accumulator.register_hook(lambda *_: fired.append(1))
    attack_with(model, pairs(), SITES, "packed", steps=1)
    assert [p for p in model.parameters() if p.requires_grad] == wanted
    sum(p.sum() for p in wanted).backward()
    assert len(fired) == len(wanted) > 0


def test_a_parameter_of_two_modules_has_one_copy() -> None:
    model = with_lora(llama().to(torch.bfloat16))
    layers = model.base_model.model.model.layers
    first, second = (layers[i].mlp.up_proj.lora_A["default"] for i in (0, 1))
    second.weight = first.weight
    with cast_adapters(model):
        assert first.weight is second.weight
        assert (first.weight.dtype, first.weight.requires_grad) == (torch.bfloat16, False)
    assert first.weight is second.weight
    assert first.weight.dtype == torch.float32


def test_copies_are_kept_for_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(llama().to(torch.bfloat16))
    monkeypatch.setattr(modes, "KEPT_ON", set())
    with cast_adapters(model):
        lora = [p for n, p in model.named_parameters() if "lora" in n]
    with cast_adapters(model):
        assert not {id(p) for p in lora} & {id(p) for n, p in model.named_parameters() if "lora" in n}
    monkeypatch.setattr(modes, "KEPT_ON", {DEVICE})
    seen = []
    for _ in range(2):
        with cast_adapters(model):
            seen.append([(p.data_ptr(), p.dtype) for n, p in model.named_parameters() if "lora" in n])
    assert seen[0] == seen[1]
    assert {dtype for _, dtype in seen[0]} == {torch.bfloat16}


def test_a_weight_of_two_modules_is_not_merged_into() -> None:
    """LoRA under the embedding of a tied head would change the head too."""
    model = with_lora(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"the weight \(101, 32\) under an adapter belongs to 2 modules"):
        attack_with(model, pairs(), SITES, "packed", merge_adapters=True)
    assert not any(getattr(m, "merged_adapters", None) for m in model.modules())
    shared = with_lora(llama(), target_modules=["embed_tokens", "q_proj"])  # two parameters on one memory
    shared.lm_head.weight = torch.nn.Parameter(shared.get_input_embeddings().base_layer.weight.data)
    with pytest.raises(ValueError, match="belongs to 2 modules"), merged_adapters(shared):
        pass
    untied = with_lora(llama(), target_modules=["embed_tokens", "q_proj"])
    want = attack_with(untied, pairs(), SITES, "packed")
    assert_same(attack_with(untied, pairs(), SITES, "packed", merge_adapters=True), want, losses=1e-5)


def test_the_state_of_adapters() -> None:
    model = with_lora(llama())
    model.add_adapter("b", model.peft_config["default"])
    states = [model_key(model)]
    with model.disable_adapter():
        states.append(model_key(model))
    with merged_adapters(model):
        states.append(model_key(model))
    assert model_key(model) == states[0]
    model.set_adapter("b")
    states.append(model_key(model))
    model.base_model.model.model.layers[0].mlp.up_proj.scaling["b"] *= 2
    states.append(model_key(model))
    assert len(set(map(hash, states))) == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_inference_mode_outside_has_no_part(engine: str) -> None:
    model = llama(lora=True)
    want = attack_with(model, pairs(), SITES, engine)
    with torch.inference_mode():
        got = attack_with(model, pairs(), SITES, engine)  # its batch is made of inference tensors
    assert_same(got, want, losses=0, deltas=0)
    with torch.inference_mode(), inner_mode(model):
        assert not torch.is_inference_mode_enabled()


def test_dropout_that_prevents_checkpointing_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = llama(attention_dropout=0.1)
    for enabled, told in ((False, 0), (True, 1), (True, 1)):
        if enabled:
            model.gradient_checkpointing_enable()
        with frozen_eval(model):
            assert not any(m.training for m in model.modules())
        assert sum("not checkpointed" in r.message for r in caplog.records) == told
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "activation_checkpointing"])
def test_blocks_that_checkpoint_train_by_either_name_of_their_flag(flag: str) -> None:
    model = llama()
    setattr(model.model.layers[1], flag, True)
    with frozen_eval(model):
        assert [m for m in model.modules() if m.training] == [model.model.layers[1]]


def test_a_model_that_cannot_be_asked_is_not_frozen() -> None:
    model = llama()
    assert can_freeze(model, 2)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    assert not can_freeze(model, 2)
    handle.remove()
    assert can_freeze(model, 2)
    assert "forward" not in model.model.layers[0].__dict__


def test_a_verdict_goes_with_configuration_and_adapters() -> None:
    model = llama(lora=True)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for again in (False, True):
        before = len(calls)
        assert can_pack(model)
        assert (len(calls) == before) == again
    with model.disable_adapter():
        before = len(calls)
        assert can_pack(model)
        assert len(calls) > before
    model.base_model.model.config.is_causal = False
    assert not can_pack(model)


def test_the_short_walk_meets_what_the_long_one_does() -> None:
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(shared, nn.ModuleList([nn.Linear(2, 2), shared]), nn.Linear(2, 2))
    twice[2].weight = shared.weight
    twice.register_module("none", None)
    for model in (twice, with_lora(tiny("qwen3"))):
        assert list(map(id, modules_of(model))) == list(map(id, model.modules()))
        assert list(map(id, parameters_of(model))) == list(map(id, model.parameters()))


def test_a_scripted_module_is_in_eval_mode_too() -> None:
    model = llama()
    model.model.layers[1].mlp.add_module("drop", torch.jit.script(nn.Dropout(0.5)))
    model.train()
    drop = model.model.layers[1].mlp.drop
    with frozen_eval(model):
        assert torch.equal(drop(torch.ones(8)), torch.ones(8))
    assert drop.training
    assert not torch.equal(drop(torch.ones(64)), torch.ones(64))
