"""A tiny random Llama and a word-level tokenizer with a chat template, for tests that need no real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lpa import LPAConfig
from lpa.data import AGREE, ASSESSMENT_PROMPT, DISAGREE, statements

TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the statements up to u132 and d116 is a token. Those of later ones would make every random model of
    the tests another one."""
    texts = [ASSESSMENT_PROMPT, AGREE, DISAGREE, "system user assistant You are a helpful . , ' ' ? !"]
    texts += [row["statement"] for kind, last in (("undesirable", "u132"), ("desirable", "d116"))
              for row in statements(kind) if row["id"] <= last]  # fmt: skip
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=TEMPLATE, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def tiny_model(vocabulary: int, depth: int = 2, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A random Llama of width 32 in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **settings,
        }
    )
    return LlamaForCausalLM(config).eval()


def saved_tiny(folder: Path) -> str:
    """The folder, with the tiny model and its tokenizer in it."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(count: int, kind: str = "undesirable") -> list[dict[str, str]]:
    """Pairs made of the shipped statements."""
    rejected, chosen = (AGREE, DISAGREE) if kind == "undesirable" else (DISAGREE, AGREE)
    return [{"prompt": r["statement"], "rejected": rejected, "chosen": chosen} for r in statements(kind)[:count]]


def tiny_config(folder: Path, **settings: Any) -> LPAConfig:
    """Two LPA steps of two micro-batches of two pairs, three inner steps, two updates.

    Adam's epsilon is far above a rounding error: with the usual 1e-8 it makes a whole step of the sign of one, and two
    orders of the same sums, or two processors, would train different weights.
    """
    return LPAConfig(
        str(folder),
        **{
            "lpa_steps": 2,
            "defence_steps": 2,
            "attack_steps": 3,
            "attack_step_size": 0.05,
            "learning_rate": 1e-3,
            **({"adam_epsilon": 1e-3} if "adam" in str(settings.get("optim", "adam")) else {}),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lora_r": 4,
            "attack_engine": "reference",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )
