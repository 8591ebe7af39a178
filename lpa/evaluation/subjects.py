"""The models that are compared: a base model and adapters on it, loaded, checked and switched."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lpa.messages import one_line
from lpa.models import made_once
from lpa.run_folder import ADAPTER, MODEL, checkpoint_folders, updates_of
from lpa_kernels.attack import Left, left_by, left_in_base, takes_from_base
from lpa_kernels.model import eval_mode, merged_adapters

BASE = "base"
# Starts of LoRA that peft 0.21.2 can save as a plain LoRA
_CONVERTED = tuple(f"init_lora_weights='{start}" for start in ("pissa", "olora", "corda", "lora_ga"))
STEP = "step "  # before the updates in a checkpoint's name


class EvaluationError(ValueError):
    """The evaluation is impossible as asked; the message says why and what to do."""


def named_adapters(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    """Adapter paths by a short name: the mapping's key, NAME of "NAME=PATH", or the last folders that tell them apart.

    Raises:
        EvaluationError: a name given twice, or "base".
    """
    if isinstance(adapters, Mapping):
        pairs = [(str(name), str(path)) for name, path in adapters.items()]
    else:
        paths = [str(item) for item in adapters]
        given = [tuple(path.split("=", 1)) if "=" in path and not Path(path).exists() else ("", path) for path in paths]
        depth = 1
        while depth < 8 and len({_tail(path, depth) for _, path in given}) < len({path for _, path in given}):
            depth += 1
        pairs = [(name or _tail(path, depth), path) for name, path in given]
    names = [name for name, _ in pairs]
    for name in names:
        if name == BASE or names.count(name) > 1:
            raise EvaluationError(f"two subjects would be called {name!r}; name adapters as NAME=PATH")
    return dict(pairs)


def check_adapters(paths: Mapping[str, str]) -> None:
    """Refuse what is no adapter, before a model is loaded.

    Raises:
        EvaluationError: one cannot be read; the message names it.
    """
    for path in paths.values():
        adapter_config(path)


def warn_of_templates(paths: Mapping[str, str], tokenizer: Any) -> None:
    """Warn of adapters that were saved with another chat template than the one that they are asked under."""
    for name, path in paths.items():
        if (Path(path) / "tokenizer_config.json").is_file():
            own = AutoTokenizer.from_pretrained(path).chat_template
            if own and own != tokenizer.chat_template:
                text = f"the adapter {name} was saved with a chat template of its own ({path})"
                warnings.warn(f"{text}; it is asked under the base model's, which is another", stacklevel=3)


def checkpoints_of(run: str | Path) -> dict[str, str]:
    """The adapters in a training run's checkpoints: "step N", N model updates, by folder, the first ones first.

    Raises:
        EvaluationError: the run has no checkpoint with an adapter.
    """
    folders = [path for path in checkpoint_folders(Path(run).expanduser()) if (path / ADAPTER).is_file()]
    if not folders:
        raise EvaluationError(f"{run} has no checkpoint with an adapter; train with --save_strategy steps")
    return {f"{STEP}{updates_of(path)}": str(path) for path in reversed(folders)}


def _tail(path: str, depth: int) -> str:
    return "/".join(Path(path).parts[-depth:])


class Subjects:
    """A base model with several adapters in it. `close` takes the adapters off again.

    Args:
        model: a causal language model, or a `PeftModel`, whose own adapters then are subjects too.
        adapters: name -> folder (or hub name) of a PEFT adapter.
        base: whether the base model is a subject too.

    Raises:
        EvaluationError: an adapter that cannot be read, does not fit this model, or leaves it no base model to compare.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str], base: bool = True) -> None:
        self.model, self._given, self._base = model, model, base
        self._adapters: dict[str, str] = {str(name): str(name) for name in getattr(model, "peft_config", {})}
        self._added: list[str] = []
        self.paths: dict[str, str] = {BASE: str(getattr(model.config, "_name_or_path", "") or type(model).__name__)}
        if base and (left := left_in_base(model)):
            raise _no_base(f"the model's adapter {left.adapter!r}", left, model.peft_config[left.adapter])
        try:
            for number, (name, path) in enumerate(adapters.items()):
                if name in self._adapters:
                    raise EvaluationError(f"the model has an adapter {name!r} already; name the other one differently")
                inner = f"lpa_{number}"
                self._add(path, inner)
                self._adapters[name] = inner
                self.paths[name] = path
        except Exception:
            self.close()
            raise

    def _add(self, path: str, inner: str) -> None:
        """Put one more adapter into the model; each of its tensors must have a counterpart there."""
        from peft import PeftModel, get_peft_model, set_peft_model_state_dict

        config, weights = _read_adapter(path)
        check_start(f"the adapter {path}", config, self._base)
        own, made_for = str(getattr(self.model.config, "_name_or_path", "")), str(config.base_model_name_or_path or "")
        mismatch = f"the adapter {path} does not fit this model ({own or type(self._given).__name__}); it was made for "
        mismatch += f"{made_for or 'an unnamed one'}: "
        try:
            self._added.append(inner)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT, on names; fit is checked below
                if isinstance(self.model, PeftModel):
                    self.model.add_adapter(inner, config)
                else:
                    self.model = get_peft_model(self.model, config, adapter_name=inner)
                moved = _keep_base(self.model, weights) if self._base else []
                result = None if moved else set_peft_model_state_dict(self.model, weights, adapter_name=inner)
        except (ValueError, RuntimeError, KeyError) as error:
            raise EvaluationError(mismatch + one_line(error)) from error
        if result is None:
            raise _not_its_base(path, config, moved)
        odd = [*result.unexpected_keys, *(key for key in result.missing_keys if inner in key.split("."))]
        if odd:
            raise EvaluationError(f"{mismatch}{len(odd)} tensors have no counterpart, such as {odd[0]}")
        one, other = Path(made_for).name, Path(own).name  # an asset's folder has its hash behind the name
        if one and other and not (one.startswith(other) or other.startswith(one)):
            warnings.warn(f"the adapter {path} was made for {made_for}; the model is {own}; shapes fit", stacklevel=5)

    @property
    def names(self) -> list[str]:
        """The base model first where it is a subject, then the adapters in the order given."""
        return [*([BASE] if self._base else []), *self._adapters]

    @property
    def adapters(self) -> dict[str, str]:
        """Name -> folder of the adapters."""
        return {name: path for name, path in self.paths.items() if name != BASE}

    @property
    def dtype(self) -> str:
        """Of the weights, as "bfloat16"."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Of the first weight."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The model as one subject, in eval mode.

        Where all weights are float32 the adapter is merged for that time: it is faster and differs by rounding alone.
        In shorter formats merging would change the model.
        """
        active = getattr(self.model, "active_adapter", None)
        try:
            if name != BASE:
                self.model.set_adapter(self._adapters[name])
            with eval_mode(self.model), ExitStack() as stack:
                if name != BASE:
                    stack.enter_context(_merged_if_exact(self.model))
                elif self._adapters:
                    stack.enter_context(self.model.disable_adapter())
                yield self.model
        finally:
            if active is not None and self._adapters:
                self.model.set_adapter(active)

    def fingerprint(self, name: str) -> str:
        """A hash of a sample of the subject's weights: the same weights give the same hash in any folder."""
        held = self.model.named_parameters()
        if name == BASE:
            return fingerprint((key, value) for key, value in held if "lora_" not in key)
        mark = re.compile(rf"\.{re.escape(self._adapters[name])}(?=\.|$)")  # lpa_1 is no part of lpa_10
        return fingerprint((mark.sub("", key), value) for key, value in held if mark.search(key))

    def close(self) -> None:
        """Remove the adapters that were loaded here."""
        if self.model is not self._given:
            self.model.unload()
            self.model = self._given
        elif hasattr(self._given, "peft_config"):
            for inner in self._added:
                self.model.delete_adapter(inner)
        self._added = []


@contextmanager
def _merged_if_exact(model: Any) -> Iterator[None]:
    """The active adapter merged, where all weights are float32 and peft can."""
    with ExitStack() as stack:
        if all(p.dtype == torch.float32 for p in model.parameters()):
            with suppress(ValueError):  # an adapter of a kind, or at a place, that cannot be merged
                stack.enter_context(merged_adapters(model))
        yield


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and up to 256 evenly spaced values of each tensor, names in order, wrappers aside."""
    held = {name.replace("base_model.model.", "").replace(".base_layer", ""): value for name, value in parameters}
    hasher = hashlib.sha256()
    for name in sorted(held):
        flat = held[name].detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
        hasher.update(f"{name}{tuple(held[name].shape)}".encode())
        hasher.update(values.numpy().tobytes())
    return hasher.hexdigest()


def adapter_config(path: str) -> Any:
    """An adapter's configuration.

    Raises:
        EvaluationError: there is none, or no weights beside it.
    """
    from peft import PeftConfig

    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / ADAPTER).is_file():
        what = "a whole model: evaluate it with --model" if (folder / MODEL).is_file() else "no adapter"
        raise EvaluationError(f"{path} holds no {ADAPTER}; it is {what}")
    if folder.is_dir() and not any(folder.glob("adapter_model*.safetensors")):
        raise EvaluationError(f"{path} holds no adapter_model.safetensors; adapters in pickles (.bin) are not read")
    with _reading(path) as where:
        return PeftConfig.from_pretrained(where)


def check_start(whose: str, config: Any, base: bool = True) -> None:
    """Refuse an adapter that stands on other weights than the base model's.

    Args:
        base: whether the base model is compared with; else the adapter is refused only where peft loads another one.

    Raises:
        EvaluationError: it took its start out of the base weights, or repeats layers.
    """
    left = left_by(config)
    if left is not None and (base or made_once(config)):
        raise _no_base(whose, left, config, base)


def _no_base(whose: str, left: Left, config: Any, base: bool = True) -> EvaluationError:
    """What is wrong with an adapter that changes the base model, and what would be right."""
    wrong = f"{left.what}, so that no base model is left to compare with"
    if not base:
        wrong = "peft cannot make again as it loads the adapter"
    here = "where it was trained (merge_and_unload)" if made_once(config) else "with lpa export"
    right = f"train one with {left.instead}"
    if _converts(config):
        right = "save it where it was trained as a plain LoRA, by save_pretrained's "
        right += "path_initial_model_for_weight_conversion: the adapter as it was before training"
    return EvaluationError(
        f"{whose} has {left.setting}, which {wrong}; {right}, or merge it {here} and evaluate that model with --model"
    )


def _converts(config: Any) -> bool:
    """Whether peft 0.21.2 can save an adapter as a plain LoRA. It refuses some of the others, and of some it loses a
    part without a word: DoRA's magnitudes, KaSA's scales."""
    if not takes_from_base(config).startswith(_CONVERTED):
        return False
    others = (
        config.use_dora,
        getattr(config, "kasa_config", None),
        config.modules_to_save,
        config.trainable_token_indices,
    )
    scaled = config.use_rslora and (config.rank_pattern or config.alpha_pattern)
    return not (any(others) or scaled or config.bias != "none")


def _not_its_base(path: str, config: Any, moved: Sequence[str]) -> EvaluationError:
    """An adapter's file holds tensors of a base model, and those of this one are others."""
    bias, more = getattr(config, "bias", "none"), f" and {len(moved) - 1} more" if moved[1:] else ""
    right = "save it with save_embedding_layers=False, if they were not trained"
    if bias != "none":
        right = "train one with bias='none'"
    return EvaluationError(
        f"the adapter {path} (bias={bias!r}) holds base weights that are not this model's ({moved[0]}{more}), "
        f"so that no base model is left to compare with; {right}, or merge it with lpa export and evaluate that model "
        "with --model"
    )


def _keep_base(model: Any, weights: dict[str, Tensor]) -> list[str]:
    """Take the base model's own tensors out of an adapter's; the names of those that have other values in the model.

    peft saves biases that were trained, and embeddings that have an adapter. A name in both is the base model's: in the
    model an adapter's own tensors have its name in theirs.
    """
    held, moved = dict(model.named_parameters(remove_duplicate=False)), list[str]()
    held = {key: own for key, own in held.items() if key in weights and own.is_floating_point()}
    for key, own in held.items():
        if own.shape != weights[key].shape:
            continue  # does not fit, as peft will say
        saved, own = weights.pop(key), own.detach().cpu()
        coarse = max(saved.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(saved.to(coarse), own.to(coarse)):
            moved.append(key.removeprefix("base_model.model.").replace(".base_layer", ""))
    return moved


def _read_adapter(path: str) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's configuration and tensors.

    Raises:
        EvaluationError: they cannot be read.
    """
    from peft.utils import load_peft_weights

    config = adapter_config(path)
    config.inference_mode = True
    with _reading(path) as where:
        return config, load_peft_weights(where, device="cpu")


@contextmanager
def _reading(path: str) -> Iterator[str]:
    folder = Path(path).expanduser()
    try:
        yield str(folder) if folder.exists() else path
    except Exception as error:  # hub and file errors of many kinds
        raise EvaluationError(f"the adapter {path} cannot be read: {one_line(error)}") from error
