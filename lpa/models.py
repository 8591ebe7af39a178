"""Load a causal language model and its tokenizer by asset name, hub name or path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lpa_kernels.attack import takes_from_base
from lpa_kernels.model import resolve_sites

from . import assets
from .files import write_json
from .messages import one_line
from .run_folder import ADAPTER, MODEL

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF_MODELS = {DEFAULT_MODEL: "SmolLM2-135M-Instruct.Q4_1.gguf"}
_FLOAT32_BYTES = 540_000_000  # of the embedded model, dequantised
# Starts of LoRA that peft 0.21.2 draws at random or takes from data anew when it loads what was saved
_MADE_ONCE = tuple(f"init_lora_weights='{start}" for start in ("pissa_niter", "corda", "lora_ga"))
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
    """The model, in eval mode, and its tokenizer. An adapter's folder gives its base model with that adapter in it, to
    be trained on (a `PeftModel`).

    Args:
        name: an asset's name, a hub name or a local folder, of a model or of an adapter.
        dtype: of the weights; "auto" is what the checkpoint holds (float32 for the embedded model).
        attn_implementation: "eager", "sdpa", ...; None lets transformers choose.
        options: handed to `from_pretrained` of the model (device_map, revision, ...).

    Raises:
        ModelError: nothing can be loaded by this name, it is no causal language model, or it has no LM head.
        lpa.assets.AssetError: the name is an asset's and it cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve(name)
    known: dict[str, Any] = {
        key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options
    }
    if (base := adapter_base(where, **known)) is not None:
        options = {key: value for key, value in options.items() if key != "revision"}  # the adapter's, not the base's
        model, tokenizer = load(
            base, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **options
        )
        return _with_adapter(model, tokenizer, where, known)
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
    """What `from_pretrained` is given for `name`: the folder of an asset's model, made if need be, else `name`, where a
    ~ at its beginning is the home folder."""
    if str(name) in GGUF_MODELS:
        return str(_dequantised(str(name)))
    if str(name) in assets.ASSETS:
        raise ModelError(f"the asset {str(name)!r} is a data set, not a model; the models are {', '.join(GGUF_MODELS)}")
    return str(Path(name).expanduser()) if str(name).startswith("~") else str(name)


def outline(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The modules of a model, or of an adapter's base, on the meta device; None where they cannot be made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve(adapter_base(name) or name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model says what is wrong
        return None


def check_sites(model: Any, sites: Sequence[str]) -> None:
    """Refuse sites that an outline does not have. Names of modules are left out, since adapters change them.

    Raises:
        ValueError: the model has no such site.
    """
    if model is not None and (numbered := [site for site in sites if ":" in site]):
        resolve_sites(model, numbered)


def adapter_base(name: str | Path, **options: Any) -> str | None:
    """The base model that an adapter names; None where `name` is no adapter.

    Args:
        name: a folder or a hub name. options: revision, token, cache_dir, local_files_only.

    Raises:
        ModelError: the adapter names no base, or names itself.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if str(name) in assets.ASSETS:
        return None
    where = Path(name).expanduser()
    if where.exists():
        file: str | Path | None = where / ADAPTER
    else:
        try:
            file = find_adapter_config_file(str(name), **options)
        except (OSError, ValueError):  # no such name, or no hub: loading the model says it better
            file = None
    if file is None or not Path(file).is_file():
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or Path(base).expanduser().resolve() == where.resolve():
        raise ModelError(
            f"the adapter {name} does not say which model it is for (base_model_name_or_path is {base!r}); give that "
            "model as --model (in Python load it, and use PeftModel.from_pretrained(model, adapter, is_trainable=True))"
        )
    return str(base)


def base_and_adapters(model: str | None, adapters: Sequence[str]) -> tuple[str, list[str]]:
    """(the base model, all adapters), where `model` may be an adapter too, or be left to what the adapters name.

    Args:
        adapters: folders or hub names, also as NAME=FOLDER.

    Raises:
        ModelError: the adapters name several base models.
    """
    if model is not None:
        base = adapter_base(model)
        return (model, list(adapters)) if base is None else (base, [model, *adapters])
    paths = [path if Path(path).exists() else path.rpartition("=")[2] for path in adapters]
    named = dict.fromkeys(base for path in paths if (base := adapter_base(path)) is not None)
    if len({resolve(base) for base in named}) > 1:  # checkpoints of former releases name an asset's folder
        raise ModelError(f"the adapters are of several base models ({', '.join(named)}); give one as --model")
    return next(iter(named), DEFAULT_MODEL), list(adapters)


def name_base(folder: Path) -> None:
    """Have a saved adapter name an asset as its users do: the asset's folder is a path of this machine."""
    if (file := folder / ADAPTER).is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        names = {str(_folder_of(name)): name for name in GGUF_MODELS}
        if name := names.get(held.get("base_model_name_or_path")):
            write_json(file, held | {"base_model_name_or_path": name})


def _with_adapter(model: Any, tokenizer: Any, where: str, known: dict[str, Any]) -> tuple[Any, Any]:
    """The base model with an adapter to be trained on, and the adapter's own tokenizer where it has one."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    try:
        start = made_once(PeftConfig.from_pretrained(where))
        adapted = PeftModel.from_pretrained(model, where, is_trainable=True, **known)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the adapter {where} does not fit {model.config._name_or_path!r}: {one_line(error)}"
        ) from error
    if start:
        raise ModelError(
            f"the adapter {where} has {start}, and peft makes another start when it loads that; merge it where it was "
            "trained (merge_and_unload), and give that model"
        )
    for held in adapted.peft_config.values():  # where peft finds its configuration; `name_base` gives an asset its name
        held.base_model_name_or_path = model.config._name_or_path
    if (Path(where) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(where)
    return adapted.eval(), tokenizer


def made_once(config: Any) -> str:
    """The start of an adapter that peft loads as another one than was saved (`_MADE_ONCE`); empty elsewhere."""
    start = takes_from_base(config)
    return start if start.startswith(_MADE_ONCE) else ""


def context_length(model: Any) -> int | None:
    """The longest sequence the model was made for, in tokens, or None where its configuration does not say."""
    config = model.config.get_text_config()
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _folder_of(name: str) -> Path:
    return assets.cache_dir() / "models" / f"{name}-{assets.get(name).sha256[:12]}"


def _dequantised(name: str) -> Path:
    """The folder with the asset's weights as float32 safetensors, and its tokenizer. Made once: it is slow."""
    target = _folder_of(name)
    if (target / MODEL).is_file():
        return target
    source = assets.fetch(name)
    with assets.explained(f"cannot keep {name}", _FLOAT32_BYTES), assets.locked(f"model-{name}"):
        if not (target / MODEL).is_file():  # another process may have made it while this one waited
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
    # and ignores it.
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        raise ModelError(f"{name!r} ({config.model_type}) attends in both directions; a causal one is needed")
