"""The compiled backend: loads csrc where it is built and registers its kernels.

The kernels are `torch.ops.lpa_kernels_native.*`, with the schemas of schema.py in a namespace of their own. So
`torch.ops.lpa_kernels.*` always picks a backend by the registry; the dispatcher cannot prefer a compiled kernel.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import registry
from .schema import SCHEMAS

RULES = ("adamw", "normalised", "sign")
NORMS = ("l2", "linf", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = Path(__file__).with_name("_native.so")

_library = torch.library.Library("lpa_kernels_native", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


@cache
def _device_refusal(op: str, device_type: str) -> str | None:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"lpa_kernels_native::{op}", key):
        return f"its build has no {op} for {device_type}"
    return None


def _perturb_refusal(hidden: Tensor, delta: Tensor, rows: Tensor) -> str | None:
    if hidden.dtype not in FLOATS or delta.dtype != torch.float32:
        return f"hidden is {hidden.dtype} and delta {delta.dtype}; it takes float32, bfloat16, float16, and float32"
    if hidden.shape[1] > 1 and (hidden.stride(1) != 1 or delta.stride(1) != 1):
        return f"hidden has strides {hidden.stride()} and delta {delta.stride()}; their last ones must be 1"
    if not rows.is_contiguous() or not delta.device == rows.device == hidden.device:
        return "rows is not contiguous, or a tensor is not where hidden is"
    return _device_refusal("perturb", hidden.device.type)


def _update_refusal(
    delta: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, grads: list[Tensor], tokens: Tensor,
    step: Tensor, step_size: Tensor, epsilon: Tensor, norms: Tensor, clipped: Tensor, rule: str, norm: str,
    *rest: object,
) -> str | None:  # fmt: skip
    if rule not in RULES or norm not in NORMS:
        return f"it has no rule={rule!r} with norm={norm!r}"
    if not 1 <= tokens.shape[1] <= 2:
        return f"a row has {tokens.shape[1]} tokens; it takes 1 or 2"
    device = delta.device
    for tensor in (delta, exp_avg, exp_avg_sq, step, step_size, epsilon, norms, tokens, clipped):
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == device):
            return f"a tensor is not contiguous, or not on {device}"
    for tensor in (delta, exp_avg, exp_avg_sq, step, step_size, epsilon, norms):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"delta, its moments, step, step_size, epsilon and norms must be float32, not {tensor.dtype}"
    for grad in grads:
        if grad.dtype not in FLOATS or grad.device != device:
            return f"a gradient is {grad.dtype} on {grad.device}; it takes float32, bfloat16, float16 on {device}"
    return _device_refusal("pgd_update_", delta.device.type)


def _loss_refusal(logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float) -> str | None:
    if logits.dtype not in FLOATS:
        return f"logits are {logits.dtype}; it takes float32, bfloat16, float16"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"the last stride of logits is {logits.stride(1)}, not 1"
    if weight is not None and weight.dtype != torch.float32:
        return f"weight is {weight.dtype}, not float32"
    if not all(t is None or (t.is_contiguous() and t.device == logits.device) for t in (labels, away, weight)):
        return "labels, away or weight is not contiguous, or not where the logits are"
    return _device_refusal("token_loss_", logits.device.type)


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
    ops = torch.ops.lpa_kernels_native
    registry.register("perturb", "native", ops.perturb.default, _perturb_refusal)
    registry.register("pgd_update_", "native", ops.pgd_update_.default, _update_refusal)
    registry.register("token_loss_", "native", ops.token_loss_.default, _loss_refusal)
    return True


BUILT = _load()
