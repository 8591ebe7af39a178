"""token_loss_ in Triton: one sweep over a row of logits for its loss, one more to write the gradient over it.

Memory traffic an element of bf16: 2 bytes read for the loss; for the gradient 2 written, and 2 read again, from L2
wherever `parts` can arrange it. Seven instructions an element on sm_80 and sm_90, one of them an exponential.
"""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

ROW_THREADS = 1024  # one program a multiprocessor: the rows in flight stay in L2 between the two sweeps
PART_THREADS = 128
MOST_PARTS = 64
LOADS = 4  # 16-byte loads that a thread has in flight

_LOWEST = tl.constexpr(-1e38)  # finite, so that the exponential of -inf less the lowest is 0 and never NaN
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
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
def _power(largest):
    """The whole power of two in which a sum of exponentials, the largest of them exp(largest), is counted."""
    return tl.ceil(largest * _LOG2E)


@triton.jit
def _exp(z, power):
    """exp(z) in units of 2^power. The product is fused and the power whole, so that only the exponent's last bit
    is rounded; `exp(z - largest)` would cost two instructions more an element."""
    return tl.exp2(tl.fma(z, tl.full(z.shape, _LOG2E, tl.float32), tl.broadcast_to(-power, z.shape)))


@triton.jit
def _read(logits, column, bound):
    return tl.load(logits + column, mask=column < bound, other=float("-inf"))


@triton.jit
def _fold(
    logits, column, bound, label, largest, total, STEP: tl.constexpr, LABEL: tl.constexpr
):  # fmt: skip
    """Add four tiles [LANES, VECTOR] to each lane's (largest, sum); with LABEL, without the label's logit.

    The largest needs all four, which keeps four loads in flight.
    """
    a = _read(logits, column, bound).to(tl.float32)
    b = _read(logits, column + STEP, bound).to(tl.float32)
    c = _read(logits, column + 2 * STEP, bound).to(tl.float32)
    d = _read(logits, column + 3 * STEP, bound).to(tl.float32)
    if LABEL:
        a = tl.where(column == label, float("-inf"), a)
        b = tl.where(column + STEP == label, float("-inf"), b)
        c = tl.where(column + 2 * STEP == label, float("-inf"), c)
        d = tl.where(column + 3 * STEP == label, float("-inf"), d)
    new = tl.maximum(largest, tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), 1))
    power = _power(new)[:, None]
    part = tl.sum((_exp(a, power) + _exp(b, power)) + (_exp(c, power) + _exp(d, power)), 1)
    return new, total * tl.exp2(_power(largest) - _power(new)) + part


@triton.jit
def _scan(logits, start, stop, bound, label, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """(largest, sum of exponentials in units of 2^_power(largest)) over logits[start:stop] without the label's.

    `bound` is the vocabulary, or 0 for an ignored row. A lane, one thread with 16-byte loads of VECTOR neighbours,
    keeps its own pair; the threads exchange nothing before the end. The tile of the label comes first, so that no
    other has to look for it.
    """
    step: tl.constexpr = LANES * VECTOR
    span = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    count = tl.cdiv(tl.minimum(stop, bound) - start, 4 * step)
    here = (label >= start) & (label < stop)
    first = tl.where(here, (label - start) // (4 * step), 0)
    column = start + first * (4 * step) + span
    largest, total = _fold(logits, column, bound, label, largest, total, step, True)
    for i in range(1, count):
        tile = first + i
        tile = tl.where(tile < count, tile, tile - count)
        column = start + tile * (4 * step) + span
        largest, total = _fold(logits, column, bound, label, largest, total, step, False)
    peak = tl.max(largest, 0)
    return peak, tl.sum(total * tl.exp2(_power(largest) - _power(peak)), 0)


@triton.jit
def _own(logits, label, vocabulary):
    """The label's logit. For a label outside the vocabulary it is NaN, as are then the row's loss and gradient."""
    return tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan")).to(tl.float32)


@triton.jit
def _close(own, peak, total, label, away, threshold):
    """(loss, hit, d loss / d s) of a row; s is the label's logit minus the logsumexp of the others."""
    s = (own - _power(peak) * _LN2) - tl.log(total)
    toward = _softplus(-s)
    off = (label == _IGNORED) | (away & (-toward < threshold))
    loss = tl.where(off, 0.0, tl.where(away, _softplus(s), toward))
    slope = tl.where(away, 1 / (1 + tl.exp(-s)), -1 / (1 + tl.exp(s)))
    hit = (label != _IGNORED) & (own >= peak) & (total == total)
    return loss, hit, tl.where(off, 0.0, slope)


@triton.jit
def _replace(logits, z, column, vocabulary, share, power):
    g = -share * _exp(z.to(tl.float32), power)
    tl.store(logits + column, g.to(z.dtype), mask=column < vocabulary)


@triton.jit
def _write(
    logits, start, stop, vocabulary, label, peak, total, slope, VECTOR: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The gradient over logits[start:stop]: slope at the label, -slope * exp(z - logsumexp) elsewhere.

    Backwards, since what the first sweep read last is the likeliest to be in the caches still.
    """
    step: tl.constexpr = LANES * VECTOR
    span = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    power = _power(peak)
    share = slope / tl.where(total == 0, 1.0, total)
    # A row that is off is not read: every load gives -inf, whose exponential is the zero to write.
    bound = tl.where(slope != 0, vocabulary, 0)
    count = tl.cdiv(stop - start, 4 * step)
    for i in range(count):
        column = start + (count - 1 - i) * (4 * step) + span
        a = _read(logits, column, bound)
        b = _read(logits, column + step, bound)
        c = _read(logits, column + 2 * step, bound)
        d = _read(logits, column + 3 * step, bound)
        _replace(logits, a, column, vocabulary, share, power)
        _replace(logits, b, column + step, vocabulary, share, power)
        _replace(logits, c, column + 2 * step, vocabulary, share, power)
        _replace(logits, d, column + 3 * step, vocabulary, share, power)
    tl.debug_barrier()  # another thread has just written the label's place
    tl.store(logits + label, slope.to(logits.dtype.element_ty), mask=(label >= start) & (label < stop))


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
    bound = tl.where(label == _IGNORED, 0, vocabulary)
    column = label.to(tl.int32)
    peak, total = _scan(logits, 0, vocabulary, bound, column, VECTOR, LANES)
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
    bound = tl.where(label == _IGNORED, 0, vocabulary)
    peak, total = _scan(logits, start, start + span, bound, label.to(tl.int32), VECTOR, LANES)
    size = tl.num_programs(0) * tl.num_programs(1)
    place = parts + row * tl.num_programs(1) + part
    tl.store(place, peak)
    tl.store(place + size, total)
    # The label's logit too: in the second sweep another program may write its gradient first.
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
    total = tl.sum(total * tl.exp2(_power(largest) - _power(peak)), 0)
    loss, hit, slope = _close(own, peak, total, label, tl.load(away + row) != 0, threshold)
    tl.store(losses + row, loss, mask=part == 0)
    tl.store(hits + row, hit, mask=part == 0)
    if GRADIENT:
        slope *= tl.load(weight + row)
        start = part * span
        stop = tl.minimum(start + span, vocabulary)
        _write(logits, start, stop, vocabulary, label.to(tl.int32), peak, total, slope, VECTOR, LANES)


def parts(rows: int, vocabulary: int, vector: int, multiprocessors: int) -> int:
    """How many programs share a row.

    One, where the rows suffice for all multiprocessors. Then one row a multiprocessor is in flight between its two
    sweeps: 132 * 256 KB = 34 MB on an H200 at a vocabulary of 128k in bf16. Its L2 of 60 MB holds them, so that the
    second sweep reads nothing from memory. With fewer rows L2 holds all of them, and several programs a row, in two
    launches, keep the whole GPU busy: four a multiprocessor.
    """
    if rows >= multiprocessors:
        return 1
    return min(triton.cdiv(vocabulary, PART_THREADS * LOADS * vector), 4 * multiprocessors // rows, MOST_PARTS)


def token_loss_(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row of logits [N, V]; with `weight`, the gradient over the logits in place."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if not rows:
        return losses, hits
    stride, gradient, vector = logits.stride(0), weight is not None, 16 // logits.element_size()
    count = parts(rows, vocabulary, vector, launch.multiprocessors(logits.device))
    with launch.on(logits):
        if count == 1:
            lanes = min(max(64, launch.power_of_two(vocabulary) // (LOADS * vector)), ROW_THREADS)
            _row[(rows,)](
                logits, labels, away, weight, losses, hits, stride, vocabulary, threshold,
                GRADIENT=gradient, VECTOR=vector, LANES=lanes, **launch.threads(lanes),
            )  # fmt: skip
        else:
            tile = PART_THREADS * LOADS * vector
            span = triton.cdiv(vocabulary, count * tile) * tile
            count = triton.cdiv(vocabulary, span)
            scratch = torch.empty((3, rows, count), dtype=torch.float32, device=logits.device)
            shape = {"VECTOR": vector, "LANES": PART_THREADS} | launch.threads(PART_THREADS)
            _scan_part[(rows, count)](logits, labels, scratch, stride, vocabulary, span, **shape)
            _finish_part[(rows, count if gradient else 1)](
                logits, labels, away, weight, losses, hits, scratch, rows, count, stride, vocabulary, span, threshold,
                GRADIENT=gradient, PARTS=launch.power_of_two(count), **shape,
            )  # fmt: skip
    return losses, hits
