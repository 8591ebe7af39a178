"""Tiny random models of any type of transformers that writes text, made from its configuration with the sizes cut."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WIDTH, DEPTH, HEADS, WINDOW = 128, 32, 4, 4, 24

# What a configuration's number is cut to, by the first of these that its name contains.
_SIZES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("vocab_size",), VOCAB),
    (("sliding_window", "chunk_size", "window_size", "local_attention", "attention_window"), WINDOW),
    (("max_position", "n_positions", "n_ctx", "max_sequence", "max_seq_len", "context_length"), 256),
    (("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depth"), DEPTH),
    (("linear_num_", "mamba_n_heads", "mamba_num_heads"), HEADS),
    (("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    (("attention_heads", "n_head", "num_heads", "num_query"), HEADS),
    (("qk_rope", "qk_nope", "v_head_dim", "qk_head", "head_dim", "d_kv", "headdim", "d_head", "index_head"), 8),
    (("lora_rank", "_rank", "lora_dim"), 8),
    (("topk_group",), 1),
    (("index_topk",), WINDOW),
    (("experts_per_tok", "top_k", "topk", "moe_k", "selected_experts"), 2),
    (("n_group", "n_groups"), 1),
    (("num_shared", "n_shared", "shared_experts"), 1),
    (("num_experts", "local_experts", "routed_experts", "n_experts", "moe_num"), 4),
    (("state_size", "d_state", "d_conv", "conv_kernel", "conv_l_cache"), 4),
    (("intermediate", "ffn", "n_inner", "d_ff", "feed_forward", "mlp_dim"), 48),
    (("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "proj_dim", "lru_width", "emb_dim"), WIDTH),
)

# What the rules above cannot know of a type: values that have to fit each other, or that its defaults leave out.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 4, "num_expert_group": 1, "n_group": 1, "topk_group": 1},
    "bamba": _MAMBA,
    "beam": {"n_group": 1, "topk_group": 1},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "n_heads": HEADS},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2)},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_headdim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 256,
        "split_ngram_parts": 2,
        "hc_lowrank": 8,
    },
    "xmod": {"default_language": "en_XX"},
}


def _cut(name: str, value: Any) -> Any:
    """The value for a configuration's entry: a size cut, an id brought into the vocabulary, or itself."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith(("_token_id", "_token_index")):
        return value if 0 <= value < VOCAB else VOCAB - 1
    for parts, size in _SIZES:
        if any(part in name.lower() for part in parts):
            return min(value, size) if value > 0 else value
    return value


def shrunk(config_class: Any) -> dict[str, Any]:
    """Arguments for a configuration of this class: its defaults with sizes cut, sub-configurations too."""
    default = config_class()
    depth = getattr(default, "num_hidden_layers", None)
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("transformers_version", "model_type"):
            continue
        if name in getattr(config_class, "sub_configs", {}):
            values[name] = None if value is None else shrunk(type(value))
        elif name in ("num_key_value_heads", "num_kv_heads") and value == getattr(default, "num_attention_heads", None):
            values[name] = HEADS  # attention without groups stays so
        elif isinstance(value, dict) and "rope_type" in value and config_class.base_config_key == "text_config":
            half = int(4 * value.get("partial_rotary_factor", 1.0))  # of a head of 8
            values[name] = value | {"mrope_section": [half - half // 3 * 2, half // 3, half // 3]}
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth and len(value) > DEPTH:
            values[name] = _spread(list(value))
        else:
            cut = _cut(name, value)
            if cut != value:
                values[name] = cut
    return values


def _spread(items: list[Any]) -> list[Any]:
    """DEPTH of a long list's entries, every kind of entry among them as far as there is room, in their order."""
    chosen = sorted({items.index(item) for item in items})[:DEPTH]
    rest = (index for index in range(len(items)) if index not in chosen)
    while len(chosen) < DEPTH:
        chosen.append(next(rest))
    return [items[index] for index in sorted(chosen)]


def build(model_type: str, attention: str = "eager", seed: int = 0, wide: bool = False, **changes: Any) -> Any:
    """A random float32 model of this type in eval mode, whose matrices are large enough for mistakes to show.

    Args:
        changes: of its configuration.
    """
    values = shrunk(CONFIG_MAPPING[model_type]) | _OWN.get(model_type, {}) | changes
    if wide:  # for quantisers, whose groups hold 64 entries and more
        values |= {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(model_type, **values)
        if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
            config.is_decoder = True  # bert's kind is a decoder on demand
        torch.manual_seed(seed)
        plain = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        auto = AutoModelForCausalLM if plain else AutoModelForImageTextToText
        model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if sum(p.numel() for p in model.parameters()) > 20_000_000:
        raise ValueError(f"the shrunk {model_type} still has {sum(p.numel() for p in model.parameters())} parameters")
    draw_weights(model, seed, 0.1 if wide else 0.2)
    return model.eval()


def draw_weights(model: torch.nn.Module, seed: int, scale: float = 0.2) -> None:
    """Draw every matrix anew with `scale` for deviation, and move every vector, so that no part of a block is idle."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias", "recurrent_param")):
                continue  # a state's decay, where the library's start keeps it stable
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise * scale) if parameter.dim() > 1 else parameter.add_(noise * 0.05)
