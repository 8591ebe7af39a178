"""Load a causal language model and its tokenizer by asset name, hub name or path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import assets

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF_MODELS = {DEFAULT_MODEL: "SmolLM2-135M-Instruct.Q4_1.gguf"}
_FLOAT32_BYTES = 540_000_000  # of the embedded model, dequantised
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")


class ModelError(ValueError):
    """The model cannot be trained or measured here; the message says why."""


def load(
    name: str | Path = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer.

    Args:
        name: an asset's name, a hub name or a local folder.
        dtype: of the weights; "auto" is what the checkpoint holds (float32 for the embedded model).
        attn_implementation: "eager", "sdpa", ...; None lets transformers choose.
        options: handed to `from_pretrained` of the model (device_map, revision, ...).

    Raises:
        ModelError: nothing can be loaded by this name, it is no causal language model, or it has no LM head.
        lpa.assets.AssetError: the name is an asset's and it cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve(name)
    known = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **known)
    except (OSError, ValueError, ImportError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"{str(name)!r} is not a causal language model: {str(error).splitlines()[0]}") from error
        raise ModelError(
            f"cannot load {str(name)!r} ({error}); give a folder, a hub name or one of {', '.join(GGUF_MODELS)}"
        ) from error
    _check(str(name), model, info["missing_keys"])
    return model.eval(), tokenizer


def resolve(name: str | Path) -> str:
    """What `from_pretrained` is given for `name`: the folder of an asset's model, made if need be, else `name`."""
    if str(name) in GGUF_MODELS:
        return str(_dequantised(str(name)))
    if str(name) in assets.ASSETS:
        raise ModelError(f"the asset {str(name)!r} is a data set, not a model; the models are {', '.join(GGUF_MODELS)}")
    return str(name)


def context_length(model: Any) -> int | None:
    """The longest sequence the model was made for, in tokens, or None where its configuration does not say."""
    config = model.config.get_text_config()
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _dequantised(name: str) -> Path:
    """The folder with the asset's weights as float32 safetensors, and its tokenizer. Made once: it is slow."""
    target = assets.cache_dir() / "models" / f"{name}-{assets.get(name).sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    source = assets.fetch(name)
    with assets.explained(f"cannot keep {name}", _FLOAT32_BYTES), assets.locked(f"model-{name}"):
        if not (target / "config.json").is_file():  # another process may have made it while this one waited
            assets.build_folder(target, lambda folder: _dequantise(source, GGUF_MODELS[name], folder))
    return target


def _dequantise(source: Path, file: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    except ImportError as error:
        raise ModelError(f"reading {file} needs the gguf package: pip install gguf ({error})") from error
    # save_pretrained refuses to write a quantised model; these weights no longer are one.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    for flag in ("is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def check_head(model: Any, name: str = "the model") -> Any:
    """The model's LM head.

    Raises:
        ModelError: it has none.
    """
    get = getattr(model, "get_output_embeddings", None)
    if get is None or (head := get()) is None:
        raise ModelError(f"{name} ({type(model).__name__}) has no LM head; a causal language model is needed")
    return head


def _check(name: str, model: Any, missing: Any) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} is an encoder-decoder ({config.model_type}); a causal language model is needed")
    head = check_head(model, repr(name))
    heads = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    if lost := heads & set(missing):
        raise ModelError(
            f"{name!r} was saved without its LM head ({', '.join(sorted(lost))} is missing); a causal language model "
            "is needed, not its base"
        )
    # Encoders that can also be run as decoders (bert, roberta, ...) have both settings; gpt_neox has the first alone
    # and pays it no heed.
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        raise ModelError(f"{name!r} ({config.model_type}) attends in both directions; a causal one is needed")
