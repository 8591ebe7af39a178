"""A frozen linear map with at most one LoRA adapter: its product, and the gradient of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Low = tuple[Tensor, Tensor]  # LoRA's product with its first factor, [T, rank], and its second factor, [out, rank]
WHOLE_ON = {"cpu"}  # devices on which a library makes LoRA's second product, which is faster there

_WIDE, _PART = 1 << 14, 1 << 10  # outputs from which a product is made in parts, and how many are one


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias. On a CPU a head's by parts of W, which stay in the caches: a sixth faster than whole."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(weight) < _WIDE or bias is not None:
        return nn.functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for part, rows in zip(out.split(_PART, 1), weight.split(_PART), strict=True):
        torch.mm(x, rows.t(), out=part)
    return out


@dataclass(frozen=True)
class Linear:
    """A frozen linear map y = x W^T + bias + scaling (x A^T) B^T.

    Attributes:
        weight: [out, in]. bias: [out] or None.
        a: [rank, in] and b: [out, rank], the factors of one LoRA adapter, or None. scaling: of their product.
        held: the sum of weight and adapter, from a backward pass to the next forward pass. Then least else is saved.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    held: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        """y [T, out] of x [T, in]."""
        if (sum_ := self.held.pop() if self.held else self._summed(x)) is not None:
            return _product(x, sum_, self.bias)
        out = _product(x, self.weight, self.bias)
        if self.a is not None and self.b is not None:
            out.addmm_(x @ self.a.t(), self.b.t(), alpha=self.scaling)
        return out

    def ahead(self, x: Tensor) -> tuple[Tensor, Low | None]:
        """y of x without LoRA's second product, and what that takes: for an op that makes it as it reads y.

        On the devices of `WHOLE_ON` y is whole.
        """
        if self.a is None or self.b is None or x.device.type in WHOLE_ON:
            return self(x), None
        low = torch.addmm(x.new_empty(()), x, self.a.t(), beta=0, alpha=self.scaling)
        return nn.functional.linear(x, self.weight, self.bias), (low, self.b)

    def back(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """The gradient of x [T, in] from that of y [T, out], added to `into` where one is given."""
        sum_ = self._summed(grad)
        weight = self.weight if sum_ is None else sum_
        out = grad @ weight if into is None else into.addmm_(grad, weight)
        if sum_ is not None:
            self.held[:] = [sum_]
        elif self.a is not None and self.b is not None:
            out.addmm_(grad @ self.b, self.a, alpha=self.scaling)
        return out

    def _summed(self, x: Tensor) -> Tensor | None:
        """The weight with the adapter added, where that takes fewer operations than the adapter on the rows of x.

        In float32 and float64 alone: there it is exact up to the order of sums.
        """
        if self.a is None or self.b is None or x.dtype not in (torch.float32, torch.float64):
            return None
        many, few = self.weight.shape
        if len(x) * (many + few) <= 1.25 * many * few:  # the copy of the weight costs something too
            return None
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scaling)

    def split(self, sizes: Sequence[int]) -> list[Linear]:
        """Maps to consecutive `sizes` of its outputs, as views of its weights."""
        biases = [None] * len(sizes) if self.bias is None else list(self.bias.split(list(sizes)))
        ups = [None] * len(sizes) if self.b is None else list(self.b.split(list(sizes)))
        weights = self.weight.split(list(sizes))
        return [Linear(w, bias, self.a, up, self.scaling) for w, bias, up in zip(weights, biases, ups, strict=True)]
