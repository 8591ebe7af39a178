"""How a model is held during an inner loop: eval mode, frozen, no autocast, adapters in the weights' dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.functional import no_autocast
from .facts import model_key, remembered, say_once
from .hooks import checkpoints, not_compiled
from .joined import weights_joined
from .lean import is_compiled, lean_layers
from .sharding import at_rest, is_sharded, left_out
from .walk import modules_of, parameters_of

_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # a block's flag, by version of transformers
_REPACKS = "support_avx512bf16_for_cpu"  # what bitsandbytes calls the flag of its 4-bit layers
_NOISE = 0.05  # of LoRA's second factor: it moves a layer's output by about a tenth
KEPT_ON = {"cuda"}  # devices with captured graphs, which find the copies of adapters where they were


def weights_dtype(model: nn.Module) -> torch.dtype | None:
    """The float dtype that most of the frozen weights have; None where nothing is frozen (full fine-tuning)."""
    sizes: Counter[torch.dtype] = Counter()
    for p in parameters_of(model):
        if p.is_floating_point() and not p.requires_grad:
            sizes[p.dtype] += p.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [m for m in modules_of(model) if any(getattr(m, flag, False) is True for flag in _CHECKPOINTING)]


def _not_reentrant(checkpoint: Any) -> Any:
    """A checkpointing function with use_reentrant=False. In eval mode nothing is random, so no state is kept."""
    if not isinstance(checkpoint, partial):
        return checkpoint
    keywords = checkpoint.keywords | {"use_reentrant": False, "preserve_rng_state": False}
    return partial(checkpoint.func, *checkpoint.args, **keywords)


def _has_dropout(model: nn.Module) -> bool:
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return any("drop" in key and isinstance(v, float) and v > 0 for key, v in values.items())


def _set_training(module: nn.Module, flag: bool) -> None:
    if "training" in module.__dict__:
        module.__dict__["training"] = flag  # plain assignment looks everywhere else first, at thousands of modules
    else:  # a scripted module has it elsewhere
        module.training = flag


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode that it was in, whatever mode its parent is in."""
    training = [(m, m.training) for m in modules_of(model)]
    try:
        for module, _ in training:
            _set_training(module, False)
        yield
    finally:
        for module, flag in training:
            _set_training(module, flag)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """For passes that find something out: eval mode, without gradients or autocast, nothing repacked."""
    with torch.no_grad(), no_autocast(next(model.parameters()).device), eval_mode(model), not_repacked(model):
        yield


@contextmanager
def as_if_trained(model: nn.Module) -> Iterator[None]:
    """Within it, adapters as they are made hold noise, so that what is found out still holds once they are trained.

    A new adapter changes nothing: any check of it passes. Most begin at 0, and some (IA3) at 1. The parameters get
    other data for the time, always the same, and their own back; theirs is never written. Sharded adapters are left
    alone.
    """
    draw = torch.Generator().manual_seed(0)
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for p in [] if is_sharded(model) else _adapters(model):
            if p.is_floating_point() and not p.is_meta and bool((p == 0).all() | (p == 1).all()):
                held.append((p, p.data))
                p.data = p.data + (torch.randn(p.shape, generator=draw) * _NOISE).to(p)
        yield
    finally:
        for p, data in held:
            p.data = data


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of adapters, whatever tuner of peft they are of, but for those that are merged."""
    parts: list[nn.Module] = []
    for module in modules_of(model):
        names = getattr(module, "adapter_layer_names", None)
        if isinstance(names, tuple) and not getattr(module, "merged", False):
            parts += [below for name in names for below in _below(getattr(module, name, None))]
    return list({id(p): p for part in parts for p in part._parameters.values() if p is not None}.values())


@contextmanager
def not_repacked(model: nn.Module) -> Iterator[None]:
    """Within it, 4-bit layers of bitsandbytes on a CPU keep their weights in the order that their backward reads.

    In eval mode a pass without gradients puts them into another order, for a faster kernel that has no backward; the
    gradients of later passes are then those of other weights, without an error. What was repacked before is undone.
    """
    layers = [m for m in modules_of(model) if getattr(m, _REPACKS, False)]
    try:
        for layer in layers:
            setattr(layer, _REPACKS, False)
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as undone

                weight: Any = layer.weight
                weight.data, weight.quant_state = undone(weight.data, weight.quant_state)
        yield
    finally:
        for layer in layers:
            setattr(layer, _REPACKS, True)


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, and no parameter wants a gradient; every parameter's own flag comes back.

    Where the model checkpoints its activations, the checkpointed blocks alone are in training mode, which is what
    transformers asks for it; not where that flag would also switch on dropout. Reentrant checkpointing, which knows
    no gradient of anything but inputs, is exchanged for the other kind.
    """
    with eval_mode(model):
        checkpointed = _checkpointed(model)
        if checkpointed and _has_dropout(model):
            say_once(
                model,
                f"{type(model).__name__} has dropout in its configuration: its activations are not checkpointed in the "
                "inner loop, since the mode that does so would drop some",
            )
        else:
            for module in checkpointed:
                module.training = True
        with at_rest(model), kept_flags(model), checkpoints(model, _not_reentrant):
            for p in parameters_of(model):
                p.requires_grad_(False)
            yield


@contextmanager
def kept_flags(model: nn.Module) -> Iterator[None]:
    """Every parameter wants a gradient afterwards if it did before, whatever happens within."""
    wanted = [(p, p.requires_grad) for p in parameters_of(model)]
    try:
        yield
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)


@contextmanager
def cast_adapters(model: nn.Module) -> Iterator[None]:
    """Float32 adapters on lower-precision weights are replaced by copies in the weights' dtype, then put back.

    The parameters themselves stay as they are: data of another dtype would cost them their gradients' accumulators,
    and with these the hooks by which DDP keeps ranks together. On a device with captured graphs a copy stays where it
    is for as long as the adapter lives. Sharded adapters are left alone, which is said: each pass gathers them anew.
    """
    dtype, sharded = weights_dtype(model), is_sharded(model)
    copies: dict[nn.Parameter, nn.Parameter] = {}
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        if dtype in (torch.float16, torch.bfloat16):  # no narrower one: float8 holds weights and computes nothing
            for module in _castable(model):
                for name, p in module._parameters.items():
                    if p is not None and p.requires_grad and p.dtype == torch.float32:
                        if sharded:
                            say_once(
                                model,
                                left_out(model, f"adapters stay float32 in the inner loop, without copies in {dtype}"),
                            )
                            continue
                        if p not in copies:
                            copies[p] = _copy(module, name, p, dtype)
                        held.append((module, name, p))
                        module._parameters[name] = copies[p]
            if copies:
                torch._foreach_copy_([copy.data for copy in copies.values()], [p.data for p in copies])
        yield
    finally:
        for module, name, p in held:
            module._parameters[name] = p


def _castable(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters may be cast: not those of adapters other than LoRA, which cast the hidden states."""
    others: set[int] = set()
    for module in modules_of(model):
        names = getattr(module, "adapter_layer_names", None)  # of peft's layers, whatever tuner they are of
        if isinstance(names, tuple) and "lora_A" not in names:
            others.update(id(child) for name in names for child in _below(getattr(module, name, None)))
            others.add(id(module))
    return [module for module in modules_of(model) if id(module) not in others]


def _below(part: Any) -> list[nn.Module]:
    return modules_of(part) if isinstance(part, nn.Module) else []


def _copy(module: nn.Module, name: str, p: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Room for a copy of an adapter, the same one always on a device with captured graphs."""

    def room() -> nn.Parameter:
        return nn.Parameter(torch.empty_like(p.data, dtype=dtype), requires_grad=False)

    key = name, dtype, p.device, tuple(p.shape)
    return remembered(module, "copy of an adapter", key, room) if p.device.type in KEPT_ON else room()


def _place(p: Tensor) -> int:
    """The same for two parameters on one memory; a shard without a row has none, and neither have meta tensors."""
    local: Tensor = getattr(p, "_local_tensor", p)
    return local.data_ptr() or id(p)


class _Aside:
    """A weight while an adapter is merged into it: its memory, unless the weight stays there, and its values."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p, copy = p, p.data.clone()
        # where graphs are captured they must find it, and a shard's memory cannot be exchanged
        self.in_place = p.device.type in KEPT_ON or type(p.data) is not Tensor
        self.data: Tensor | None = p.data
        self.values = copy if self.in_place else p.data
        if not self.in_place:
            p.data = copy

    def let_go(self) -> None:
        """Drop our reference to the memory where peft has written to it. It would keep the stack from joining it."""
        if self.in_place and type(self.p.data) is Tensor and self.data is not None:
            self.data = self.data if self.p.data_ptr() != self.data.data_ptr() else None

    def put_back(self) -> None:
        if self.data is not None:
            self.p.data = self.data
        if self.in_place:
            self.p.data.copy_(self.values)


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """LoRA merged into the weights, which are put back from copies: subtraction would change 3% of bf16 weights.

    Where there are captured graphs, which must find them again, the weights are changed where they are and put back
    from copies; elsewhere the copies are changed, and the weights only stand aside.

    Raises:
        ValueError: the model has no adapter that can be merged, or peft cannot merge one, or a weight under one is
            quantised, or another module's too.
    """
    layers = _mergeable(model)
    if not layers:
        raise ValueError("merge_adapters=True, but the model has no adapter that peft can merge")
    layers = [layer for layer in layers if not layer.merged_adapters]
    owners = Counter(_place(p) for m in modules_of(model) for p in m._parameters.values() if p is not None)
    for layer in layers:
        for name, p in layer.get_base_layer().named_parameters(recurse=False):
            if (several := owners[_place(p)]) > 1:
                raise ValueError(
                    f"merge_adapters=True, but the {name} {tuple(p.shape)} under an adapter belongs to {several} "
                    "modules (as a tied head's does), and merging would change the others too; use merge_adapters=False"
                )
            if type(p.data) is not Tensor and not hasattr(p.data, "_local_tensor"):  # a shard has one
                raise ValueError(
                    f"merge_adapters=True, but the {name} under an adapter is a {type(p.data).__name__}, which peft "
                    "replaces when it merges; use merge_adapters=False"
                )
            if not p.is_floating_point() or hasattr(p, "quant_state"):  # 4-bit weights may be stored as bfloat16
                raise ValueError(
                    f"merge_adapters=True, but the {name} under an adapter is quantised ({p.dtype}); use "
                    "merge_adapters=False"
                )
    held: list[_Aside] = []
    below = [module for layer in layers for module in modules_of(layer)]
    parts = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in below]
    try:
        for layer in layers:
            own = [_Aside(p) for p in layer.get_base_layer().parameters(recurse=False)]
            held += own
            try:
                layer.merge()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # peft's own refusals do not say whose setting it was
                raise ValueError(
                    f"merge_adapters=True, but peft cannot merge {type(layer).__name__}: {error}; use "
                    "merge_adapters=False"
                ) from error
            for aside in own:
                aside.let_go()
        yield
    finally:
        for module, modules, parameters, buffers in parts:  # peft exchanges some of them
            module._modules.update(modules)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for aside in reversed(held):  # where adapters of one module nest, the first copy is it
            aside.put_back()
        for layer in layers:
            layer.merged_adapters.clear()


@contextmanager
def checked_merging(model: nn.Module) -> Iterator[None]:
    """`merged_adapters`; once a model it is found out whether what it answers stays, and comes back afterwards.

    Raises:
        ValueError: it does not; the message names the kind of adapter, and by how much the logits differ.
    """
    if fault := remembered(model, "fault of merging", model_key(model), partial(_fault_of_merging, model)):
        raise ValueError(f"merge_adapters=True, but {fault}; use merge_adapters=False")
    with merged_adapters(model):
        yield


def _fault_of_merging(model: nn.Module) -> str:
    """Why adapters must not be merged; "" where they can be."""
    kinds = ", ".join(sorted({type(layer).__name__ for layer in _mergeable(model)}))
    with as_if_trained(model):
        before = _few_logits(model)
        with merged_adapters(model):
            scale, off = float(before.abs().max()), float((_few_logits(model) - before).abs().max())
        if off > scale * (0.1 if weights_dtype(model) in (torch.float16, torch.bfloat16) else 1e-3):
            return f"merging {kinds} moves the logits by {off:.1e} of {scale:.1e}"
        return "" if torch.equal(before, _few_logits(model)) else f"the weights under {kinds} do not come back"


def _few_logits(model: nn.Module) -> Tensor:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with probing(model):
        logits: Tensor = model(input_ids=torch.arange(1, 9, device=device).view(2, 4), use_cache=False).logits
    return logits.float().nan_to_num()


def _mergeable(model: nn.Module) -> list[Any]:
    return [m for m in modules_of(model) if hasattr(m, "merge") and hasattr(m, "merged_adapters")]


# the models in inner mode, and how
_held: WeakKeyDictionary[nn.Module, tuple[bool, torch.dtype | None]] = WeakKeyDictionary()


@contextmanager
def inner_mode(model: nn.Module, merge_adapters: bool = False, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Everything above together; within itself it does nothing, so that several attacks may enter it once.

    Args:
        autocast: None for none at all, whatever is active around this call.
    """
    if _held.get(model) == (merge_adapters, autocast):
        yield
        return
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if is_compiled(model):
            stack.enter_context(not_compiled())
        stack.enter_context(
            no_autocast(device) if autocast is None else torch.autocast(device.type, dtype=autocast, enabled=True)
        )
        stack.enter_context(weights_joined(model))  # before merging, which puts memory back that it finds
        if merge_adapters:
            stack.enter_context(checked_merging(model))
        elif autocast is None:
            stack.enter_context(cast_adapters(model))
        stack.enter_context(frozen_eval(model))
        stack.enter_context(not_repacked(model))
        if autocast is None:
            stack.enter_context(lean_layers(model))
        stack.enter_context(torch.enable_grad())
        stack.callback(_held.pop, model, None)
        _held[model] = merge_adapters, autocast
        yield
