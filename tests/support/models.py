"""Tiny random causal language models of every family that the attack must handle, built in milliseconds."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.tiny_models import draw_weights

VOCAB, WIDTH, DEPTH, WINDOW = 101, 32, 4, 6
# Where models and batches of these tests are: on a GPU if there is one.
DEVICE = os.environ.get("LPA_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_GLU = {**_HEADS, "intermediate_size": 48}
_MIXED = ["sliding_attention", "full_attention"] * (DEPTH // 2)
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}

# What each family needs beside the sizes that all share. Windows and chunks are short enough to bind.
PACKS: dict[str, dict[str, Any]] = {
    "llama": _GLU,
    "qwen2": {**_GLU, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    "qwen3": {
        **_GLU,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
    },
    "qwen3_moe": {
        **_GLU,
        **_EXPERTS,
        "head_dim": 8,
        "num_experts": 4,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "qwen2_moe": {
        **_GLU,
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
    },
    "mistral": {**_GLU, "head_dim": 8, "sliding_window": WINDOW},
    "mixtral": {**_GLU, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {**_GLU, "sliding_window": WINDOW},
    "olmo2": _GLU,
    "smollm3": {
        **_GLU,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "gemma2": {
        **_GLU,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **_GLU,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {
        **_GLU,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        **_GLU,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"] * (DEPTH // 2),
        "no_rope_layers": [1, 0] * (DEPTH // 2),
    },
    "falcon": {
        "num_attention_heads": 4,
        "new_decoder_architecture": False,
        "multi_query": True,
        "ffn_hidden_size": 64,
    },
    "stablelm": _GLU,
    "granite": {**_GLU, "logits_scaling": 3.0, "residual_multiplier": 0.7},
    "gpt2": {"n_head": 4},
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 64},
    "opt": {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": WIDTH},
}

# Recurrent or convolutional blocks, or positions that are not position ids: two completions cannot share a row.
STANDS_APART: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "expand": 2,
    },
    "bloom": {"n_head": 4},
    "jamba": {**_GLU, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "recurrent_gemma": {
        **_GLU,
        "head_dim": 8,
        "lru_width": WIDTH,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "lfm2": {
        **_GLU,
        "layer_types": ["conv", "full_attention"] * (DEPTH // 2),
        "block_multiple_of": 16,
        "block_auto_adjust_ff_dim": False,
    },
}

FAMILIES = {**PACKS, **STANDS_APART}


def implementations(family: str) -> tuple[str, ...]:
    """The attention implementations of transformers that the family has, of those that can be packed."""
    eager_alone = ("gpt_oss", "gemma2", "mamba2", "bloom", "recurrent_gemma")
    return ("eager",) if family in eager_alone else ("eager", "sdpa")


def tiny(
    family: str,
    *,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = DEVICE,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of the family in eval mode: width 32, 4 layers, vocabulary 101, no special tokens.

    Args:
        family: a key of `FAMILIES` (transformers' model type).
        attn: "eager" or "sdpa".
        overrides: configuration values that win over the defaults here.

    The weights have a standard deviation of 0.2, and norms and biases are jittered too, so that a mistake in the
    mask or the positions moves the logits by far more than rounding.
    """
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": family in ("gemma2", "gemma3_text", "gpt2", "opt"),
    }
    values.update(FAMILIES[family])
    values.update(overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family, **values)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    draw_weights(model, seed)
    return model.to(dtype).to(device).eval()
