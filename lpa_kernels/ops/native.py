"""The compiled backend: loads csrc where it is built and registers its kernels.

The kernels are `torch.ops.lpa_kernels_native.*`, with the schemas of schema.py in a namespace of their own. So
`torch.ops.lpa_kernels.*` always picks a backend by the registry; the dispatcher cannot prefer a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import registry, requirements
from .schema import OPS, SCHEMAS

LIBRARY = Path(__file__).with_name("_native.so")

_library = torch.library.Library("lpa_kernels_native", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


@cache
def built_for(op: str, device_type: str) -> bool:
    """Whether the loaded library has a kernel of `op` for this type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"lpa_kernels_native::{op}", key)


def _refusal(op: str) -> Callable[..., str | None]:
    required = getattr(requirements, op)

    def unsupported(first: Tensor, *rest: Any) -> str | None:
        device = first.device.type
        return required(first, *rest) or (None if built_for(op, device) else f"its build has no {op} for {device}")

    return unsupported


def _load() -> bool:
    if not LIBRARY.exists():
        registry.register_missing(
            "native", "not built; install with LPA_KERNELS_NATIVE=1 pip install --no-build-isolation ."
        )
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        registry.register_missing("native", f"{LIBRARY.name} does not load ({error}); build it again for this torch")
        return False
    for op in OPS:
        kernel = getattr(torch.ops.lpa_kernels_native, op).default
        registry.register(op, "native", kernel, _refusal(op), partial(built_for, op))
    return True


BUILT = _load()
