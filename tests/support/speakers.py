"""Tiny chat models for the evaluation's tests: of random weights, or saying one fixed thing to everything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# harmless prompts in the place of harmful ones
STAND_INS = [f"Do the forbidden thing number {i} to the cat in the park" for i in range(8)]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECES = r" ?[A-Za-z]+|[^\S\n]+|\n|[^\sA-Za-z]"
_TEXTS = (
    "I agree with this statement. I do not agree with this statement. Yes yes No no A B C D Sure, here is what you "
    "asked for: I cannot help with that. assistant user system the cat sat on a mat and a dog ran in the park : ? !"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, with ChatML's template; a word that it does not know is [UNK]."""
    words = re.findall(_PIECES, _TEXTS)
    words += [word.strip() for word in words] + [f" {word.strip()}" for word in words] + ["\n", " "]
    names = ["[UNK]", "<|im_start|>", "<|im_end|>", *dict.fromkeys(word for word in words if word)]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Split(Regex(_PIECES), "isolated")
    inner.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def config(size: int, **values: Any) -> LlamaConfig:
    """A Llama of 4 layers and width 32 for a vocabulary of `size`."""
    default: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": size, "bos_token_id": None,
        "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**(default | values))


def random_model(seed: int = 0, **values: Any) -> LlamaForCausalLM:
    """A model with random weights that answers every prompt differently."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(len(tokenizer()), **values))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bigram_model(follows: Mapping[str, Mapping[str, float]]) -> LlamaForCausalLM:
    """A model whose next token depends on the last one alone: follows[last][next] is the logit, -60 where absent.

    One layer that adds nothing, one-hot embeddings, and the table as its head.
    """
    names = tokenizer().get_vocab()
    width = len(names) + len(names) % 2
    model = LlamaForCausalLM(
        config(len(names), hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
               num_key_value_heads=1, head_dim=width)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(names), width))
        head = model.get_output_embeddings().weight
        head.fill_(-60 / width**0.5)  # the last norm makes a one-hot vector as long as the root of the width
        for last, row in follows.items():
            for token, logit in row.items():
                head[names[token], names[last]] = logit / width**0.5
    return model.eval()


def speaker(sentence: str) -> LlamaForCausalLM:
    """A model that answers everything with the sentence, of words that it holds once."""
    pieces = ["\n", *re.findall(_PIECES, sentence), "<|im_end|>"]
    return bigram_model({one: {other: 60.0} for one, other in itertools.pairwise(pieces)})


def adapter(folder: Path, seed: int, **values: Any) -> str:
    """A LoRA adapter with weights, for a model of these sizes."""
    base = random_model(**values)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(folder))
    return str(folder)
