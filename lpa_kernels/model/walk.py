"""A model's modules and parameters, without making their names: an attack asks for them a dozen times."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())` in half the time: an 8B model with LoRA has 2345."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """`list(model.parameters())` in half the time."""
    held = (p for module in modules_of(model) for p in module._parameters.values() if p is not None)
    return list({id(p): p for p in held}.values())


def spread_over(model: nn.Module) -> str:
    """Over which devices the parameters are spread, in words; "" where all are on one."""
    devices = sorted({str(p.device) for p in parameters_of(model)})
    return f"the model is on several devices, {', '.join(devices)}" if len(devices) > 1 else ""
