"""Tiny models with every kind of adapter that peft has, and with the quantised weights that run on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from torch import nn

from benchmarks.tiny_models import build

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
_SQUARE = ["q_proj", "o_proj"]
TRIGGER = 11  # the token that switches an aLoRA on


def _randomised(model: Any, seed: int = 3) -> Any:
    """The model with all trainable parameters jittered: adapters that do nothing would hide what they do wrong."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=draw) * 0.1
                parameter.add_(noise.to(parameter.dtype))
    return model.eval()


def with_lora(model: Any) -> Any:
    """LoRA of rank 4 on the linear layers of all blocks, both factors random."""
    head = model.get_output_embeddings()
    plain = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt", "HQQLinear", "QLinear")
    names = [name for name, m in model.named_modules() if type(m).__name__ in plain and m is not head]
    return _randomised(get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names)))


# What each tuner needs beside target_modules (None: it takes none). A name may hold several variants, after a colon.
TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": _LINEAR},
    "LORA:dora": {"r": 4, "target_modules": _LINEAR, "use_dora": True},
    "LORA:rslora": {"r": 4, "target_modules": _LINEAR, "use_rslora": True},
    "LORA:bias": {"r": 4, "target_modules": _LINEAR, "lora_bias": True},
    "LORA:embedding": {"r": 4, "target_modules": [*_LINEAR, "embed_tokens"]},
    "LORA:head": {"r": 4, "target_modules": [*_LINEAR, "lm_head"]},
    "LORA:modules_to_save": {"r": 4, "target_modules": _LINEAR, "modules_to_save": ["lm_head"]},
    "LORA:trainable_tokens": {"r": 4, "target_modules": _LINEAR, "trainable_token_indices": [7, 9, 30]},
    "LORA:replicated": {"r": 4, "target_modules": _LINEAR, "layer_replication": [[0, 3], [1, 4]]},
    "LORA:alora": {"r": 4, "target_modules": _LINEAR, "alora_invocation_tokens": [TRIGGER]},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": _LINEAR},
    "ADAMSS": {"r": 4, "target_modules": _SQUARE},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4, "target_modules": _LINEAR},
    "C3A": {"block_size": 8, "target_modules": _SQUARE},
    "CARTRIDGE": {"num_virtual_tokens": 5},
    "CPT": {"num_virtual_tokens": 4, "cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1] * 4},
    "FOURIERFT": {"n_frequency": 16, "target_modules": _LINEAR},
    "GRALORA": {"r": 4, "gralora_k": 2, "target_modules": _LINEAR},
    "HRA": {"r": 4, "target_modules": _LINEAR},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "LILY": {"r": 4, "target_modules": _LINEAR},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 5, "num_tasks": 2, "num_ranks": 1},
    "OFT": {"oft_block_size": 4, "r": 0, "target_modules": _LINEAR},
    "OSF": {"target_modules": _LINEAR},
    "POLY": {"r": 4, "n_tasks": 1, "n_skills": 2, "target_modules": _LINEAR},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "P_TUNING": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "PSOFT": {"r": 4, "target_modules": _LINEAR},
    "RANDLORA": {"r": 4, "target_modules": _LINEAR},
    "SUPERTUNING": {"target_modules": _LINEAR},
    "TRAINABLE_TOKENS": {"token_indices": [7, 9, 30], "target_modules": ["embed_tokens"]},
    "TINYLORA": {"r": 2, "target_modules": _LINEAR},
    "UNILORA": {"r": 4, "target_modules": _LINEAR},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 8, "topk": 2, "target_modules": _LINEAR},
    "VERA": {"r": 8, "target_modules": _LINEAR},
    "PVERA": {"r": 8, "target_modules": _LINEAR},
    "ROAD": {"group_size": 8, "target_modules": _LINEAR},
    "WAVEFT": {"n_frequency": 16, "target_modules": _LINEAR},
} | {name: {"r": 4, "target_modules": _LINEAR}
     for name in ("DEFT", "DELORA", "GLORA", "HIRA", "LOHA", "LOKR", "MISS", "PEANUT", "SHIRA", "SHADOW")
     } | {name: {"target_modules": _LINEAR} for name in ("BEFT", "FROD")
     }  # fmt: skip


def tuned(name: str) -> Any:
    """A tiny Llama with this tuner, its parameters jittered.

    Raises:
        ValueError: the installed peft has no such tuner.
    """
    kind = name.split(":")[0]
    table = {str(key.value): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in table:
        raise ValueError(f"peft has no tuner {kind}; it has {sorted(table)}")
    return _randomised(get_peft_model(build("llama"), table[kind](task_type="CAUSAL_LM", **TUNERS[name])))


def _swap(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with the linear layers of its blocks replaced, the head left out as quantisers do."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(path, make(module))
    return model.eval()


def _nf4() -> Any:
    import bitsandbytes as bnb

    def make(plain: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, torch.float32,
                                  quant_type="nf4")  # fmt: skip
        layer.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return _swap(build("llama", wide=True), make)


def _int8() -> Any:
    import bitsandbytes as bnb

    def make(plain: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, plain.bias is not None,
                                    has_fp16_weights=False, threshold=0.0)  # fmt: skip
        layer.weight = bnb.nn.Int8Params(plain.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    return _swap(build("llama", wide=True), make)


def _torchao(config: str) -> Any:
    from torchao import quantization

    model = build("llama", wide=True)
    head = model.get_output_embeddings()
    quantization.quantize_(model, getattr(quantization, config)(), lambda m, _: type(m) is nn.Linear and m is not head)
    return model


def _hqq() -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=32)

    def make(plain: nn.Linear) -> nn.Module:
        copied = copy.deepcopy(plain)
        return HQQLinear(copied, settings, compute_dtype=torch.float32, device="cpu", initialize=True)

    return _swap(build("llama", wide=True), make)


def _quanto() -> Any:
    from optimum import quanto

    model = build("llama", wide=True)
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head"])
    quanto.freeze(model)
    return model


QUANTISED: dict[str, Callable[[], Any]] = {
    "bitsandbytes-nf4": _nf4,
    "bitsandbytes-int8": _int8,
    "torchao-int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int4": lambda: _torchao("Int4WeightOnlyConfig"),
    "hqq-4bit": _hqq,
    "quanto-int8": _quanto,
}


def quantised(name: str) -> Any:
    """A small Llama with weights of this kind."""
    return QUANTISED[name]()
