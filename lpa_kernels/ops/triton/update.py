"""pgd_update_ in Triton: gradient, rule, norm, projection and count of all sites in one pass and one launch.

Memory traffic an element: delta, and for "adamw" both moments, read and written once, 8 and 24 bytes; the gradients
of K tokens read where autograd left them, 2 K bytes in bf16. All else is smaller than a row.
"""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
from __future__ import annotations

import math
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from . import launch

SITES = 16  # gradients one launch can read; each is three arguments of the kernel
WIDEST = 4096  # widest row held in registers; a wider one is moved in chunks
SHARE = 16  # elements a thread holds


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t from log(beta), without the cancellation that costs four digits at beta = .999 and t = 1."""
    x = log_beta * t
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(x > -0.35, -x * series, 1 - tl.exp(x))


@triton.jit
def _gradient(
    grad, row_stride, column_stride, tokens, row, real, inside, column,
    SHARES: tl.constexpr, UNIT: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Float32 sum of the gradients of each row's tokens, non-finite entries as 0; `row` [A, 1], `column` [1, B]."""
    g = tl.zeros(inside.shape, tl.float32)
    for share in tl.static_range(SHARES):
        token = tl.load(tokens + row * SHARES + share, mask=real, other=-1)
        # Four at a time, as the float32 tensors are read: eight bf16 would cost a trip through shared memory.
        offset = (
            tl.max_contiguous(token * row_stride + column, [1, 4])
            if UNIT
            else (token * row_stride + column.to(tl.int64) * column_stride)
        )
        g += tl.load(grad + offset, mask=inside & (token >= 0), other=0.0).to(tl.float32)
    g = tl.where(tl.abs(g) < float("inf"), g, 0.0)  # false for NaN too
    return -g if MAXIMIZE else g


@triton.jit
def _state(delta, exp_avg, exp_avg_sq, offset, mask, RULE: tl.constexpr):
    """delta and its moments, or delta thrice for a rule without moments; these loads wait for no other."""
    d = tl.load(delta + offset, mask=mask, other=0.0)
    m = tl.load(exp_avg + offset, mask=mask, other=0.0) if RULE == "adamw" else d
    v = tl.load(exp_avg_sq + offset, mask=mask, other=0.0) if RULE == "adamw" else d
    return d, m, v


@triton.jit
def _moved(
    d, m, v, g, exp_avg, exp_avg_sq, offset, inside, length, t, size,
    log_beta1, log_beta2, beta1, beta2, rest1, rest2, eps, weight_decay, RULE: tl.constexpr,
):  # fmt: skip
    """delta after the step and before the projection, changed only `inside`; writes the moments."""
    if RULE == "adamw":
        m = beta1 * m + rest1 * g
        tl.store(exp_avg + offset, m, mask=inside)
        v = beta2 * v + rest2 * g * g
        tl.store(exp_avg_sq + offset, v, mask=inside)
        scale = size / _one_minus_power(log_beta1, t)
        root = 1 / tl.sqrt(_one_minus_power(log_beta2, t))
        new = d * (1 - size * weight_decay) - scale * m / (tl.sqrt(v) * root + eps)
    elif RULE == "normalised":
        new = d - size * tl.where(length > 0, g / length, 0.0)
    else:
        new = d - size * tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    return tl.where(inside, new, d)


@triton.jit
def _largest(x):
    """[A, 1]: the largest magnitude of each row of x, NaN for a row with a NaN (as an integer it is above inf)."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)[:, None].to(tl.float32, bitcast=True)


@triton.jit
def _projected(d, norm, radius, NORM: tl.constexpr):
    if NORM == "l2":
        d = d * tl.where(norm > radius, radius / norm, 1.0)
    elif NORM == "linf":
        d = tl.where(d > radius, radius, tl.where(d < -radius, -radius, d))  # a NaN stays one
    return d


@triton.jit
def _update(
    delta, exp_avg, exp_avg_sq, grads, row_strides, column_strides, tokens, step, step_size, epsilon, norms, clipped,
    first, rows, log_beta1, log_beta2, beta1, beta2, rest1, rest2, eps, weight_decay,
    WIDTH: tl.constexpr, SHARES: tl.constexpr, RULE: tl.constexpr, NORM: tl.constexpr, MAXIMIZE: tl.constexpr,
    UNIT: tl.constexpr, EPSILON_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1)
    grad, row_stride, column_stride = grads[0], row_strides[0], column_strides[0]
    for i in tl.static_range(1, len(grads)):
        grad = tl.where(index == i, grads[i], grad)
        row_stride = tl.where(index == i, row_strides[i], row_stride)
        column_stride = tl.where(index == i, column_strides[i], column_stride)
    site = first + index

    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    real = row < rows
    live = row < 0
    for share in tl.static_range(SHARES):
        live = live | (tl.load(tokens + row * SHARES + share, mask=real, other=-1) >= 0)
    place = site.to(tl.int64) * rows + row
    radius = tl.load(epsilon + place * EPSILON_STRIDE, mask=real, other=0.0)
    t = tl.load(step)
    size = tl.load(step_size)
    span = tl.arange(0, BLOCK)[None, :]
    at = delta + place * WIDTH

    # g / largest has a norm near 1; the squares of tiny gradients themselves would vanish.
    length = tl.zeros([ROWS, 1], tl.float32)
    if BLOCK >= WIDTH:
        offset = place * WIDTH + span
        d, m, v = _state(delta, exp_avg, exp_avg_sq, offset, real & (span < WIDTH), RULE)
        inside = live & (span < WIDTH)
        g = _gradient(grad, row_stride, column_stride, tokens, row, real, inside, span, SHARES, UNIT, MAXIMIZE)
        if RULE == "normalised":
            largest = tl.max(tl.abs(g), 1)[:, None]
            g = g / tl.where(largest > 0, largest, 1.0)
            length = tl.sqrt(tl.sum(g * g, 1)[:, None])
        d = _moved(
            d, m, v, g, exp_avg, exp_avg_sq, offset, inside, length, t, size,
            log_beta1, log_beta2, beta1, beta2, rest1, rest2, eps, weight_decay, RULE,
        )  # fmt: skip
        norm = _largest(d) if NORM == "linf" else tl.sqrt(tl.sum(d * d, 1)[:, None])
        tl.store(at + span, _projected(d, norm, radius, NORM), mask=inside)
    else:
        partial = tl.zeros([ROWS, BLOCK], tl.float32)
        largest = tl.full([ROWS, 1], 1.0, tl.float32)
        if RULE == "normalised":
            for start in range(0, WIDTH, BLOCK):
                column = start + span
                inside = live & (column < WIDTH)
                g = _gradient(
                    grad, row_stride, column_stride, tokens, row, real, inside, column, SHARES, UNIT, MAXIMIZE
                )
                partial = tl.maximum(partial, tl.abs(g))
            largest = tl.max(partial, 1)[:, None]
            largest = tl.where(largest > 0, largest, 1.0)
            partial = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, WIDTH, BLOCK):
                column = start + span
                inside = live & (column < WIDTH)
                g = _gradient(
                    grad, row_stride, column_stride, tokens, row, real, inside, column, SHARES, UNIT, MAXIMIZE
                )
                g = g / largest
                partial += g * g
            length = tl.sqrt(tl.sum(partial, 1)[:, None])
            partial = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + span
            offset = place * WIDTH + column
            d, m, v = _state(delta, exp_avg, exp_avg_sq, offset, real & (column < WIDTH), RULE)
            inside = live & (column < WIDTH)
            g = _gradient(grad, row_stride, column_stride, tokens, row, real, inside, column, SHARES, UNIT, MAXIMIZE)
            g = g / largest if RULE == "normalised" else g
            d = _moved(
                d, m, v, g, exp_avg, exp_avg_sq, offset, inside, length, t, size,
                log_beta1, log_beta2, beta1, beta2, rest1, rest2, eps, weight_decay, RULE,
            )  # fmt: skip
            tl.store(at + column, d, mask=inside)
            if NORM == "linf":
                partial = tl.maximum(partial, tl.abs(d), propagate_nan=tl.PropagateNan.ALL)
            else:
                partial += d * d
        norm = _largest(partial) if NORM == "linf" else tl.sqrt(tl.sum(partial, 1)[:, None])
        if NORM != "none":  # once more over the rows that must shrink, which still lie in the caches
            tl.debug_barrier()
            for start in range(0, WIDTH, BLOCK):
                column = start + span
                inside = live & (norm > radius) & (column < WIDTH)
                d = tl.load(at + column, mask=inside, other=0.0)
                tl.store(at + column, _projected(d, norm, radius, NORM), mask=inside)

    tl.store(norms + place, norm, mask=real)
    if NORM != "none":
        count = tl.sum(tl.sum((live & (norm > radius)).to(tl.int32), 1), 0)
        tl.atomic_add(clipped + site, count, mask=count > 0, sem="relaxed")


def _runs(grads: list[Tensor]) -> Iterator[tuple[int, list[Tensor], bool]]:
    """One (first site, gradients, whether their columns lie side by side) for each launch.

    The sites of a launch share a dtype and that answer. In an attack all of them do, which makes one launch.
    """
    first = 0
    for i in range(1, len(grads) + 1):
        a = grads[first]
        if (
            i == len(grads)
            or i - first == SITES
            or grads[i].dtype != a.dtype
            or (grads[i].stride(1) == 1) != (a.stride(1) == 1)
        ):
            yield first, grads[first:i], a.stride(1) == 1
            first = i


def plan(width: int) -> tuple[int, int, int]:
    """Rows of a program, columns that it holds at once, and threads, by the width of a row.

    Up to 4096 a row is held whole, 16 elements a thread: delta, both moments and the gradient take 64 registers. The
    whole kernel takes 80 to 102 (Triton 3.6 to 3.9), so that two or three programs of 256 threads share a
    multiprocessor, and one loads while another reduces or writes. Narrow rows share a program of 64 threads. A wider
    row would need 512 threads or more of over 64 registers, one program a multiprocessor with nothing to overlap.
    It goes in chunks, and is read again, from the caches, only where the projection shortens it.
    """
    columns = launch.power_of_two(width)
    if columns > WIDEST:
        return 1, 2048, 256
    rows = max(1, min(64, 1024 // columns))
    return rows, columns, max(64, rows * columns // SHARE)


def pgd_update_(
    delta: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    grads: list[Tensor],
    tokens: Tensor,
    step: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
    norms: Tensor,
    clipped: Tensor,
    rule: str,
    norm: str,
    maximize: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of `rule` on delta [S, R, H] and the projection, as `lpa_kernels.pgd_update_` describes it."""
    _, rows, width = delta.shape
    if not delta.numel():
        norms.zero_()
        return
    rows_each, columns, threads = plan(width)
    with launch.on(delta):
        for first, some, unit in _runs(grads):
            _update[(triton.cdiv(rows, rows_each), len(some))](
                delta,
                exp_avg,
                exp_avg_sq,
                tuple(some),
                tuple(grad.stride(0) for grad in some),
                tuple(grad.stride(1) for grad in some),
                tokens,
                step,
                step_size,
                epsilon,
                norms,
                clipped,
                first,
                rows,
                math.log(beta1) if beta1 else -math.inf,
                math.log(beta2) if beta2 else -math.inf,
                beta1,
                beta2,
                1 - beta1,
                1 - beta2,
                eps,
                weight_decay,
                WIDTH=width,
                SHARES=tokens.shape[1],
                RULE=rule,
                NORM=norm,
                MAXIMIZE=maximize,
                UNIT=unit,
                EPSILON_STRIDE=int(epsilon.dim() > 0),
                ROWS=rows_each,
                BLOCK=columns,
                **launch.threads(threads),
            )
