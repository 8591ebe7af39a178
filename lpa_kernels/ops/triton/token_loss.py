"""token_loss_ in Triton: one sweep over a row of logits for its loss, one more to write the gradient over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

SHARE = 32  # elements of a tile that a thread holds
ROW_THREADS = 1024  # one program a multiprocessor, so that the rows in flight stay in L2 between the two sweeps
PART_THREADS = 128
MOST_PARTS = 64

_LOWEST = tl.constexpr(-3.4028234e38)  # finite, so that exp(-inf - lowest) is 0 and never NaN
_IGNORED = tl.constexpr(-100)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] to float32's last digits, by the series of 2 atanh(x / (2 + x))."""
    y = x / (2 + x)
    q = y * y
    tail = q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return 2 * y * (1 + tail)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _scan(logits, start, stop, vocabulary, label, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """(largest, sum of exp(z - largest)) over logits[start:stop] without the label's.

    Every group of VECTOR neighbours, one 16-byte load of one thread, keeps its own pair: 1 + 1/VECTOR exponentials
    an element, and no word between threads before the end.
    """
    span = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for base in range(start, stop, LANES * VECTOR):
        column = base + span
        z = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        z = tl.where(column == label, float("-inf"), z)
        new = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        largest = new
    peak = tl.max(largest, 0)
    return peak, tl.sum(total * tl.exp(largest - peak), 0)


@triton.jit
def _own(logits, label, vocabulary):
    """The label's logit; NaN, and with it the row's loss and gradient, for a label that is no token."""
    return tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan")).to(tl.float32)


@triton.jit
def _close(own, peak, total, label, away, threshold):
    """(loss, hit, d loss / d s) of a row; s is the label's logit minus the logsumexp of the others."""
    s = (own - peak) - tl.log(total)
    toward = _softplus(-s)
    off = (label == _IGNORED) | (away & (-toward < threshold))
    loss = tl.where(off, 0.0, tl.where(away, _softplus(s), toward))
    slope = tl.where(away, 1 / (1 + tl.exp(-s)), -1 / (1 + tl.exp(s)))
    hit = (label != _IGNORED) & (own >= peak) & (total == total)
    return loss, hit, tl.where(off, 0.0, slope)


@triton.jit
def _write(
    logits, start, stop, vocabulary, label, peak, total, slope, VECTOR: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The gradient over logits[start:stop]: slope at the label, -slope * exp(z - logsumexp) elsewhere."""
    span = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    share = slope / tl.where(total == 0, 1.0, total)
    # A row that is off is not read; exp(-inf) makes the zeros that it gets.
    readable = tl.where(slope != 0, vocabulary, 0)
    for base in range(start, stop, LANES * VECTOR):
        column = base + span
        z = tl.load(logits + column, mask=column < readable, other=float("-inf")).to(tl.float32)
        g = tl.where(column == label, slope, -share * tl.exp(z - peak))
        tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < vocabulary)


@triton.jit
def _row(
    logits, labels, away, weight, losses, hits, stride, vocabulary, threshold,
    GRADIENT: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A whole row: both sweeps, the second while the row is still in L2."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    label = tl.load(labels + row)
    own = _own(logits, label, vocabulary)
    stop = tl.where(label == _IGNORED, 0, vocabulary)
    column = label.to(tl.int32)
    peak, total = _scan(logits, 0, stop, vocabulary, column, VECTOR, LANES)
    loss, hit, slope = _close(own, peak, total, label, tl.load(away + row) != 0, threshold)
    tl.store(losses + row, loss)
    tl.store(hits + row, hit)
    if GRADIENT:
        slope *= tl.load(weight + row)
        _write(logits, 0, vocabulary, vocabulary, column, peak, total, slope, VECTOR, LANES)


@triton.jit
def _scan_part(
    logits, labels, parts, stride, vocabulary, span, VECTOR: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The first sweep over `span` columns of a row; parts [3, N, P] gets (largest, sum, label's logit)."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    logits += row.to(tl.int64) * stride
    label = tl.load(labels + row)
    start = part * span
    stop = tl.where(label == _IGNORED, 0, tl.minimum(start + span, vocabulary))
    peak, total = _scan(logits, start, stop, vocabulary, label.to(tl.int32), VECTOR, LANES)
    size = tl.num_programs(0) * tl.num_programs(1)
    place = parts + row * tl.num_programs(1) + part
    tl.store(place, peak)
    tl.store(place + size, total)
    # The label's logit too: when it is needed, another program may have written the gradient over it.
    tl.store(place + 2 * size, _own(logits, label, vocabulary))


@triton.jit
def _finish_part(
    logits, labels, away, weight, losses, hits, parts, rows, count, stride, vocabulary, span, threshold,
    GRADIENT: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The loss of a row from its parts, and the second sweep over `span` of its columns."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    logits += row.to(tl.int64) * stride
    label = tl.load(labels + row)
    lane = tl.arange(0, PARTS)
    place = parts + row * count + lane
    size = rows * count
    largest = tl.load(place, mask=lane < count, other=_LOWEST)
    total = tl.load(place + size, mask=lane < count, other=0.0)
    own = tl.load(parts + 2 * size + row * count)
    peak = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - peak), 0)
    loss, hit, slope = _close(own, peak, total, label, tl.load(away + row) != 0, threshold)
    tl.store(losses + row, loss, mask=part == 0)
    tl.store(hits + row, hit, mask=part == 0)
    if GRADIENT:
        slope *= tl.load(weight + row)
        start = part * span
        stop = tl.minimum(start + span, vocabulary)
        _write(logits, start, stop, vocabulary, label.to(tl.int32), peak, total, slope, VECTOR, LANES)


def parts(rows: int, vocabulary: int, multiprocessors: int) -> int:
    """How many programs share a row.

    One, where there are rows for every multiprocessor: between a row's two sweeps only one row a multiprocessor is
    under way, 132 * 256 KB = 34 MB on an H200 at a vocabulary of 128k in bf16, which its L2 of 60 MB keeps, so that
    the second sweep reads nothing from memory (two bytes read and two written an element, where two launches over
    more logits than L2 holds read four). With fewer rows than multiprocessors all of them fit L2 anyway, and several
    programs a row, two launches, keep the whole GPU busy: four a multiprocessor.
    """
    if rows >= multiprocessors:
        return 1
    return min(triton.cdiv(vocabulary, PART_THREADS * SHARE), 4 * multiprocessors // rows, MOST_PARTS)


def token_loss_(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row of logits [N,V]; with `weight`, the gradient over the logits in place."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if not rows:
        return losses, hits
    labels, away = labels.contiguous(), away.contiguous()
    weight = weight if weight is None else weight.contiguous()
    stride, gradient, vector = logits.stride(0), weight is not None, 16 // logits.element_size()
    count = parts(rows, vocabulary, launch.multiprocessors(logits.device))
    with launch.on(logits):
        if count == 1:
            tile = min(launch.power_of_two(vocabulary), ROW_THREADS * SHARE)
            _row[(rows,)](
                logits, labels, away, weight, losses, hits, stride, vocabulary, threshold,
                GRADIENT=gradient, VECTOR=vector, LANES=max(1, tile // vector),
                num_warps=launch.warps(max(64, tile // SHARE)),
            )  # fmt: skip
        else:
            tile = PART_THREADS * SHARE
            span = triton.cdiv(vocabulary, count * tile) * tile
            count = triton.cdiv(vocabulary, span)
            scratch = torch.empty((3, rows, count), dtype=torch.float32, device=logits.device)
            shape = {"VECTOR": vector, "LANES": tile // vector, "num_warps": launch.warps(PART_THREADS)}
            _scan_part[(rows, count)](logits, labels, scratch, stride, vocabulary, span, **shape)
            _finish_part[(rows, count if gradient else 1)](
                logits, labels, away, weight, losses, hits, scratch, rows, count, stride, vocabulary, span, threshold,
                GRADIENT=gradient, PARTS=launch.power_of_two(count), **shape,
            )  # fmt: skip
    return losses, hits


def unsupported(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> str | None:
    """Why the kernels cannot take this call, or None."""
    if logits.dtype not in launch.FLOATS:
        return f"logits are {logits.dtype}; it takes float32, bf16 and fp16"
    if logits.numel() and logits.stride(1) != 1 and logits.shape[1] > 1:
        return f"logits have strides {logits.stride()}; the last one must be 1"
    return launch.refuse(logits, labels, away, weight)
