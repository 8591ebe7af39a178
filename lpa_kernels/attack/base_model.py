"""The base model under adapters: the model with them switched off, and which adapters leave it another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..model.modes import kept_flags


class Left(NamedTuple):
    """What an adapter leaves in a base model when it is switched off.

    Attributes:
        setting: of its configuration, as "bias='all'".
        what: the setting does, as "trains biases of the base model".
        instead: the setting that leaves the base model as it was.
        adapter: its name in the model; empty where a configuration alone was asked about.
    """

    setting: str
    what: str
    instead: str
    adapter: str = ""


def takes_from_base(config: Any) -> str:
    """The start of an adapter, where peft takes it out of the base weights as it puts the adapter on; empty elsewhere.

    Without such an adapter the model is the rest of the base model, for good (peft 0.21.2, `LoraLayer.update_layer`).
    """
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"init_lora_weights={start!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) is not None else ""


def left_by(config: Any) -> Left | None:
    """What an adapter of this configuration leaves in any base model; None where that cannot be said without one."""
    if start := takes_from_base(config):
        instead = "kasa_config=None" if start == "kasa_config" else "init_lora_weights=True"
        return Left(start, "changes the base weights as it is put on", instead)
    if layers := getattr(config, "layer_replication", None):
        return Left(f"layer_replication={layers}", "repeats layers of the base model", "layer_replication=None")
    return None


def left_in_base(model: Any) -> Left | None:
    """What the first adapter to leave something leaves in a peft model; None where adapters off is the base model.

    Of peft 0.21.2's other settings, `bias` alone does so: peft switches off everything else that it trains
    (`modules_to_save`, tokens, norms), and warns of `bias` where the adapter that has it is active.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if left := left_by(config):
            return left._replace(adapter=name)
        bias = getattr(config, "bias", "none")
        if names := [] if bias == "none" else _biases(model, bias):
            some = names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
            return Left(f"bias={bias!r}", f"trains biases of the base model ({some})", "bias='none'", name)
    return None


def _biases(model: nn.Module, bias: str) -> list[str]:
    """The base model's own parameters that `bias` ("all", or "lora_only" and its like) has peft train."""
    adapted, others = [], []
    for name, module in model.named_modules():
        if parts := getattr(module, "adapter_layer_names", ()):  # of peft's wrappers
            others += [f"{name}.{part}." for part in (*parts, "original_module")]
            if hasattr(module, "get_base_layer") and getattr(module.get_base_layer(), "bias", None) is not None:
                adapted.append(f"{name}.bias")
    if bias == "all":
        adapted = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    own = [name for name in adapted if not name.startswith(tuple(others))]
    return [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in own]


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its adapters.

    Raises:
        ValueError: it has none, or one that left something in the base model, so there is no reference model.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError("the reference model is this one without adapters, and it has none; use reference_free=True")
    if left := left_in_base(model):
        raise ValueError(
            f"the adapter {left.adapter!r} has {left.setting}, which {left.what}, so that the model without it is not "
            f"the base model; use {left.instead}"
        )
    with kept_flags(model), model.disable_adapter():  # peft turns every adapter's requires_grad on at its end
        yield
