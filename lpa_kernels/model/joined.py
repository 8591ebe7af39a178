"""Frozen linear maps of one input as one product: their weights, and LoRA's first factors, are views of one memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .facts import remembered, undone_by_forgetting
from .linear import Linear, Low

JOINED_ON = {"cuda"}  # devices on which maps are joined; a CPU runs products of their own as fast
_EVEN = 16  # entries: rows of this many of them begin at addresses that wide loads take


@dataclass(frozen=True)
class Joined:
    """The memory of the maps that are one product.

    Attributes:
        weight: [N + R, in]: their weights, and then A scaled of each adapter, and zeros up to a multiple of 16 rows.
        bias: [N + R] or None.
        up: [columns, R], of each adapter B where its map's outputs meet its A, and 0 elsewhere; None without adapters.
        adapted: the columns of the outputs from the first adapted map to the last.
    """

    weight: Tensor
    bias: Tensor | None
    up: Tensor | None
    adapted: slice


Outputs = Tensor | tuple[Tensor, ...]


class Maps:
    """Frozen linear maps of one input.

    Their outputs are the first N columns of one tensor [T, N + R] where they are joined, else a tensor each: a CPU
    reads and writes rows that stand apart in memory more slowly.

    Args:
        modules: that the maps are read from.
        linears: the maps, whose weights are the modules' parameters.
        sizes: of the maps that a single one holds one after the other.

    Attributes:
        each: the maps. sizes: of their outputs.
        joined: None where each is a product of its own.
    """

    def __init__(
        self, modules: Sequence[nn.Module], linears: Sequence[Linear], sizes: Sequence[int] | None = None
    ) -> None:
        self.modules, self.linears = modules, linears
        self._split = sizes
        self.each = self._each()
        self.sizes = [len(one.weight) for one in self.each]
        self.joined: Joined | None = None

    def _each(self) -> list[Linear]:
        return list(self.linears) if self._split is None else self.linears[0].split(self._split)

    def join(self) -> None:
        """Make them one product, on a device that has it and where their memory allows it."""
        weights = [one.weight for one in self.linears]
        if weights[0].device.type not in JOINED_ON:
            return
        adapters = {id(one.a): one.a * one.scaling for one in self.linears if one.a is not None}
        rows = -(-sum(map(len, adapters.values())) // _EVEN) * _EVEN
        self.each = []  # views of a weight would count as others that refer to its memory
        memory = together(self.modules, weights, rows)
        self.each = self._each()
        if memory is None:
            return
        width = sum(self.sizes)
        bias = None
        if any(one.bias is not None for one in self.each):
            bias = memory.new_zeros(len(memory))
            for one, part in zip(self.each, bias[:width].split(self.sizes), strict=True):
                if one.bias is not None:
                    part.copy_(one.bias)
        self.joined = Joined(memory, bias, *self._adapters(memory[width:], adapters))

    def _adapters(self, below: Tensor, scaled: dict[int, Tensor]) -> tuple[Tensor | None, slice]:
        """`Joined.up` and `Joined.adapted`; each A, scaled, is written to its rows of `below` [R, in]."""
        if not scaled:
            return None, slice(0)
        places, start = {}, 0
        for key, a in scaled.items():
            places[key] = slice(start, start + len(a))
            below[places[key]] = a
            start += len(a)
        below[start:] = 0
        ends = list(accumulate(self.sizes, initial=0))
        columns = [
            (first, last, one) for first, last, one in zip(ends, ends[1:], self.each, strict=False) if one.b is not None
        ]
        adapted = slice(columns[0][0], columns[-1][1])
        up = below.new_zeros(adapted.stop - adapted.start, len(below))
        for first, last, one in columns:
            assert one.b is not None
            up[first - adapted.start : last - adapted.start, places[id(one.a)]] = one.b
        return up, adapted

    def __call__(self, x: Tensor) -> Outputs:
        """The outputs of x [T, in]."""
        if self.joined is None:
            return tuple(one(x) for one in self.each)
        y, width = nn.functional.linear(x, self.joined.weight, self.joined.bias), sum(self.sizes)
        if self.joined.up is not None:
            y[:, self.joined.adapted].addmm_(y[:, width:], self.joined.up.t())
        return y

    def ahead(self, x: Tensor) -> tuple[Tensor, Low | None]:
        """`Linear.ahead` of a single map, whose A may be joined to its weight."""
        if self.joined is None or self.joined.up is None:
            return self.each[0].ahead(x)
        y, width = nn.functional.linear(x, self.joined.weight, self.joined.bias), sum(self.sizes)
        return y[:, :width], (y[:, width:], self.joined.up)

    def parts(self, y: Outputs) -> tuple[Tensor, ...]:
        """The outputs of each map, [T, n], as views."""
        return y[:, : sum(self.sizes)].split(self.sizes, 1) if isinstance(y, Tensor) else y

    def room(self, like: Tensor) -> Outputs:
        """Outputs that are not written yet, for the gradients of theirs for as many tokens as in `like`."""
        if self.joined is None:
            return tuple(like.new_empty(len(like), size) for size in self.sizes)
        return like.new_empty(len(like), len(self.joined.weight))

    def filled(self, room: Outputs, found: tuple[Tensor, ...]) -> Outputs:
        """Gradients of the outputs [T, n], those that are not in `room` copied there if they must be side by side."""
        if self.joined is None:
            return found
        for part, one in zip(self.parts(room), found, strict=True):
            if _memory(part) != _memory(one):
                part.copy_(one)
        return room

    def back(self, grad: Outputs) -> Tensor:
        """The gradient of x [T, in], from those of the outputs; a tensor may end after its first N columns.

        What stands in the columns after N is overwritten.
        """
        width = sum(self.sizes)
        if self.joined is None or not isinstance(grad, Tensor):
            out: Tensor | None = None
            for one, part in zip(self.each, (grad,) if isinstance(grad, Tensor) else grad, strict=True):
                out = one.back(part, out)
            assert out is not None
            return out
        if self.joined.up is None:
            return grad @ self.joined.weight
        own = grad[:, self.joined.adapted]
        if grad.shape[1] > width:
            grad[:, width:].addmm_(own, self.joined.up, beta=0)
            return grad @ self.joined.weight
        return (grad @ self.joined.weight[:width]).addmm_(own @ self.joined.up, self.joined.weight[width:])


# ---- where weights are -----------------------------------------------------------------------------------------------


def together(modules: Sequence[nn.Module], weights: Sequence[Tensor], rows: int) -> Tensor | None:
    """[N + rows, in]: the weights [n, in] one below the other, of which they are views from then on, and room below.

    They are moved where they are not there already: each to its part of new memory, one after the other. Afterwards
    the parameters are the same objects with the same values; their memory is one. They get memory of their own again
    when somebody asks for the state of the modules that hold them, and by `facts.forget`.

    Args:
        modules: that have the weights, themselves or in a module below, as under an adapter.

    Returns:
        None where a weight's memory is not its own alone (of a shard, a flat buffer, a tie, or held by somebody): what
        else refers to it would not follow.
    """
    first, total = weights[0], sum(map(len, weights)) + rows
    if len(weights) == 1 and not rows:
        return first.data
    shares = [_share(_holder(module, weight)) for module, weight in zip(modules, weights, strict=True)]
    width, memory = first.shape[1], _memory(first)
    starts = accumulate((weight.numel() for weight in weights), initial=0)
    enough = first.untyped_storage().nbytes() >= total * width * first.element_size()
    if enough and all(
        share.holds(weight) and _memory(weight) == memory and weight.storage_offset() == start
        for share, weight, start in zip(shares, weights, starts, strict=False)
    ):
        return first.data.as_strided((total, width), (width, 1), 0)
    alike = all((w.dtype, w.device, w.shape[1]) == (first.dtype, first.device, width) for w in weights)
    if not alike or not all(share.holds(w) or _own(w) for share, w in zip(shares, weights, strict=True)):
        return None
    new = first.data.new_empty(total, width)
    for weight, share, part in zip(weights, shares, new.split([*map(len, weights), rows]), strict=False):
        part.copy_(weight.data)
        weight.data, share.memory = part, _memory(new)
    return new


class _Share:
    """A module's share of joined memory, and the hook that ends it before the module's state is read.

    Some that save a state take weights of one memory for copies of each other: accelerate 1.15.0 drops all but one of
    them, safetensors refuses them.

    Attributes:
        memory: of which the module's weight is a part; None where it has its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.memory: StorageWeakRef | None = None
        self.hook = module.register_state_dict_pre_hook(self)
        undone_by_forgetting(module, partial(self._end, ref(module)))

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight is a part of it, as it was joined."""
        plain = type(weight.data) is Tensor and weight.is_contiguous()
        return self.memory is not None and plain and _memory(weight) == self.memory

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Give the module's weight memory of its own, as a state dict's hook."""
        for weight in module._parameters.values():
            if weight is not None and self.holds(weight):
                weight.data = weight.data.clone()
        self.memory = None

    def _end(self, module: ref[nn.Module]) -> None:
        self.hook.remove()
        if (found := module()) is not None:
            self(found, "", False)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (
            slice,
        )  # does nothing: a copy of the module has memory of its own, a file needs no lpa_kernels


def _share(module: nn.Module) -> _Share:
    return remembered(module, "share of joined memory", None, partial(_Share, module))


def _holder(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module that has the weight as its parameter: `module`, or one below. It outlives an adapter around it."""
    holders = (m for m in module.modules() if any(p is weight for p in m._parameters.values()))
    return next(holders, module)


def _memory(tensor: Tensor) -> StorageWeakRef:
    """A tensor's memory: equal for all that are in it, and to no later one, while this stands for it."""
    return StorageWeakRef(tensor.untyped_storage())


def _own(weight: Tensor) -> bool:
    """Whether a weight is a plain parameter of the whole of a memory that nothing else refers to."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_contiguous():
        return False
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() and _uses(weight) <= _ALONE


def _uses(weight: Tensor) -> int:
    count: Any = getattr(torch._C, "_storage_Use_Count", None)  # torch's own, without a public name
    return _UNKNOWN if count is None else int(count(weight.untyped_storage()._cdata))


_UNKNOWN = 1 << 30  # where torch does not count: no weight is then known to be alone
_ALONE = min(_uses(nn.Parameter(torch.empty(1))), _UNKNOWN - 1)
