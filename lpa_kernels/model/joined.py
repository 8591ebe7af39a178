"""Run frozen linear maps of one input as one product. In an attack's mode their weights are views of one memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .linear import Linear, Low

JOINED_ON = {"cuda"}  # devices on which maps are joined; a CPU runs products of their own as fast
_EVEN = 16  # entries: rows of this many of them begin at addresses that wide loads take


@dataclass(frozen=True)
class Joined:
    """The maps that are one product.

    Attributes:
        group: of their weights. The rows below are A scaled of each adapter, and zeros up to a multiple of 16 rows.
        bias: [N + R] or None.
        up: [columns, R], of each adapter B where its map's outputs meet its A, and 0 elsewhere; None without adapters.
        adapted: the columns of the outputs from the first adapted map to the last.
    """

    group: Group
    bias: Tensor | None
    up: Tensor | None
    adapted: slice

    @property
    def weight(self) -> Tensor:
        """[N + R, in], the memory of the group."""
        assert self.group.memory is not None, "the attack's mode has ended"
        return self.group.memory


Outputs = Tensor | tuple[Tensor, ...]


class Maps:
    """Frozen linear maps of one input.

    Their outputs are the first N columns of one tensor [T, N + R] where they are joined, else a tensor each: a CPU
    reads and writes rows that stand apart in memory more slowly.

    Args:
        linears: the maps, whose weights are the model's parameters.
        sizes: of the maps that a single one holds one after the other.

    Attributes:
        each: the maps. sizes: of their outputs.
        joined: None where each is a product of its own.
        apart: why they are, "" where they are joined or need not be.
    """

    def __init__(self, linears: Sequence[Linear], sizes: Sequence[int] | None = None) -> None:
        self.linears = linears
        self._split = sizes
        self.each = self._each()
        self.sizes = [len(one.weight) for one in self.each]
        self.joined: Joined | None = None
        self.apart = ""

    def _each(self) -> list[Linear]:
        return list(self.linears) if self._split is None else self.linears[0].split(self._split)

    @property
    def can_join(self) -> bool:
        """Whether a product for all of them is another one, on a device that has it."""
        several = len(self.linears) > 1 or self.linears[0].a is not None
        return several and self.linears[0].weight.device.type in JOINED_ON

    def join(self, groups: Groups) -> None:
        """Make them one product, where they can be and their memory allows it.

        Args:
            groups: the weights that are joined in the model's mode; theirs are added.
        """
        if not self.can_join:
            return
        weights = [one.weight for one in self.linears]
        self.each = []  # views of a weight would count as others that refer to its memory
        try:
            self._join(weights, groups)
        except torch.OutOfMemoryError:
            self.apart = "there is no memory to join them in"
            part(groups, tuple(map(id, weights)))
        self.each = self._each()

    def _join(self, weights: Sequence[Tensor], groups: Groups) -> None:
        adapters = {id(one.a): one.a * one.scaling for one in self.linears if one.a is not None}
        group = together(weights, -(-sum(map(len, adapters.values())) // _EVEN) * _EVEN, groups)
        if isinstance(group, str):
            self.apart = group
            return
        assert group.memory is not None
        each, width = self._each(), sum(self.sizes)
        bias = None
        if any(one.bias is not None for one in each):
            bias = group.memory.new_zeros(len(group.memory))
            for one, own in zip(each, bias[:width].split(self.sizes), strict=True):
                if one.bias is not None:
                    own.copy_(one.bias)
        self.joined = Joined(group, bias, *self._adapters(each, group.memory[width:], adapters))

    def _adapters(
        self, each: Sequence[Linear], below: Tensor, scaled: dict[int, Tensor]
    ) -> tuple[Tensor | None, slice]:
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
            (first, last, one) for first, last, one in zip(ends, ends[1:], each, strict=False) if one.b is not None
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
            if _storage(part) != _storage(one):
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


class Group:
    """Weights [n, in] that are to stand one below the other in one memory, with rows below them.

    Attributes:
        memory: [N + rows, in]; None once it has been given up.
    """

    def __init__(self, weights: Sequence[Tensor], rows: int) -> None:
        self.weights = weights
        self.memory: Tensor | None = weights[0].data.new_empty(sum(map(len, weights)) + rows, weights[0].shape[1])
        self._sizes = [*map(len, weights), rows]

    def _places(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight, and its part of the memory."""
        assert self.memory is not None
        return list(zip(self.weights, self.memory.split(self._sizes), strict=False))

    def move(self) -> None:
        """Move the weights there, one after the other."""
        for weight, place in self._places():
            place.copy_(weight.data)
            weight.data = place

    def stands(self, rows: int) -> bool:
        """Whether the weights are where they were moved to, with so many rows below."""
        return self._sizes[-1] == rows and all(_alike(weight, place) for weight, place in self._places())

    def part(self) -> None:
        """Give each weight that is still in it memory of its own again, and give up this one.

        Where there is no room for both, the weights go through the host.
        """
        memory, self.memory = self.memory, None
        assert memory is not None
        own = [w for w in self.weights if type(w.data) is Tensor and _storage(w) == _storage(memory)]
        device = memory.device
        try:
            for weight in own:
                weight.data = _copy(weight.data, device)
        except torch.OutOfMemoryError:
            left = [weight for weight in own if _storage(weight) == _storage(memory)]
            for weight in left:
                weight.data = _copy(weight.data, torch.device("cpu"))
            del memory
            for weight in left:
                weight.data = weight.data.to(device)


def _copy(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, copy=True, memory_format=torch.contiguous_format)


Groups = dict[tuple[int, ...], Group]  # by the ids of their weights
_groups: WeakKeyDictionary[nn.Module, Groups] = WeakKeyDictionary()


@contextmanager
def weights_joined(model: nn.Module) -> Iterator[Groups]:
    """Within it weights of the model may be joined. Afterwards each has memory of its own again.

    A state that is saved in between would hold weights that share a memory, of which accelerate (1.15.0) drops all but
    one. Yields the groups. A nested one parts the outer one's weights; the next attack joins them again.
    """
    outer = _groups.get(model)
    part(outer or {})
    groups = _groups[model] = {}
    try:
        yield groups
    finally:
        del _groups[model]
        if outer is not None:
            _groups[model] = outer
        part(groups)


def part(groups: Groups, *keys: tuple[int, ...]) -> None:
    """Part the groups of these keys, or all. An error is raised once all are parted that can be."""
    errors: list[Exception] = []
    for key in keys or list(groups):
        if (group := groups.pop(key, None)) is not None:
            try:
                group.part()
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]


def groups_of(model: nn.Module) -> Groups | None:
    """Those of the model's mode; None outside of it, where nothing is joined."""
    return _groups.get(model)


def together(weights: Sequence[Tensor], rows: int, groups: Groups) -> Group | str:
    """The group of these weights [n, in], with so many rows below: the one that there is, or a new one.

    Afterwards the parameters are the same objects with the same values, and views of one memory.

    Returns:
        Why there is none, where a weight's memory is not its own alone (of a shard, a flat buffer, a tie, or held by
        somebody): what else refers to it would not follow.
    """
    first, key = weights[0], tuple(map(id, weights))
    if key in groups and groups[key].stands(rows):
        return groups[key]
    # of other rows, or with a weight that was replaced
    part(groups, *(other for other in list(groups) if not set(other).isdisjoint(key)), key)
    if any((w.dtype, w.device, w.shape[1]) != (first.dtype, first.device, first.shape[1]) for w in weights):
        return "weights of one input differ in dtype or device"
    if len(set(key)) < len(key):
        return "a weight is two maps' of one input"
    if not all(map(_own, weights)):
        return "a weight's memory is not its own alone"
    group = groups[key] = Group(weights, rows)  # known before anything moves
    group.move()
    return group


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same part of the same memory."""
    if type(a.data) is not Tensor:
        return False
    return _storage(a) == _storage(b) and (a.storage_offset(), a.shape, a.stride()) == (
        b.storage_offset(), b.shape, b.stride()
    )  # fmt: skip


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _own(weight: Tensor) -> bool:
    """Whether a weight is a plain, contiguous parameter that fills its memory, and no other tensor refers to that."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_contiguous():
        return False
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() and _uses(weight) <= _ALONE


def _uses(weight: Tensor) -> int:
    count: Any = getattr(torch._C, "_storage_Use_Count", None)  # torch's own, without a public name
    return _UNKNOWN if count is None else int(count(weight.untyped_storage()._cdata))


_UNKNOWN = 1 << 30  # where torch does not count: no weight is then known to be alone
_ALONE = min(_uses(nn.Parameter(torch.empty(1, device="cpu"))), _UNKNOWN - 1)
