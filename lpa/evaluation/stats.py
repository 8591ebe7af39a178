"""The statistics of the tables: intervals, paired tests, and the area under the ROC curve, in the standard library."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
RESAMPLES = 1000
_Z95 = 1.959963984540054


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def wilson(hits: float, total: int) -> tuple[float, float]:
    """95% interval of a share, hits of total (Wilson 1927). The whole of [0, 1] where there is nothing to count."""
    if total < 1:
        return 0.0, 1.0
    share, z2 = hits / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (max(0.0, middle - half) if hits > 0 else 0.0), (min(1.0, middle + half) if hits < total else 1.0)


def bootstrap(
    groups: Sequence[Sequence[T]],
    statistic: Callable[[list[list[T]]], float],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """95% percentile interval of a statistic of some groups of observations, each group resampled on its own.

    (NaN, NaN) where a group has fewer than two observations.
    """
    if any(len(group) < 2 for group in groups):
        return math.nan, math.nan
    draw = random.Random(seed)
    values = sorted(statistic([draw.choices(group, k=len(group)) for group in groups]) for _ in range(resamples))
    cut = max(1, round(0.025 * resamples))
    return values[cut - 1], values[-cut]


def balanced(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Mean of the shares of True in two classes, and its 95% interval.

    The shares' Wilson intervals are put together by squares (Newcombe 1998), so that it has a width where all outcomes
    of a class are the same, as they are for a model that says one thing to everything.

    Raises:
        ValueError: a class is empty.
    """
    if not one or not other:
        raise ValueError(f"balanced accuracy needs outcomes of both classes, got {len(one)} and {len(other)}")
    shares = [sum(flags) / len(flags) for flags in (one, other)]
    spans = [wilson(sum(flags), len(flags)) for flags in (one, other)]
    down = math.hypot(*(share - low for share, (low, _) in zip(shares, spans, strict=True)))
    up = math.hypot(*(high - share for share, (_, high) in zip(shares, spans, strict=True)))
    value = mean(shares)
    return value, value - down / 2, value + up / 2


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive's score is above a negative's, ties counting half (Mann and Whitney)."""
    if not positive or not negative:
        return math.nan
    marked = sorted([(score, True) for score in positive] + [(score, False) for score in negative])
    rank_sum, start = 0.0, 0
    while start < len(marked):
        stop = start
        while stop < len(marked) and marked[stop][0] == marked[start][0]:
            stop += 1
        rank_sum += (start + stop + 1) / 2 * sum(flag for _, flag in marked[start:stop])
        start = stop
    n = len(positive)
    return (rank_sum - n * (n + 1) / 2) / (n * len(negative))


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test that two paired series of outcomes have the same share of True.

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    gained = sum(b and not a for a, b in zip(one, other, strict=True))
    lost = sum(a and not b for a, b in zip(one, other, strict=True))
    changed = gained + lost
    if not changed:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def paired_shares(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """The share of True in the second of two paired series less that in the first, and its 95% interval (Agresti and
    Min 2005: half an outcome is added to each of the four kinds of pair).

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    gained = sum(b and not a for a, b in zip(one, other, strict=True)) + 0.5
    lost = sum(a and not b for a, b in zip(one, other, strict=True)) + 0.5
    n = len(one) + 2
    middle = (gained - lost) / n
    half = _Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return (gained - lost) / max(1, len(one)), max(-1.0, middle - half), min(1.0, middle + half)


def permutation(one: Sequence[float], other: Sequence[float], seed: int = 0, resamples: int = 5000) -> float:
    """Two-sided p that the mean paired difference is 0, by flipping the signs of the differences at random.

    The observed arrangement is counted among the drawn ones, so that p is never 0.

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    differences = [b - a for a, b in zip(one, other, strict=True)]
    observed, draw = abs(sum(differences)), random.Random(seed)
    if not differences or observed == 0:
        return 1.0
    reached = sum(
        abs(sum(d if draw.random() < 0.5 else -d for d in differences)) >= observed * (1 - 1e-12)
        for _ in range(resamples)
    )
    return (reached + 1) / (resamples + 1)


def _check_paired(one: Sequence[float], other: Sequence[float]) -> None:
    if len(one) != len(other):
        raise ValueError(f"a paired test needs series of equal length, got {len(one)} and {len(other)}")
