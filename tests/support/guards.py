"""Guards over inner steps: none may wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpa_kernels.attack import loop

from .models import DEVICE

WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh", "_unique2")


class NoWaiting(TorchDispatchMode):
    """Fails on every operation whose result's size or value the host must know, or that brings it from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{func} in an inner step"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask in an inner step"
        return func(*args, **(kwargs or {}))


def guard_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every inner step but the first, which makes the masks, runs under the guard; the list grows by one a step."""
    original, steps = loop.InnerStep.__call__, []

    def guarded(step: loop.InnerStep) -> None:
        if not steps:
            original(step)
        else:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                with NoWaiting():
                    original(step)
            finally:
                if DEVICE == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        steps.append(1)

    monkeypatch.setattr(loop.InnerStep, "__call__", guarded)
    return steps
