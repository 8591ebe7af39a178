"""Count the bytes of live tensors by kind, and floating-point work, while a program runs on the meta device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Ledger(TorchDispatchMode):
    """Within it every new storage is counted from the op that makes it to its end.

    Attributes:
        kinds: bytes alive, by kind. peak: those of the moment with most in all since `mark`.
        flops: operations of products and attention, two for each pair of factors.

    Args:
        vocabulary: a new tensor whose last dimension is this one is one of "logits".
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.kinds: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._most = 0
        self.flops = 0.0
        self._kind: str | None = None
        self._ranks = 1
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.flops += _work(func, args, kwargs or {}, result)
        return result

    @contextmanager
    def kind(self, name: str, ranks: int = 1) -> Iterator[None]:
        """What is made within is of this kind, and shared by so many ranks."""
        held = self._kind, self._ranks
        self._kind, self._ranks = name, ranks
        try:
            yield
        finally:
            self._kind, self._ranks = held

    def mark(self) -> None:
        """Look for the highest moment from here on."""
        self._most, self.peak = self._total, self.kinds.copy()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors that are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0 or tensor.device.type != "meta":
                continue
            key = storage._cdata
            if key in self._alive and self._alive[key][0]() is storage:
                continue
            name = self._kind
            if name is None:
                name = "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "activations"
            size = -(-storage.nbytes() // self._ranks)
            self._alive[key] = (weakref.ref(storage, lambda _, key=key: self._end(key)), name, size)  # type: ignore[misc]
            self._count(name, size)

    def _end(self, key: int) -> None:
        _, name, size = self._alive.pop(key)
        self._count(name, -size)

    def _count(self, name: str, size: int) -> None:
        self.kinds[name] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self.kinds.copy()


def _work(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """By torch's table, to which the fused attention of the CPU is added."""
    aten = torch.ops.aten
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if func is aten.addmm_.default:  # which torch's table does not have
        func = aten.addmm.default
    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0
