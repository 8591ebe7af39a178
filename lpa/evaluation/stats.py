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
    return max(0.0, middle - half), min(1.0, middle + half)


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


def mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    """The groups' means, averaged: balanced accuracy, when the groups are classes and the values hits."""
    return mean([mean(group) for group in groups])


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
