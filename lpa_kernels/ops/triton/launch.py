"""What every launch asks about its device: whether it can run there, and how wide the device is."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

# Triton reads the variable when a kernel is defined; a later change of it has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

_HERE: AbstractContextManager[None] = nullcontext()


def unavailable(tensor: Tensor) -> str | None:
    """Why no kernel can be launched on this tensor's device, or None."""
    if tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"):
        return None
    return f"tensors on {tensor.device.type}: Triton kernels need a GPU (or TRITON_INTERPRET=1)"


def on(tensor: Tensor) -> AbstractContextManager[None]:
    """Within it the tensor's GPU is the current device, on which Triton launches."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on ROCm) of a GPU; 4 for the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take, by which Triton refuses a launch; no limit off a GPU."""
    if device.type != "cuda":
        return 1 << 30
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def threads(number: int) -> dict[str, Any]:
    """The options of a launch of `number` threads a program, a power of two."""
    return options(warps(number))


def options(warps: int) -> dict[str, Any]:
    """The options of a launch. Triton fuses products with sums by itself up to 3.9, and later if it is told to."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def warps(threads: int) -> int:
    """`threads`, a power of two, as the `num_warps` of a launch on the current device."""
    return max(1, threads // (_lanes(torch.cuda.current_device()) if torch.version.hip else 32))


@lru_cache
def _lanes(device: int) -> int:
    """Threads of a warp: 32 on CUDA and on RDNA (gfx10 to gfx12), 64 on CDNA."""
    return int(torch.cuda.get_device_properties(device).warp_size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
