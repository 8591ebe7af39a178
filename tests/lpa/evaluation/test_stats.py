"""The statistics against hand-worked cases."""

from __future__ import annotations

import math

import pytest

from lpa.evaluation.stats import (
    auroc,
    auroc_interval,
    balanced,
    bootstrap,
    holm,
    mcnemar,
    mean,
    noninferiority,
    paired_difference,
    paired_shares,
    pairs_needed,
    permutation,
    rogan_gladen,
    wilson,
)


def test_wilson_intervals_are_the_textbook_ones() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


def test_mcnemar_is_the_exact_binomial_one() -> None:
    one = [True] * 7 + [False] + [True] * 5
    other = [False] * 7 + [True] + [True] * 5
    assert mcnemar(one, other) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(one, one) == 1
    with pytest.raises(ValueError, match="13 and 1"):
        mcnemar(one, [True])


def test_permutation_finds_a_shift_and_no_shift() -> None:
    one = [0.1 * i for i in range(12)]
    assert permutation(one, [value + 1 for value in one]) < 0.01
    assert permutation(one, one) == 1
    assert permutation([0, 0, 0, 0], [1, -1, 1, -1]) == 1


def test_auroc_counts_pairs_and_halves_ties() -> None:
    positive, negative = [3.0, 2.0, 1.0], [2.0, 0.0]
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / 6)
    assert auroc([1, 1], [1, 1]) == 0.5
    assert math.isnan(auroc([], [1]))


def test_the_bootstrap_covers_the_mean_and_repeats_itself() -> None:
    values = [float(i % 4 == 0) for i in range(200)]
    low, high = bootstrap([values], lambda groups: mean(groups[0]))
    assert low < 0.25 < high
    assert high - low == pytest.approx(0.12, abs=0.03)
    assert (low, high) == bootstrap([values], lambda groups: mean(groups[0]))


def test_balanced_accuracy_has_an_interval_where_every_outcome_is_the_same() -> None:
    value, low, high = balanced([True] * 100, [False] * 100)  # a model that says no to everything
    assert value == 0.5
    (_, l2), (l1, _) = wilson(0, 100), wilson(100, 100)
    assert high == pytest.approx(0.5 + l2 / 2)
    assert low == pytest.approx(0.5 - (1 - l1) / 2)
    value, low, high = balanced([True] * 30 + [False] * 10, [True] * 5 + [False] * 15)
    assert value == pytest.approx((0.75 + 0.25) / 2)
    (l1, u1), (l2, u2) = wilson(30, 40), wilson(5, 20)
    assert low == pytest.approx(value - math.hypot(0.75 - l1, 0.25 - l2) / 2)
    assert high == pytest.approx(value + math.hypot(u1 - 0.75, u2 - 0.25) / 2)


def test_the_difference_of_paired_shares_by_hand() -> None:
    one, other = [True] * 9 + [False] * 11, [True] * 2 + [False] * 7 + [True] * 1 + [False] * 10
    difference, low, high = paired_shares(one, other)
    assert difference == pytest.approx((1 - 7) / 20)
    gained, lost, n = 1.5, 7.5, 22  # half an outcome more of each kind
    middle, half = (gained - lost) / n, 1.959964 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    _, low, high = paired_shares([True] * 50, [True] * 50)
    assert low < 0 < high, "no change among fifty is no proof that there never is one"


def test_the_interval_of_an_auroc_by_hand() -> None:
    # one positive and one negative: Hanley and McNeil's variance is that of one coin, so the bounds are Wilson's
    assert auroc_interval(1.0, 1, 1) == pytest.approx((wilson(1, 1)[0], 1.0), abs=1e-6)
    assert auroc_interval(0.0, 1, 1) == pytest.approx((0.0, wilson(0, 1)[1]), abs=1e-6)
    low, high = auroc_interval(0.8, 60, 40)
    for bound in (low, high):
        inner = (60 + 40) / 2 - 1
        shape = 1 + inner * (1 - bound) / (2 - bound) + inner * bound / (1 + bound)
        assert abs(0.8 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) * shape / 2400), abs=1e-6)
    assert low < 0.8 < high
    assert auroc_interval(1.0, 60, 60)[0] < 0.97, "60 right answers of each kind are no proof of perfection"
    assert auroc_interval(math.nan, 0, 60) == (0.0, 1.0)


def test_seeds_of_one_prompt_are_one_cluster() -> None:
    # three prompts, of which two seeds each found +1 and 0: differences 0.5, 0.5, 0
    difference, low, high = paired_difference([0.5, 0.5, 0.0])
    middle, half = 1 / 5, 1.959964 * math.sqrt(0.5 + 1 - 1 / 5) / 5
    assert difference == pytest.approx(1 / 3)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    flags = [True, False, True, True], [True, True, False, True]
    assert paired_shares(*flags) == paired_difference([0, 1, -1, 0])


def test_a_cost_is_acceptable_only_when_its_whole_interval_is_under_the_margin() -> None:
    same = [0.0] * 290 + [1.0] * 5 + [-1.0] * 5
    assert paired_difference(same)[2] < 0.05
    assert noninferiority(same, 0.05) < 0.05
    wide = [0.0] * 80 + [1.0] * 10 + [-1.0] * 10
    assert mean(wide) == 0
    assert paired_difference(wide)[2] > 0.05
    assert noninferiority(wide, 0.05) > 0.05
    edge = paired_difference(same)[2]
    assert noninferiority(same, edge) == pytest.approx(0.05, abs=1e-6)


def test_the_number_of_pairs_that_a_margin_needs() -> None:
    # (1.959964 + 0.841621)^2 = 7.848880
    assert pairs_needed(0.05, 0.1) == math.ceil(7.848880 * 0.1 / 0.0025) == 314
    assert pairs_needed(0.02, 0.1) == math.ceil(7.848880 * 0.1 / 0.0004)
    # Holm doubles the p of the first of two claims: (2.241403 + 0.841621)^2 = 9.505036
    assert pairs_needed(0.05, 0.1, claims=2) == math.ceil(9.505036 * 0.1 / 0.0025) == 381
    with pytest.raises(ValueError, match="margin=0 must be between 0 and 1"):
        pairs_needed(0, 0.1)


def test_holm_steps_down_over_the_claims() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(adjusted) == ["a", "b", "c"]
    assert holm({"only": 0.04}) == {"only": 0.04}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_a_share_is_corrected_for_the_judges_error() -> None:
    # of 200 true and 800 false ones a judge with sensitivity 0.9 and specificity 0.95 finds 180 + 40
    assert rogan_gladen(0.22, 0.9, 0.95) == pytest.approx(0.2)
    assert rogan_gladen(0.01, 0.9, 0.95) == 0.0
    assert rogan_gladen(0.99, 0.9, 0.95) == 1.0
    with pytest.raises(ValueError, match="no better than chance"):
        rogan_gladen(0.5, 0.5, 0.5)
