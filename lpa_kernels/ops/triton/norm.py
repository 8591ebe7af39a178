"""The norms of a frozen block in Triton: residual sum, LoRA's second product, perturbation and RMS norm in one pass.

Memory traffic an element of bf16: forward 4 bytes read (x and residual) and 4 written (r and the normed row), backward
6 read and 2 written. LoRA's second factor, [H, K], is read from L2 by every 16 tokens.
"""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .product import product

WIDEST = 8192  # widest row held in registers; a wider one is taken in chunks
CHUNK = 2048  # columns of such a chunk
SHARE = 16  # elements a thread holds
LORA_ROWS, LORA_BLOCK = 16, 128  # the tile of LoRA's product, of as few rows as a matrix unit takes
LORA_SCRATCH = LORA_ROWS * LORA_BLOCK * 4  # bytes to exchange that tile between threads


@triton.jit
def _joined(
    x, residual, low, up, delta, rows, token, real, start, x_stride, residual_stride, low_stride, up_stride, scale,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, RESIDUAL: tl.constexpr, DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + scale * (x + low up^T + delta) of a tile, summed in float32 and rounded once to x's dtype."""
    span = start + tl.arange(0, BLOCK)
    column = span[None, :]
    inside = real & (column < WIDTH)
    raw = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
    y = raw.to(tl.float32)
    if RANK:
        k = tl.arange(0, RANKS)[None, :]
        a = tl.load(low + token * low_stride + k, mask=real & (k < RANK), other=0.0)
        b = tl.load(up + span[:, None] * up_stride + k, mask=(span[:, None] < WIDTH) & (k < RANK), other=0.0)
        y += product(a, tl.trans(b))
    if DELTA:
        row = tl.load(rows + token, mask=real, other=-1)
        y += tl.load(delta + row * WIDTH + column, mask=inside & (row >= 0), other=0.0)
    if RESIDUAL:
        y = tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32) + scale * y
    return y.to(raw.dtype)


@triton.jit
def _normed(r, weight, column, inv, WIDTH: tl.constexpr):
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return (r.to(tl.float32) * inv * w).to(r.dtype)


@triton.jit
def _add_norm(
    x, residual, low, up, delta, rows, weight, r, normed, rstd, tokens, x_stride, residual_stride, low_stride,
    up_stride, scale, eps,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, RESIDUAL: tl.constexpr, DELTA: tl.constexpr,
    ADDED: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    real = token < tokens
    span = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= WIDTH:
        y = _joined(
            x, residual, low, up, delta, rows, token, real, 0, x_stride, residual_stride, low_stride, up_stride, scale,
            WIDTH, RANK, RANKS, RESIDUAL, DELTA, BLOCK,
        )  # fmt: skip
        inside = real & (span < WIDTH)
        if ADDED:
            tl.store(r + token * WIDTH + span, y, mask=inside)
        if NORM:
            wide = y.to(tl.float32)
            inv = tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / WIDTH + eps)
            tl.store(rstd + token, inv, mask=real)
            tl.store(normed + token * WIDTH + span, _normed(y, weight, span, inv, WIDTH), mask=inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            y = _joined(
                x, residual, low, up, delta, rows, token, real, start, x_stride, residual_stride, low_stride,
                up_stride, scale, WIDTH, RANK, RANKS, RESIDUAL, DELTA, BLOCK,
            )  # fmt: skip
            if ADDED:
                tl.store(r + token * WIDTH + start + span, y, mask=real & (start + span < WIDTH))
            squares += y.to(tl.float32) * y.to(tl.float32)
        if NORM:
            inv = tl.rsqrt(tl.sum(squares, 1)[:, None] / WIDTH + eps)
            tl.store(rstd + token, inv, mask=real)
            tl.debug_barrier()  # other threads may have written what is read now, from the caches
            for start in range(0, WIDTH, BLOCK):
                column = start + span
                inside = real & (column < WIDTH)
                place = r + token * WIDTH if ADDED else x + token * x_stride
                y = tl.load(place + column, mask=inside, other=0.0)
                tl.store(normed + token * WIDTH + column, _normed(y, weight, column, inv, WIDTH), mask=inside)


@triton.jit
def _scaled(grad, r, weight, token, column, inside, grad_stride, r_stride, WIDTH: tl.constexpr):
    """weight * grad and r of a tile in float32."""
    g = tl.load(grad + token * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return g * w, tl.load(r + token * r_stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _summed(
    out, residual, scaled, values, along, inv, token, column, inside, residual_stride,
    WIDTH: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    y = inv * (scaled - values * along)
    if RESIDUAL:
        y += tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_backward(
    grad, r, rstd, weight, residual, out, tokens, grad_stride, r_stride, residual_stride,
    WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    real = token < tokens
    span = tl.arange(0, BLOCK)[None, :]
    inv = tl.load(rstd + token, mask=real, other=0.0)
    if BLOCK >= WIDTH:
        inside = real & (span < WIDTH)
        scaled, values = _scaled(grad, r, weight, token, span, inside, grad_stride, r_stride, WIDTH)
        along = tl.sum(scaled * values, 1)[:, None] * (inv * inv / WIDTH)
        _summed(out, residual, scaled, values, along, inv, token, span, inside, residual_stride, WIDTH, RESIDUAL)
    else:
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + span
            inside = real & (column < WIDTH)
            scaled, values = _scaled(grad, r, weight, token, column, inside, grad_stride, r_stride, WIDTH)
            products += scaled * values
        along = tl.sum(products, 1)[:, None] * (inv * inv / WIDTH)
        for start in range(0, WIDTH, BLOCK):
            column = start + span
            inside = real & (column < WIDTH)
            scaled, values = _scaled(grad, r, weight, token, column, inside, grad_stride, r_stride, WIDTH)
            _summed(out, residual, scaled, values, along, inv, token, column, inside, residual_stride, WIDTH, RESIDUAL)


def plan(width: int) -> tuple[int, int, int]:
    """Rows of a program, columns that it holds at once, and threads, by the width of a row.

    Up to 8192 a row is held whole, 16 elements a thread; narrow rows (heads) share a program of 64 threads.
    """
    columns = launch.power_of_two(width)
    if columns > WIDEST:
        return 1, CHUNK, 256
    rows = max(1, min(64, 1024 // columns))
    return rows, columns, max(64, rows * columns // SHARE)


def _ranks(rank: int) -> int:
    return max(16, launch.power_of_two(rank))


def shared_bytes(rank: int, element_size: int) -> int:
    """No less than the shared memory of a program with LoRA, as Triton 3.7 compiles it: the tiles of both factors, on
    CUDA the next ones too, which are loaded meanwhile, and scratch. Ranks that are no multiples of 16 take less."""
    tiles = 1 if torch.version.hip else 2
    return tiles * (LORA_BLOCK + LORA_ROWS) * _ranks(rank) * element_size + LORA_SCRATCH


def unsupported(x: Tensor, low: Tensor | None) -> str | None:
    """Why the kernel cannot take a LoRA of this rank on x's device, or None."""
    if low is None:
        return None
    needed, room = shared_bytes(low.shape[1], x.element_size()), launch.shared_memory(x.device)
    if needed > room:
        return f"LoRA of rank {low.shape[1]} takes {needed} bytes of shared memory; there are {room}"
    return None


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    delta: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream after a branch, its RMS norm and that norm's factor, as `lpa_kernels.ops.add_norm`."""
    tokens, width = x.shape
    perturbed = delta is not None and len(delta) > 0
    added = residual is not None or low is not None or perturbed
    r = torch.empty((tokens, width) if added else 0, dtype=x.dtype, device=x.device)
    normed = torch.empty((tokens, width) if weight is not None else 0, dtype=x.dtype, device=x.device)
    rstd = torch.empty(tokens if weight is not None else 0, dtype=torch.float32, device=x.device)
    if not x.numel() or not (added or weight is not None):
        return r, normed, rstd
    rank = 0 if low is None else low.shape[1]
    rows_each, columns, threads = (LORA_ROWS, LORA_BLOCK, 128) if rank else plan(width)
    with launch.on(x):
        _add_norm[(triton.cdiv(tokens, rows_each),)](
            x, residual, low, up, delta, rows, weight, r, normed, rstd, tokens, x.stride(0),
            0 if residual is None else residual.stride(0), 0 if low is None else low.stride(0),
            0 if up is None else up.stride(0), scale, eps,
            WIDTH=width, RANK=rank, RANKS=_ranks(rank), RESIDUAL=residual is not None,
            DELTA=perturbed, ADDED=added, NORM=weight is not None, ROWS=rows_each, BLOCK=columns,
            **launch.threads(threads),
        )  # fmt: skip
    return r, normed, rstd


def add_norm_backward(grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of r [T, H] from that of its norm, plus `residual`, the gradient that passes the norm by."""
    tokens, width = r.shape
    out = torch.empty((tokens, width), dtype=r.dtype, device=r.device)
    if not out.numel():
        return out
    rows_each, columns, threads = plan(width)
    with launch.on(r):
        _add_norm_backward[(triton.cdiv(tokens, rows_each),)](
            grad, r, rstd, weight, residual, out, tokens, grad.stride(0), r.stride(0),
            0 if residual is None else residual.stride(0),
            WIDTH=width, RESIDUAL=residual is not None, ROWS=rows_each, BLOCK=columns, **launch.threads(threads),
        )  # fmt: skip
    return out
