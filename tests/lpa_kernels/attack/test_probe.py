"""Does the probe accept every model that can be packed, and refuse each way of being wrong?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from lpa_kernels.attack import masks, probe
from lpa_kernels.attack.batch import PairBatch
from lpa_kernels.attack.layout import Layout, pack
from lpa_kernels.attack.passes import layout_hidden, layout_logits
from lpa_kernels.attack.probe import can_pack
from lpa_kernels.model.head import plain_head, selected_rows

from ...support.batches import ragged_batch
from ...support.models import DEVICE, FAMILIES, PACKS, STANDS_APART, WINDOW, implementations, tiny

REASONS = {
    "mamba2": "recurrent state",
    "bloom": "position_ids",
    "jamba": "recurrent state",
    "recurrent_gemma": "recurrent state",
    "lfm2": "layers of type conv",
}
STANDING = [(family, attn) for family in STANDS_APART for attn in implementations(family)]


@pytest.mark.parametrize(("family", "attn"), [(f, a) for f in PACKS for a in implementations(f)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packs(family: str, attn: str, dtype: torch.dtype) -> None:
    verdict = can_pack(tiny(family, attn=attn, dtype=dtype))
    assert verdict, verdict.reason
    assert verdict.reason == ""


@pytest.mark.parametrize(("family", "attn"), STANDING)
def test_stands_apart(family: str, attn: str) -> None:
    verdict = can_pack(tiny(family, attn=attn))
    assert not verdict
    assert REASONS[family] in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "attn"), STANDING)
def test_the_run_alone_would_find_out(
    family: str, attn: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing depends on what the configuration or the class admits."""
    monkeypatch.setattr(probe, "_read", lambda model: "")
    assert not can_pack(tiny(family, attn=attn, dtype=dtype))


def test_every_family_is_judged() -> None:
    assert set(FAMILIES) == set(PACKS) | set(REASONS)


# ---- broken on purpose


def everything_visible(layout: Layout) -> Tensor:
    return torch.ones(*layout.shape, layout.shape[1], dtype=torch.bool, device=DEVICE)


def chosen_sees_rejected(layout: Layout) -> Tensor:
    return layout.branch[:, :, None] >= layout.branch[:, None, :]


def nothing_but_own_branch(layout: Layout) -> Tensor:
    return layout.branch[:, :, None] == layout.branch[:, None, :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "mixtral", "falcon", "gpt2"])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (everything_visible, "tokens move the other's logits"),
        (chosen_sees_rejected, "tokens move the other's logits"),
        (nothing_but_own_branch, "differ from separate passes"),
    ],
)
def test_a_wrong_mask_is_refused(
    family: str, broken: Callable[..., Tensor], reason: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "visible", broken)
    verdict = can_pack(tiny(family, dtype=dtype))
    assert not verdict
    assert reason in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama4_text", "gpt_oss"])
def test_windows_by_index_are_refused(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = masks._evaluate

    def by_index(layout: Layout, pattern: Callable[..., Tensor]) -> Tensor:
        index = torch.arange(layout.shape[1], device=DEVICE).expand(layout.shape)
        return evaluate(replace(layout, position_ids=index), pattern)

    monkeypatch.setattr(masks, "_evaluate", by_index)
    # wide windows of real models: only the probe's own shortening makes them bind
    wide = {"attention_chunk_size": 8192} if family == "llama4_text" else {"sliding_window": 4096}
    verdict = can_pack(tiny(family, dtype=dtype, **wide))
    assert "differ from separate passes" in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "smollm3"])
def test_positions_that_run_on_are_refused(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def running(batch: PairBatch) -> Layout:
        layout = pack(batch)
        return replace(layout, position_ids=torch.arange(layout.shape[1], device=DEVICE).expand(layout.shape))

    monkeypatch.setattr(probe, "pack", running)
    assert "differ from separate passes" in can_pack(tiny(family, dtype=dtype)).reason


def own_mask(config: Any, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:
    length = inputs_embeds.shape[1]
    mask = torch.full((length, length), torch.finfo(inputs_embeds.dtype).min, device=DEVICE).triu(1)
    return mask.expand(inputs_embeds.shape[0], 1, length, length)


def test_a_model_with_masks_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", own_mask)
    assert "library's mask functions" in can_pack(tiny("llama")).reason


def test_windows_outside_the_mask_functions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.mistral.modeling_mistral
    monkeypatch.setattr(module, "create_sliding_window_causal_mask", module.create_causal_mask)
    assert "windows or chunks" in can_pack(tiny("mistral")).reason


def test_other_attention_implementations_are_refused() -> None:
    model = tiny("llama", attn="sdpa")
    assert can_pack(model)
    model.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2'" in can_pack(model).reason
    model.set_attn_implementation("eager")
    assert can_pack(model)


def test_convolutions_recurrence_and_alibi_are_read_off() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.add_module("mixer", nn.Conv1d(4, 4, 3))
    assert "Conv1d" in can_pack(model).reason
    assert "alibi" in can_pack(tiny("falcon", alibi=True)).reason


def test_bidirectional_attention_is_refused() -> None:
    assert "later ones" in can_pack(tiny("llama", is_causal=False)).reason


def test_prompt_tuning_is_refused() -> None:
    tuned = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not can_pack(tuned)


def test_positions_that_change_meaning_limit_the_length() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert can_pack(model, 32)
    assert "beyond 32 tokens and rows have up to 33" in can_pack(model, 33).reason
    llama4 = tiny("llama4_text", floor_scale=64)
    assert can_pack(llama4, 63)
    assert not can_pack(llama4, 64)
    assert can_pack(tiny("llama"), 10**6)


# ---- manners


def test_the_model_is_left_as_it_was_and_asked_once() -> None:
    model = tiny("gemma3_text")
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert can_pack(model)
    asked = len(calls)
    assert 0 < asked <= 8
    assert can_pack(model)
    assert len(calls) == asked
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config.sliding_window == WINDOW
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)


def test_adapters() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    assert can_pack(get_peft_model(tiny("qwen3", dtype=torch.bfloat16), config))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "opt", "mixtral"])
def test_layout_logits_are_rows_of_the_full_ones(family: str) -> None:
    """Tied heads, soft caps and scales included."""
    model, layout = tiny(family), pack(ragged_batch())
    with torch.no_grad(), masks.packed_masks(layout):
        extra = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
        full = model(input_ids=layout.input_ids, use_cache=False, **extra).logits
        logits = layout_logits(model, layout)
        hidden = layout_hidden(model, layout)
    torch.testing.assert_close(logits, full[layout.select_rows, layout.select_positions], rtol=1e-6, atol=1e-6)
    assert hidden.shape == (len(layout.labels), 32)
    if plain_head(model):
        head = model.get_output_embeddings()
        torch.testing.assert_close(nn.functional.linear(hidden, head.weight, head.bias), logits, rtol=1e-6, atol=1e-6)


def test_plain_heads() -> None:
    plain = {family: plain_head(tiny(family)) for family in ("llama", "gpt2", "gemma3_text", "gemma2", "granite")}
    assert plain == {"llama": True, "gpt2": True, "gemma3_text": True, "gemma2": False, "granite": False}
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    assert not plain_head(adapted)
    assert plain_head(get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_head_with_other_hidden_states_is_an_error() -> None:
    model, layout = tiny("llama"), pack(ragged_batch())
    with (
        selected_rows(model, layout.shape, layout.places),
        pytest.raises(ValueError, match="the head got hidden states of shape"),
    ):
        model(input_ids=layout.input_ids[:1])
    with (
        pytest.raises(ValueError, match="no output embeddings"),
        selected_rows(nn.Linear(2, 2), layout.shape, layout.places),
    ):
        pass
