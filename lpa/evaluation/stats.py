"""The statistics of the tables: intervals, paired tests, non-inferiority, areas under ROC curves, multiple claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np

T = TypeVar("T")
RESAMPLES, _DRAWS = 1000, 5000  # of a bootstrap's groups, of a permutation test's signs
_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.975)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def wilson(hits: float, total: int) -> tuple[float, float]:
    """95% interval of a share, `hits` of `total` (Wilson 1927); (0, 1) where the total is 0."""
    if total < 1:
        return 0.0, 1.0
    share, z2 = hits / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (max(0.0, middle - half) if hits > 0 else 0.0), (min(1.0, middle + half) if hits < total else 1.0)


def bootstrap(groups: Sequence[Sequence[T]], statistic: Callable[[list[list[T]]], float]) -> tuple[float, float]:
    """95% percentile interval of a statistic of groups of observations (Efron 1979); each group is resampled alone.

    (NaN, NaN) where a group has fewer than two observations.
    """
    if any(len(group) < 2 for group in groups):
        return math.nan, math.nan
    draw = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        values.append(statistic([[group[i] for i in draw.integers(len(group), size=len(group))] for group in groups]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def balanced(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Mean of the shares of True in two classes, and its 95% interval.

    The interval combines the Wilson intervals of the two shares (Newcombe 1998). Unlike a bootstrap it has a width
    where all outcomes of a class are equal, as they are for a model that says one thing to everything.

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
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947).

    NaN where there is no positive or no negative.
    """
    if not len(positive) or not len(negative):
        return math.nan
    gaps = np.asarray(positive, dtype=float)[:, None] - np.asarray(negative, dtype=float)
    return float(np.mean((gaps > 0) + (gaps == 0) / 2))


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """95% score interval of an AUROC (Newcombe 2006, Statistics in Medicine 25:559, method 5).

    The bounds are the areas from which `area` is 1.96 standard errors away. The standard error is Hanley and
    McNeil's (1982) with (positives + negatives) / 2 - 1 in the place of both counts less 1. The interval has a width at
    0 and 1 too, where DeLong's and the bootstrap's have none.

    Returns:
        (0, 1) where a count is 0.
    """
    if not positives or not negatives or math.isnan(area):
        return 0.0, 1.0
    inner = (positives + negatives) / 2 - 1

    def away(true: float) -> float:
        shape = 1 + inner * ((1 - true) / (2 - true) + true / (1 + true))
        return abs(area - true) - _Z95 * math.sqrt(true * (1 - true) * shape / (positives * negatives))

    return _crossing(away, area, 0.0), _crossing(away, area, 1.0)


def _crossing(away: Callable[[float], float], inside: float, outside: float) -> float:
    """By bisection: where `away` turns positive between a point of the interval and the end of the scale."""
    if away(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if away(middle) > 0 else (middle, outside)
    return inside


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test (1947) that two paired series of outcomes have the same share of True.

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    gained = sum(b and not a for a, b in zip(one, other, strict=True))
    lost = sum(a and not b for a, b in zip(one, other, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def paired_difference(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences in [-1, 1], and its 95% interval; each difference is one cluster.

    Of outcomes 0 and 1 it is Agresti and Min's interval (2005), which adds half an outcome to each of the four kinds of
    pair. Means over the seeds of one prompt may be given as well: then the prompts are the clusters. (NaN, -1, 1) of
    nothing.
    """
    n, total = len(differences) + 2, sum(differences)
    middle = total / n
    half = _Z95 * math.sqrt(sum(d * d for d in differences) + 1 - total**2 / n) / n
    return mean(differences), max(-1.0, middle - half), min(1.0, middle + half)


def paired_shares(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """The share of True in the second of two paired series minus that in the first, and its 95% interval.

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    return paired_difference([float(b) - float(a) for a, b in zip(one, other, strict=True)])


def noninferiority(differences: Sequence[float], margin: float) -> float:
    """p that the mean of paired differences, a cost, is `margin` or more: doubled, from `paired_difference`'s interval.

    Below 0.05 exactly where the upper end of the 95% interval lies below the margin.
    """
    _, low, high = paired_difference(differences)
    middle, error = (low + high) / 2, (high - low) / (2 * _Z95)
    return min(1.0, 2 * (1 - _NORMAL.cdf((margin - middle) / error)))


def pairs_needed(margin: float, changing: float, claims: int = 1) -> int:
    """How many pairs a non-inferiority test of paired shares needs where the true difference is 0.

    Of power 0.8: (z_0.975 + z_0.8)^2 changing / margin^2 (Liu et al. 2002, Statistics in Medicine 21:231).

    Args:
        margin: as a share. changing: the share of pairs whose two outcomes differ.
        claims: how many have no adjusted p below 0.05 yet, the test's own among them, by which `holm` multiplies the p
            of the next one: the quantile is then that of 1 - 0.025 / claims.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    for name, value in (("margin", margin), ("changing", changing)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must be between 0 and 1")
    quantile = _NORMAL.inv_cdf(1 - 0.025 / claims)
    return math.ceil((quantile + _NORMAL.inv_cdf(0.8)) ** 2 * changing / margin**2)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for the number of claims (Holm 1979), by name, in the order given."""
    adjusted, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def rogan_gladen(share: float, sensitivity: float, specificity: float) -> float:
    """The true share behind the share that an erring judge finds (Rogan and Gladen 1978), cut to [0, 1].

    (share + specificity - 1) / (sensitivity + specificity - 1)

    Raises:
        ValueError: the judge is no better than chance.
    """
    if sensitivity + specificity <= 1:
        raise ValueError(
            f"sensitivity {sensitivity} and specificity {specificity} must add up to more than 1; "
            "the judge is no better than chance"
        )
    return min(1.0, max(0.0, (share + specificity - 1) / (sensitivity + specificity - 1)))


def permutation(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p that the mean paired difference is 0, by drawing the signs of the differences (Fisher 1935).

    The observed signs count as one of the draws, so p is never 0.

    Raises:
        ValueError: the series differ in length.
    """
    _check_paired(one, other)
    differences = np.asarray(other, dtype=float) - np.asarray(one, dtype=float)
    observed = abs(differences.sum()) if len(differences) else 0.0
    if observed == 0:
        return 1.0
    signs = np.random.default_rng(0).integers(2, size=(_DRAWS, len(differences))) * 2 - 1
    reached = int((np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    return (reached + 1) / (_DRAWS + 1)


def _check_paired(one: Sequence[float], other: Sequence[float]) -> None:
    if len(one) != len(other):
        raise ValueError(f"a paired test needs series of equal length, got {len(one)} and {len(other)}")
