"""Which calls the compiled kernels, C++ and Triton alike, take; each function returns why not, or None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("adamw", "normalised", "sign")
NORMS = ("l2", "linf", "none")


def _narrow(name: str, tensor: Tensor) -> str | None:
    if tensor.dtype in FLOATS:
        return None
    return f"{name} is {tensor.dtype}; it takes float32, bfloat16 and float16"


def _typed(dtype: torch.dtype, *tensors: tuple[str, Tensor | None]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, not {dtype}"
    return None


def _in_lines(*tensors: tuple[str, Tensor | None]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has strides {tensor.stride()}; the last one must be 1"
    return None


def _together(first: Tensor, *others: tuple[str, Tensor | None], contiguous: bool = True) -> str | None:
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != first.device:
            return f"{name} is on {tensor.device} and the first argument on {first.device}"
        if contiguous and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _rotated(
    heads: tuple[tuple[str, Tensor], ...],
    tables: tuple[tuple[str, Tensor | None], ...],
    streams: tuple[tuple[str, Tensor], ...],
) -> str | None:
    """For heads of one dtype in lines, tables of angles in float32, and what says where tokens are in int32."""
    first = heads[0][1]
    return (
        _narrow(*heads[0])
        or _typed(first.dtype, *heads)
        or _in_lines(*heads)
        or _together(first, *heads, contiguous=False)
        or _typed(torch.float32, *tables)
        or _typed(torch.int32, *streams)
        or _together(first, *tables, *streams)
    )


def perturb(hidden: Tensor, delta: Tensor, rows: Tensor) -> str | None:
    """For float32, bfloat16 and float16 in lines."""
    return (
        _narrow("hidden", hidden)
        or _typed(torch.float32, ("delta", delta))
        or _in_lines(("hidden", hidden), ("delta", delta))
        or _together(hidden, ("delta", delta), contiguous=False)
        or _together(hidden, ("rows", rows))
    )


def pgd_update_(
    delta: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, grads: list[Tensor], tokens: Tensor,
    step: Tensor, step_size: Tensor, epsilon: Tensor, norms: Tensor, clipped: Tensor, rule: str, norm: str,
    *_: object,
) -> str | None:  # fmt: skip
    """For the rules that have kernels, float32 state and gradients of any strides."""
    if rule not in RULES or norm not in NORMS:
        return f"it has no rule={rule!r} with norm={norm!r}; it has {', '.join(RULES)} with {', '.join(NORMS)}"
    if not 1 <= tokens.shape[1] <= 2:
        return f"a row has {tokens.shape[1]} tokens; it takes 1 or 2"
    state = (("delta", delta), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("step", step),
             ("step_size", step_size), ("epsilon", epsilon), ("norms", norms))  # fmt: skip
    for grad in grads:
        reason = _narrow("a gradient", grad) or _together(delta, ("a gradient", grad), contiguous=False)
        if reason is not None:
            return reason
    return _typed(torch.float32, *state) or _together(delta, *state, ("tokens", tokens), ("clipped", clipped))


def token_loss_(logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float) -> str | None:
    """For logits of float32, bfloat16 and float16 in lines."""
    return (
        _narrow("logits", logits)
        or _in_lines(("logits", logits))
        or _typed(torch.float32, ("weight", weight))
        or _together(logits, ("labels", labels), ("away", away), ("weight", weight))
    )


def add_norm(
    x: Tensor, residual: Tensor | None, low: Tensor | None, up: Tensor | None, delta: Tensor | None,
    rows: Tensor | None, weight: Tensor | None, *_: object,
) -> str | None:  # fmt: skip
    """For rows of one dtype in lines, and float32 besides."""
    lines = (("x", x), ("residual", residual), ("low", low), ("up", up))
    return (
        _narrow("x", x)
        or _typed(x.dtype, *lines)
        or _in_lines(*lines)
        or _together(x, *lines, contiguous=False)
        or _typed(torch.float32, ("delta", delta), ("weight", weight))
        or _together(x, ("delta", delta), ("rows", rows), ("weight", weight))
    )


def add_norm_backward(grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    """For rows of one dtype in lines, and float32 besides."""
    lines = (("grad", grad), ("r", r), ("residual", residual))
    return (
        _narrow("r", r)
        or _typed(r.dtype, *lines)
        or _in_lines(*lines)
        or _together(r, *lines, contiguous=False)
        or _typed(torch.float32, ("rstd", rstd), ("weight", weight))
        or _together(r, ("rstd", rstd), ("weight", weight))
    )


def swiglu(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """For rows of one dtype in lines."""
    lines = (("gate", gate), ("up", up))
    return (
        _narrow("gate", gate)
        or _typed(gate.dtype, *lines)
        or _in_lines(*lines)
        or _together(gate, *lines, contiguous=False)
    )


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> str | None:
    """For rows of one dtype in lines."""
    return swiglu(gate, up, activation) or swiglu(gate, grad, activation)


def rotate_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_places: Tensor, k_places: Tensor, *_: object
) -> str | None:
    """For heads of one dtype in lines, tables in float32 and places in int32."""
    places = (("q_places", q_places), ("k_places", k_places))
    return _rotated((("q", q), ("k", k)), (("cos", cos), ("sin", sin)), places)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, *_: object,
) -> str | None:  # fmt: skip
    """For heads of one dtype in lines, tables in float32 and streams in int32."""
    heads, tables = (("q", q), ("k", k), ("v", v)), (("cos", cos), ("sin", sin))
    streams = (("q_places", q_places), ("k_places", k_places), ("q_starts", q_starts), ("k_starts", k_starts))
    return _rotated(heads, tables, streams)


def attention_backward_(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    *layout: Any,
) -> str | None:  # fmt: skip
    """For heads of one dtype in lines, tables in float32 and streams in int32."""
    heads = (("grad", grad), ("out", out), ("d_q", d_q), ("d_k", d_k), ("d_v", d_v))
    return (
        attention(q, k, v, *layout)
        or _typed(q.dtype, *heads)
        or _in_lines(*heads)
        or _together(q, *heads, contiguous=False)
        or _typed(torch.float32, ("lse", lse))
        or _together(q, ("lse", lse))
    )
