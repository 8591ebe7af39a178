"""How a model is held during an inner loop: eval mode, frozen, no autocast, adapters in the weights' dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .hooks import swapped

_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # adapter -> its copy, where captured graphs read it


def weights_dtype(model: nn.Module) -> torch.dtype | None:
    """The float dtype that most of the frozen weights have; None where nothing is frozen (full fine-tuning)."""
    sizes: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and not p.requires_grad:
            sizes[p.dtype] += p.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]


def _not_reentrant(checkpoint: Any) -> Any:
    """transformers' checkpointing function, told so; nothing random is left in eval mode, so no state to keep."""
    if not isinstance(checkpoint, partial):
        return checkpoint
    keywords = checkpoint.keywords | {"use_reentrant": False, "preserve_rng_state": False}
    return partial(checkpoint.func, *checkpoint.args, **keywords)


def _has_dropout(model: nn.Module) -> bool:
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return any("drop" in key and isinstance(v, float) and v > 0 for key, v in values.items())


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that wants a gradient; every module's and parameter's own flag comes back.

    Where the model checkpoints its activations, the checkpointed blocks alone are in training mode, which is what
    transformers asks for it; not where that flag would also switch on dropout. Reentrant checkpointing, which knows
    no gradient of anything but inputs, is exchanged for the other kind.
    """
    training = [(m, m.training) for m in model.modules()]
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        if not _has_dropout(model):
            for module in _checkpointed(model):
                module.training = True
        for p in wanted:
            p.requires_grad_(False)
        with swapped(model, "_gradient_checkpointing_func", _not_reentrant):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, flag in training:
            module.training = flag


@contextmanager
def cast_adapters(model: nn.Module) -> Iterator[None]:
    """Float32 adapters on lower-precision weights are replaced by copies in the weights' dtype, then put back.

    A copy stays where it is for as long as the adapter lives, so that captured graphs find it there again.
    """
    dtype = weights_dtype(model)
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if dtype is not None and dtype.itemsize < 4:
            for p in model.parameters():
                if p.requires_grad and p.dtype == torch.float32:
                    copy = _copies.get(p)
                    if copy is None or (copy.dtype, copy.device, copy.shape) != (dtype, p.device, p.shape):
                        copy = _copies[p] = torch.empty_like(p.data, dtype=dtype)
                    copy.copy_(p.data)
                    held.append((p, p.data))
                    p.data = copy
        yield
    finally:
        for p, data in held:
            p.data = data


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """LoRA merged into the weights, which are put back from copies: subtraction would change 3% of bf16 weights.

    The weights are changed where they are and the copies are what goes, so that captured graphs find them again.

    Raises:
        ValueError: the model has no adapter that can be merged.
    """
    layers = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "merged_adapters")]
    if not layers:
        raise ValueError("merge_adapters=True, but the model has no adapter that peft can merge")
    layers = [layer for layer in layers if not layer.merged_adapters]
    for layer in layers:
        for name, p in layer.get_base_layer().named_parameters(recurse=False):  # type: ignore[operator]
            if not p.is_floating_point():
                raise ValueError(f"merge_adapters=True, but the {name} under an adapter is quantised ({p.dtype})")
    held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    try:
        for layer in layers:
            for p in layer.get_base_layer().parameters(recurse=False):  # type: ignore[operator]
                held.append((p, p.data, p.data.clone()))
            layer.merge()  # type: ignore[operator]
        yield
    finally:
        for p, data, saved in reversed(held):  # where two layers share a weight, the first copy is the one to keep
            p.data = data
            p.data.copy_(saved)
        for layer in layers:
            layer.merged_adapters.clear()  # type: ignore[operator, union-attr]


@contextmanager
def inner_mode(model: nn.Module, merge_adapters: bool = False, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Everything above together. `autocast` is None for none at all, whatever is active around this call."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=autocast, enabled=autocast is not None))
        if merge_adapters:
            stack.enter_context(merged_adapters(model))
        elif autocast is None:
            stack.enter_context(cast_adapters(model))
        stack.enter_context(frozen_eval(model))
        stack.enter_context(torch.enable_grad())
        yield
