"""The stream of examples: nothing lost, nothing frozen, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpa.training.sampler import LPABatchSampler, Stream


@given(size=st.integers(1, 30), start=st.integers(0, 100), count=st.integers(1, 80), seed=st.integers(0, 9))
def test_any_part_of_the_stream_is_the_same_part(size: int, start: int, count: int, seed: int) -> None:
    stream = Stream(size, seed)
    assert stream.take(start, count) == Stream(size, seed).take(0, start + count)[start:]


@given(size=st.integers(1, 30), epochs=st.integers(1, 4))
def test_an_epoch_holds_every_example_once(size: int, epochs: int) -> None:
    taken = Stream(size, 3).take(0, size * epochs)
    assert Counter(taken) == dict.fromkeys(range(size), epochs)


def test_epochs_are_shuffled_anew() -> None:
    taken = Stream(20, 0).take(0, 60)
    assert len({tuple(taken[i : i + 20]) for i in (0, 20, 40)}) == 3
    assert taken != Stream(20, 1).take(0, 60)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_batches(world: int) -> None:
    lengths = [i % 7 for i in range(11)]
    batches = []
    for rank in range(world):
        sampler = LPABatchSampler(lengths, micro_size=2, accumulation=8 // world, repeats=3, lpa_steps=5, seed=1,
                                  rank=rank, world=world)  # fmt: skip
        given = list(sampler)
        assert len(given) == len(sampler) == 5 * 3 * 8 // world
        step = 8 // world
        for n in range(5):
            passes = [given[(3 * n + k) * step : (3 * n + k + 1) * step] for k in range(3)]
            assert passes[0] == passes[1] == passes[2]
            batches.append((n, passes[0]))
    for n in range(5):
        seen = Counter(i for number, micro in batches if number == n for each in micro for i in each)
        assert seen == Counter(Stream(11, 1).take(16 * n, 16))


def test_micro_batches_are_sorted_by_length() -> None:
    lengths = list(range(16))
    sampler = LPABatchSampler(lengths, micro_size=4, accumulation=4, repeats=1, lpa_steps=1, seed=0)
    assert [i for micro in sampler for i in micro] == sorted(lengths, reverse=True)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        Stream(0, 0)
