"""perturb in Triton: one masked gather-add over the tokens, out of place.

Memory traffic an element: hidden read and the result written, 4 bytes in bf16, and 4 bytes of delta where attacked.
"""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

TILE = 2048  # elements a program of 256 threads handles: 8 a thread, one 16-byte load of bf16 and two of delta


@triton.jit
def _perturb(
    hidden,
    delta,
    rows,
    out,
    tokens,
    hidden_stride,
    delta_stride,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = tl.load(rows + token, mask=token < tokens, other=-1)[:, None]
    token = token.to(tl.int64)[:, None]  # T * H passes 2^31
    inside = (token < tokens) & (column < WIDTH)
    x = tl.load(hidden + token * hidden_stride + column, mask=inside, other=0.0)
    touched = inside & (row >= 0)
    d = tl.load(delta + row * delta_stride + column, mask=touched, other=0.0)
    # The other tokens are copied: x + 0 would turn -0.0 into 0.0.
    tl.store(out + token * WIDTH + column, tl.where(touched, (x.to(tl.float32) + d).to(x.dtype), x), mask=inside)


def block(width: int) -> int:
    """Columns a program handles: the largest power of two that divides the width, so that every lane works.

    Where that is below 64 (a cache line of bf16), the next power of two above the width, with masked lanes.
    """
    even = min(width & -width, TILE)
    return even if even >= 64 else min(launch.power_of_two(width), TILE)


def perturb(hidden: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    """hidden [T, H] plus delta [R, H] float32 at `rows` [T] (-1: none), summed in float32 and rounded once."""
    tokens, width = hidden.shape
    out = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        columns = block(width)
        many = TILE // columns
        with launch.on(hidden):
            _perturb[(triton.cdiv(tokens, many), triton.cdiv(width, columns))](
                hidden,
                delta,
                rows,
                out,
                tokens,
                hidden.stride(0),
                delta.stride(0),
                WIDTH=width,
                TOKENS=many,
                BLOCK=columns,
                **launch.threads(TILE // 8),
            )
    return out
