"""How a model is held during an inner loop: eval mode, frozen, no autocast, adapters in the weights' dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def weights_dtype(model: nn.Module) -> torch.dtype | None:
    """The float dtype that most of the frozen weights have; None where nothing is frozen (full fine-tuning)."""
    sizes: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and not p.requires_grad:
            sizes[p.dtype] += p.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]


def _has_dropout(model: nn.Module) -> bool:
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return any("drop" in key and isinstance(v, float) and v > 0 for key, v in values.items())


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that wants a gradient; every module's and parameter's own flag comes back.

    Where the model checkpoints its activations, the checkpointed blocks alone keep their training flag, which is
    what transformers asks for it; not where that flag would also switch on dropout.
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
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, flag in training:
            module.training = flag


@contextmanager
def cast_adapters(model: nn.Module) -> Iterator[None]:
    """Float32 adapters on lower-precision weights are replaced by copies in the weights' dtype, then put back."""
    dtype = weights_dtype(model)
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if dtype is not None and dtype.itemsize < 4:
            for p in model.parameters():
                if p.requires_grad and p.dtype == torch.float32:
                    held.append((p, p.data))
                    p.data = p.data.to(dtype)
        yield
    finally:
        for p, data in held:
            p.data = data


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """LoRA merged into the weights, which are put back from copies: subtraction would change 3% of bf16 weights.

    Raises:
        ValueError: the model has no adapter that can be merged.
    """
    layers = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "merged_adapters")]
    if not layers:
        raise ValueError("merge_adapters=True, but the model has no adapter that peft can merge")
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            if layer.merged_adapters:
                continue
            for p in layer.get_base_layer().parameters(recurse=False):  # type: ignore[operator]
                held.append((p, p.data))
                p.data = p.data.clone()
            layer.merge()  # type: ignore[operator]
        yield
    finally:
        kept = {id(p) for p, _ in held}
        for p, data in held:
            p.data = data
        for layer in layers:
            if any(id(p) in kept for p in layer.get_base_layer().parameters(recurse=False)):  # type: ignore[operator]
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
