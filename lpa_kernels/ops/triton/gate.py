"""The gate of a frozen block in Triton, forward and in place backward.

Both activations are x * sigmoid(t(x)): t(x) = x for SiLU, and 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU by tanh, since
1 + tanh(u) = 2 sigmoid(2 u). Memory traffic an element of bf16: forward 4 bytes read and 2 written, backward 6 and 4.
"""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .perturb import TILE, block

_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x, SILU: tl.constexpr):
    """sigmoid(t(x)) and t'(x)."""
    if SILU:
        t = x
        slope = 1.0
    else:
        t = _SLOPE * (x + _CUBE * x * x * x)
        slope = _SLOPE * (1 + 3 * _CUBE * x * x)
    small = tl.exp(-tl.abs(t))  # at most 1
    return tl.where(t >= 0, 1.0, small) / (1 + small), slope


@triton.jit
def _place(tokens, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return token, column, (token < tokens) & (column < WIDTH)


@triton.jit
def _swiglu(
    gate, up, out, tokens, gate_stride, up_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, column, inside = _place(tokens, WIDTH, TOKENS, BLOCK)
    x = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    s, _ = _sigmoid(x, SILU)
    tl.store(out + token * WIDTH + column, (x * s * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gate, up, grad, tokens, gate_stride, up_stride, grad_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, column, inside = _place(tokens, WIDTH, TOKENS, BLOCK)
    x = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + token * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    s, slope = _sigmoid(x, SILU)
    own = g * u * s * (1 + x * (1 - s) * slope)
    tl.store(gate + token * gate_stride + column, own.to(gate.dtype.element_ty), mask=inside)
    tl.store(up + token * up_stride + column, (g * x * s).to(up.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, all [T, F]."""
    tokens, width = gate.shape
    out = torch.empty((tokens, width), dtype=gate.dtype, device=gate.device)
    if out.numel():
        columns = block(width)
        many = TILE // columns
        with launch.on(gate):
            _swiglu[(triton.cdiv(tokens, many), triton.cdiv(width, columns))](
                gate, up, out, tokens, gate.stride(0), up.stride(0),
                WIDTH=width, SILU=activation == "silu", TOKENS=many, BLOCK=columns, **launch.threads(TILE // 8),
            )  # fmt: skip
    return out


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    """Overwrite gate and up [T, F] by their gradients, from `grad` [T, F], that of activation(gate) * up."""
    tokens, width = gate.shape
    if gate.numel():
        columns = block(width)
        many = TILE // columns
        with launch.on(gate):
            _swiglu_backward[(triton.cdiv(tokens, many), triton.cdiv(width, columns))](
                gate, up, grad, tokens, gate.stride(0), up.stride(0), grad.stride(0),
                WIDTH=width, SILU=activation == "silu", TOKENS=many, BLOCK=columns, **launch.threads(TILE // 8),
            )  # fmt: skip
