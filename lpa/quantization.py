"""Base models in 4 or 8 bits, by bitsandbytes: they stay frozen, and LoRA adapters beside them are trained."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

QUANT_TYPES = ("nf4", "fp4")


def quantized_loading(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quant_type: str = "nf4",
    nested: bool = False,
    dtype: torch.dtype | str = "auto",
) -> dict[str, Any]:
    """The arguments of `lpa.models.load` for quantised weights; empty unless 4 or 8 bits are asked for.

    Args:
        quant_type: of 4-bit weights, "nf4" or "fp4". nested: quantise the scales of 4-bit weights too.
        dtype: of what is computed and of the weights that are not quantised; "auto" is bfloat16 on a GPU and float32
            on the CPU.

    Raises:
        ValueError: both kinds, or an unknown quant_type.
        ImportError: bitsandbytes is not installed.
    """
    if not (load_in_4bit or load_in_8bit):
        return {}
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit=True and load_in_8bit=True exclude each other; give one of them")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"bnb_4bit_quant_type={quant_type!r} is unknown; use {' or '.join(QUANT_TYPES)}")
    if find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
        raise ImportError(f"{name}=True needs the package bitsandbytes (and, to be of use, a GPU): "
                          "pip install bitsandbytes")  # fmt: skip
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
    )
    found: dict[str, Any] = {"quantization_config": config, "dtype": dtype}
    if torch.cuda.is_available():  # whole, on this rank's device: quantised weights are not moved about
        found["device_map"] = {"": PartialState().local_process_index}
    return found


def is_quantized(model: Any) -> bool:
    """Whether the model has quantised weights, by the marks that transformers leaves."""
    return bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))
