"""The shapes that the pieces run: 8B models of two families, random weights, and tiny ones of the same kinds."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import torch

from benchmarks.loop_cases import Shape

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {"vocab_size": 192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "initializer_range": 0.16}  # fmt: skip  # attention scores spread as at width 4096 with 0.02
PROMPT, REJECTED, CHOSEN = 130, 6, 8
BATCH = 16  # pairs an LPA step
STEPS = 16  # inner steps


def shape(family: str, pairs: int, dry: bool) -> Shape:
    """LPA's sites and lengths at a micro-batch of `pairs`; bf16 weights and float32 adapters of rank 64."""
    config = CONFIGS[family] | (TINY if dry else {})
    depth = config["num_hidden_layers"]
    # never the last block, which 30 of 32 is not either
    layers = dict.fromkeys(min(layer * depth // 32, depth - 2) for layer in (8, 16, 24, 30))
    sites = ("embedding", *(f"mlp:{layer}" for layer in layers))
    lengths = (10, 3, 5) if dry else (PROMPT, REJECTED, CHOSEN)
    tiny = "tiny " if dry else ""
    name = f"{tiny}{family}, {pairs} pairs, prompt {lengths[0]}, completions {lengths[1]}, {lengths[2]}"
    return Shape(name, config, sites, pairs, *lengths, dtype=torch.bfloat16, family=family)


def products(family: str, dry: bool) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a block's four products, as the stack joins them."""
    config = CONFIGS[family] | (TINY if dry else {})
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {"qkv": (width, queries + 2 * keys), "o": (queries, width), "gate-up": (width, 2 * inner),
            "down": (inner, width)}  # fmt: skip


@cache
def counted(family: str, pairs: int, dry: bool) -> dict[str, float]:
    """Floating-point operations and tokens of one packed inner step, and planned memory of LPA steps of 16 pairs.

    By `lpa plan`: operations of products and attention, two for a multiplication and an addition.
    """
    from transformers import AutoConfig

    from lpa import LPAConfig
    from lpa.memory import Estimate, PlanShape, estimate

    own, parts = shape(family, pairs, dry), max(BATCH // pairs, 1)
    completion = (own.rejected + own.chosen) // 2  # as many tokens and labels

    def planned(**options: bool) -> Estimate:
        args = LPAConfig(tempfile.gettempdir(), report_to=[], use_cpu=True, lpa_steps=1, attack_sites=list(own.sites),
                         per_device_train_batch_size=pairs, gradient_accumulation_steps=parts, **options)  # fmt: skip
        return estimate(AutoConfig.for_model(family, **own.config), args, PlanShape(own.prompt, completion),
                        dtype=own.dtype, attn_implementation="sdpa")  # fmt: skip

    found, checkpointed = planned(), planned(gradient_checkpointing=True)
    attack = found.phases["attack"]
    return {
        "FLOP": found.attack_flops / STEPS / parts,
        "tokens": found.tokens,
        "planned peak GB": round(found.peak.total() / 1e9, 2),
        "planned peak GB, checkpointed": round(checkpointed.peak.total() / 1e9, 2),
        "planned attack GB without a step": round((attack.total() - attack["activations"] - attack["logits"]) / 1e9, 2),
    }
