"""Attention within packed rows in Triton, forward and backward, without a mask in memory.

A program holds a tile of queries of one head (or of keys, for their gradients) and walks over the row's other side.
Branches and positions say which pairs are seen; tiles whose keys all come later than the queries are skipped.
Queries and keys are rotated once, into scratch, and gradients rotated back where they are: inside the tiles every key
would be rotated again for each tile of queries of each head, and the angles cost the registers of a tile.
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

_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is never NaN
WIDEST = 256  # widest head
TURNED = 2048  # pairs of entries that a program rotates


# ---- rotation --------------------------------------------------------------------------------------------------------


@triton.jit
def _turn(
    x, out, places, cos, sin, tokens, block, head, x_stride, x_head, out_stride, out_head,
    BACK: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = tl.arange(0, PAD)[None, :]
    inside = (token < tokens) & (column < HALF)
    position = tl.load(places + 2 * token + 1, mask=token < tokens, other=0)
    c = tl.load(cos + position * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + position * HALF + column, mask=inside, other=0.0)
    if BACK:
        s = -s
    place = x + head * x_head + token * x_stride + column
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    place = out + head * out_head + token * out_stride + column
    tl.store(place, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q, k, q_out, k_out, q_places, k_places, cos, sin, queries, keys, heads, q_stride, q_head, k_stride, k_head,
    q_out_stride, q_out_head, k_out_stride, k_out_head,
    BACK: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """q and k rotated, or rotated back, by the positions of their tokens; a program takes one head of some tokens."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    if head < heads:
        _turn(
            q, q_out, q_places, cos, sin, queries, block, head, q_stride, q_head, q_out_stride, q_out_head,
            BACK, HALF, PAD, TOKENS,
        )  # fmt: skip
    else:
        _turn(
            k, k_out, k_places, cos, sin, keys, block, head - heads, k_stride, k_head, k_out_stride, k_out_head,
            BACK, HALF, PAD, TOKENS,
        )  # fmt: skip


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    back: bool = False, inside: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """New tensors of q and k rotated; with `inside`, q and k themselves. back: the other way round."""
    if cos is None or not (q.numel() or k.numel()):
        return q, k
    q_out, k_out = (q, k) if inside else (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    half = cos.shape[1]
    pad = launch.power_of_two(half)
    many = max(1, TURNED // pad)
    strides = [s for t in (q, k, q_out, k_out) for s in t.stride()[:2]]
    _rotate[(triton.cdiv(max(len(q), len(k)), many), q.shape[1] + k.shape[1])](
        q, k, q_out, k_out, q_places, k_places, cos, sin, len(q), len(k), q.shape[1], *strides,
        BACK=back, HALF=half, PAD=pad, TOKENS=many, **launch.threads(TURNED // 8),
    )  # fmt: skip
    return q_out, k_out


def rotate_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_places: Tensor, k_places: Tensor, back: bool
) -> None:  # fmt: skip
    """Rotate q and k where they are, as `lpa_kernels.ops.rotate_`."""
    with launch.on(q):
        _rotated(q, k, cos, sin, q_places, k_places, back=back, inside=True)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row(starts, row):
    """A row's first token, in 64 bits, and its length. Within a row 32 bits suffice, and save registers."""
    first = tl.load(starts + row)
    return first.to(tl.int64), tl.load(starts + row + 1) - first


@triton.jit
def _places(places, token, real):
    """Branch and position of tokens; places past the end are padding."""
    return tl.load(places + 2 * token, mask=real, other=-1), tl.load(places + 2 * token + 1, mask=real, other=0)


@triton.jit
def _heads(base, token, real, stride, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """The heads [A, PAD] of tokens [A], 0 where there is nothing."""
    column = tl.arange(0, PAD)[None, :]
    return tl.load(base + token[:, None] * stride + column, mask=real[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def _keep(base, x, token, real, stride, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Write x [A, PAD] as the heads of tokens [A]."""
    column = tl.arange(0, PAD)[None, :]
    place = base + token[:, None] * stride + column
    tl.store(place, x.to(base.dtype.element_ty), mask=real[:, None] & (column < WIDTH))


@triton.jit
def _seen(q_branch, q_position, k_branch, k_position, WINDOW: tl.constexpr):
    """Which queries see which keys; the arguments are [A, 1] and [1, B], padding of branch -1."""
    seen = (k_branch >= 0) & (q_branch >= 0) & ((k_branch == q_branch) | (k_branch == 0)) & (k_position <= q_position)
    if WINDOW:
        seen = seen & (q_position - k_position < WINDOW)
    return seen


@triton.jit
def _tanh(x):
    """tanh to float32's last digits: a series near 0, where the quotient would lose them."""
    q = x * x
    series = x + x * q * (
        -0.33333332819422 + q * (0.133314422036 + q * (-0.0537397155531 + q * (0.0206390887954 - q * 0.00570498872745)))
    )
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0, -far, far))


@triton.jit
def _scores(s, scale, softcap, SOFTCAP: tl.constexpr):
    s *= scale
    if SOFTCAP:
        s = softcap * _tanh(s / softcap)
    return s


@triton.jit
def _slope(s, p, dp, own, scale, softcap, SOFTCAP: tl.constexpr):
    """The gradient of the product q' k', from the capped scores s, their softmax p, and the gradient dp of p."""
    slope = p * (dp - own) * scale
    if SOFTCAP:
        slope *= 1 - (s / softcap) * (s / softcap)
    return slope


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _attention(
    q, k, v, q_places, k_places, q_starts, k_starts, out, lse, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    queries, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(2)
    q_first, q_count = _row(q_starts, row)
    k_first, k_count = _row(k_starts, row)
    m = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= q_count:
        return
    real_m = m < q_count
    q_branch, q_position = _places(q_places + 2 * q_first, m, real_m)
    latest = tl.max(q_position, 0)
    query = _heads(q + q_first * q_stride + head * q_head, m, real_m, q_stride, WIDTH, PAD)
    k += k_first * k_stride + (head // GROUP) * k_head
    v += k_first * v_stride + (head // GROUP) * v_head
    k_places += 2 * k_first
    top = tl.full([M], _LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    found = tl.zeros([M, PAD], tl.float32)
    for at in range(0, k_count, N):
        n = at + tl.arange(0, N)
        real_n = n < k_count
        k_branch, k_position = _places(k_places, n, real_n)
        k_position = tl.where(real_n, k_position, 1 << 30)
        if tl.min(k_position, 0) <= latest:  # else all of these keys come later
            seen = _seen(q_branch[:, None], q_position[:, None], k_branch[None, :], k_position[None, :], WINDOW)
            key = _heads(k, n, real_n, k_stride, WIDTH, PAD)
            value = _heads(v, n, real_n, v_stride, WIDTH, PAD)
            s = _scores(product(query, tl.trans(key)), scale, softcap, SOFTCAP)
            s = tl.where(seen, s, _LOWEST)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.where(seen, tl.exp(s - new[:, None]), 0.0)
            old = tl.exp(top - new)
            found = found * old[:, None] + product(p.to(value.dtype), value)
            total = total * old + tl.sum(p, 1)
            top = new
    some = total > 0
    total = tl.where(some, total, 1.0)
    out += q_first * (HEADS * WIDTH) + head * WIDTH
    _keep(out, found / total[:, None], m, real_m, HEADS * WIDTH, WIDTH, PAD)
    tl.store(lse + head.to(tl.int64) * queries + q_first + m, tl.where(some, top + tl.log(total), 0.0), mask=real_m)


@triton.jit
def _gradient_of_queries(
    grad, q, k, v, out, lse, own, d_q, q_places, k_places, q_starts, k_starts, grad_stride, grad_head, q_stride,
    q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, d_q_stride, d_q_head, queries, scale, softcap,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Also writes own [heads, Tq], the sum of each query's out * grad."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    q_first, q_count = _row(q_starts, row)
    k_first, k_count = _row(k_starts, row)
    m = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= q_count:
        return
    real_m = m < q_count
    q_branch, q_position = _places(q_places + 2 * q_first, m, real_m)
    latest = tl.max(q_position, 0)
    g = _heads(grad + q_first * grad_stride + head * grad_head, m, real_m, grad_stride, WIDTH, PAD)
    o = _heads(out + q_first * out_stride + head * out_head, m, real_m, out_stride, WIDTH, PAD)
    mine = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    line = head.to(tl.int64) * queries + q_first
    tl.store(own + line + m, mine, mask=real_m)
    # after `o` is done with: before it, Triton 3.9 spills registers on sm_80
    query = _heads(q + q_first * q_stride + head * q_head, m, real_m, q_stride, WIDTH, PAD)
    logsum = tl.load(lse + line + m, mask=real_m, other=0.0)
    k += k_first * k_stride + (head // GROUP) * k_head
    v += k_first * v_stride + (head // GROUP) * v_head
    k_places += 2 * k_first
    d_query = tl.zeros([M, PAD], tl.float32)
    for at in range(0, k_count, N):
        n = at + tl.arange(0, N)
        real_n = n < k_count
        k_branch, k_position = _places(k_places, n, real_n)
        k_position = tl.where(real_n, k_position, 1 << 30)
        if tl.min(k_position, 0) <= latest:  # else all of these keys come later
            seen = _seen(q_branch[:, None], q_position[:, None], k_branch[None, :], k_position[None, :], WINDOW)
            key = _heads(k, n, real_n, k_stride, WIDTH, PAD)
            value = _heads(v, n, real_n, v_stride, WIDTH, PAD)
            s = _scores(product(query, tl.trans(key)), scale, softcap, SOFTCAP)
            p = tl.exp(tl.where(seen, s - logsum[:, None], _LOWEST))
            slope = _slope(s, p, product(g, tl.trans(value)), mine[:, None], scale, softcap, SOFTCAP)
            d_query += product(slope.to(key.dtype), key)
    _keep(d_q + q_first * d_q_stride + head * d_q_head, d_query, m, real_m, d_q_stride, WIDTH, PAD)


@triton.jit
def _gradient_of_keys(
    grad, q, k, v, lse, own, d_k, d_v, q_places, k_places, q_starts, k_starts, grad_stride, grad_head, q_stride,
    q_head, k_stride, k_head, v_stride, v_head, d_k_stride, d_k_head, d_v_stride, d_v_head, queries, scale, softcap,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    q_first, q_count = _row(q_starts, row)
    k_first, k_count = _row(k_starts, row)
    n = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= k_count:
        return
    real_n = n < k_count
    k_branch, k_position = _places(k_places + 2 * k_first, n, real_n)
    earliest = tl.min(tl.where(real_n, k_position, 1 << 30), 0)
    key = _heads(k + k_first * k_stride + kv_head * k_head, n, real_n, k_stride, WIDTH, PAD)
    value = _heads(v + k_first * v_stride + kv_head * v_head, n, real_n, v_stride, WIDTH, PAD)
    q += q_first * q_stride
    grad += q_first * grad_stride
    q_places += 2 * q_first
    d_key = tl.zeros([N, PAD], tl.float32)
    d_value = tl.zeros([N, PAD], tl.float32)
    tiles = tl.cdiv(q_count, M)
    for i in range(GROUP * tiles):  # one loop: a nested one is unrolled, and spills
        head = kv_head * GROUP + i // tiles
        m = i % tiles * M + tl.arange(0, M)
        real_m = m < q_count
        q_branch, q_position = _places(q_places, m, real_m)
        if tl.max(q_position, 0) >= earliest:  # else all of these queries come before
            seen = _seen(q_branch[None, :], q_position[None, :], k_branch[:, None], k_position[:, None], WINDOW)
            query = _heads(q + head * q_head, m, real_m, q_stride, WIDTH, PAD)
            g = _heads(grad + head * grad_head, m, real_m, grad_stride, WIDTH, PAD)
            line = head.to(tl.int64) * queries + q_first
            logsum = tl.load(lse + line + m, mask=real_m, other=0.0)
            mine = tl.load(own + line + m, mask=real_m, other=0.0)
            s = _scores(product(key, tl.trans(query)), scale, softcap, SOFTCAP)
            p = tl.exp(tl.where(seen, s - logsum[None, :], _LOWEST))
            d_value += product(p.to(g.dtype), g)
            slope = _slope(s, p, product(value, tl.trans(g)), mine[None, :], scale, softcap, SOFTCAP)
            d_key += product(slope.to(query.dtype), query)
    _keep(d_k + k_first * d_k_stride + kv_head * d_k_head, d_key, n, real_n, d_k_stride, WIDTH, PAD)
    _keep(d_v + k_first * d_v_stride + kv_head * d_v_head, d_value, n, real_n, d_v_stride, WIDTH, PAD)


# ---- the ops ---------------------------------------------------------------------------------------------------------


def plan(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of the tile that a program holds, of those that it walks over, and warps, by the width of a head.

    A warp has 16 rows of the tile that is held, whatever its number of threads. A wide head leaves registers for
    fewer rows than that, and float32 for fewer still; with four warps Triton 3.9 spills those of a wide one.
    """
    if dtype == torch.float32:
        return 16, 16, 4
    return (64, 16, 4) if width <= 128 else (32, 16, 8)


def _shape(q: Tensor, k: Tensor, softcap: float, window: int) -> dict[str, int | bool]:
    return {
        "GROUP": q.shape[1] // k.shape[1], "SOFTCAP": softcap != 0, "WINDOW": window, "WIDTH": q.shape[2],
        "PAD": max(16, launch.power_of_two(q.shape[2])), "num_stages": 1,
    }  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within the rows of a stream, as `lpa_kernels.ops.attention`."""
    queries, heads, width = q.shape
    out = torch.empty((queries, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    if not queries:
        return out, lse
    held, walked, warps = plan(width, q.dtype)
    with launch.on(q):
        q, k = _rotated(q, k, cos, sin, q_places, k_places)
        strides = [s for t in (q, k, v) for s in t.stride()[:2]]
        _attention[(triton.cdiv(longest_q, held), heads, len(q_starts) - 1)](
            q, k, v, q_places, k_places, q_starts, k_starts, out, lse, *strides, queries, scale, softcap,
            HEADS=heads, M=held, N=walked, **launch.options(warps), **_shape(q, k, softcap, window),
        )  # fmt: skip
    return out, lse


def attention_backward_(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor, q_starts: Tensor, k_starts: Tensor,
    longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, as `lpa_kernels.ops.attention_backward_`."""
    queries, heads, width = q.shape
    held, walked, warps = plan(width, q.dtype)
    shape = _shape(q, k, softcap, window) | launch.options(warps)
    own = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    stream = (q_places, k_places, q_starts, k_starts)
    with launch.on(q):
        q, k = _rotated(q, k, cos, sin, q_places, k_places)
        strides = [s for t in (grad, q, k, v) for s in t.stride()[:2]]
        if queries:
            _gradient_of_queries[(triton.cdiv(longest_q, held), heads, len(q_starts) - 1)](
                grad, q, k, v, out, lse, own, d_q, *stream, *strides, *out.stride()[:2], *d_q.stride()[:2], queries,
                scale, softcap, M=held, N=walked, **shape,
            )  # fmt: skip
        if len(k):
            _gradient_of_keys[(triton.cdiv(longest_k, held), k.shape[1], len(q_starts) - 1)](
                grad, q, k, v, lse, own, d_k, d_v, *stream, *strides, *d_k.stride()[:2], *d_v.stride()[:2], queries,
                scale, softcap, M=walked, N=held, **shape,
            )  # fmt: skip
        _rotated(d_q, d_k, cos, sin, q_places, k_places, back=True, inside=True)


def unsupported(q: Tensor, cos: Tensor | None) -> str | None:
    """Why the kernels cannot take heads of this shape, or None."""
    width = q.shape[2]
    if width > WIDEST:
        return f"a head is {width} wide; it takes up to {WIDEST}"
    if cos is not None and 2 * cos.shape[1] != width:
        return f"{2 * cos.shape[1]} of a head's {width} entries are rotated; it takes all or none"
    return None
