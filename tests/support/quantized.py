"""Stand-ins for quantised layers that need no GPU: frozen integer weights behind an autograd function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class _Dequantised(torch.autograd.Function):
    """x @ (weight * scale).T, with a gradient for x alone; as bitsandbytes' MatMul4Bit, it makes the weights again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale.to(x.dtype)).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ (weight.to(grads[0].dtype) * scale.to(grads[0].dtype)), None, None


class IntLinear(nn.Linear):
    """A linear layer of int8 weights with one scale a row. Such is the `weight` that peft and the attack see."""

    scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        values = plain.weight.detach()
        scale = values.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((values / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantised.apply(x, self.weight, self.scale)  # type: ignore[no-any-return, no-untyped-call]

    def dequantised(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.weight.float() * self.scale)
        return plain


class RoundingLinear(IntLinear):
    """Rounds its input too, by the largest entry of all tokens (as LLM.int8 finds outliers): tokens are not apart."""

    def forward(self, x: Tensor) -> Tensor:
        unit = x.detach().abs().max() / 127
        return super().forward(x + ((x / unit).round() * unit - x).detach())


def quantised(model: nn.Module, kind: type[IntLinear] = IntLinear, skip: tuple[str, ...] = ("lm_head",)) -> Any:
    """A copy of the model with linear layers replaced, the head left out as bitsandbytes does."""
    changed = copy.deepcopy(model)
    for path, module in list(changed.named_modules()):
        if type(module) is nn.Linear and path not in skip:
            changed.set_submodule(path, kind(module))
    return changed


def dequantised(model: nn.Module) -> Any:
    """A copy with plain layers of the same values."""
    changed = copy.deepcopy(model)
    for path, module in list(changed.named_modules()):
        if isinstance(module, IntLinear):
            changed.set_submodule(path, module.dequantised())
    return changed
