"""Golden vectors: what the public LAT code gives on a tiny Llama, and the model they were made on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "llama"


@dataclass(frozen=True)
class Golden:
    """`info` is cases.json; `tensors` the vectors by name."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix` and a dot, without it (copies)."""
        start = prefix + "."
        return {k[len(start) :]: v.clone() for k, v in self.tensors.items() if k.startswith(start)}

    def lat_batch(self, name: str = "batch") -> dict[str, Tensor]:
        """A batch in the public code's keys, masks as bool. `name` is "batch" or "sft"."""
        return {k: v.bool() if k.endswith("mask") else v for k, v in self.group(name).items()}

    def model(self, lora: bool) -> torch.nn.Module:
        """The golden model in float32 and eval mode, with the golden LoRA adapters if asked."""
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**self.info["config"]))
        model.load_state_dict(self.group("model"))
        if not lora:
            return model.eval()
        from peft import LoraConfig, get_peft_model

        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **self.info["lora"]))
        missing = peft.load_state_dict(self.group("lora"), strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        return peft.eval()


@cache
def load_golden() -> Golden:
    """The golden vectors, read once."""
    return Golden(json.loads((FOLDER / "cases.json").read_text()), load_file(FOLDER / "vectors.safetensors"))
