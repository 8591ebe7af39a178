"""Which examples form which batch: an endless stream of epochs, cut into LPA batches and repeated micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch


class Stream:
    """The examples 0 .. size-1 in endless epochs, each shuffled anew from the seed. Position p is always the same.

    Raises:
        ValueError: size is 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("the data set is empty; give at least one row")
        self.size, self.seed = size, seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        # one generator an epoch, so that any position is reached at once
        mixed = (self.seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def take(self, start: int, count: int) -> list[int]:
        """The `count` examples from position `start` on; they may cross the border between epochs."""
        return [self._order(p // self.size)[p % self.size] for p in range(start, start + count)]


class LPABatchSampler:
    """The micro-batches of one rank, in the order in which the trainer asks for them.

    LPA step n takes the next accumulation * micro_size * world examples of the stream, sorts them by length (longest
    first: least padding, and the largest micro-batch comes first) and cuts them into micro-batches, which are dealt out
    to the ranks in turn. The rank's micro-batches are then given `repeats` times: once for each model update.
    So neither the number of ranks nor the micro-batch size changes which examples an LPA step sees.

    Args:
        lengths: of every example, in tokens.
        micro_size: examples a micro-batch.
        accumulation: micro-batches of one rank a model update.
        repeats: model updates an LPA step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        micro_size: int,
        accumulation: int,
        repeats: int,
        lpa_steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths = lengths
        self.stream = Stream(len(lengths), seed)
        self.micro_size, self.accumulation, self.repeats, self.lpa_steps = micro_size, accumulation, repeats, lpa_steps
        self.rank, self.world = rank, world

    @property
    def batch_size(self) -> int:
        """Examples an LPA step takes, over all ranks."""
        return self.micro_size * self.accumulation * self.world

    def micro_batches(self, lpa_step: int) -> list[list[int]]:
        """This rank's micro-batches of one LPA step (from 0)."""
        batch = self.stream.take(lpa_step * self.batch_size, self.batch_size)
        batch.sort(key=lambda index: -self.lengths[index])
        micro = [batch[i : i + self.micro_size] for i in range(0, self.batch_size, self.micro_size)]
        return micro[self.rank :: self.world]

    def __len__(self) -> int:
        return self.lpa_steps * self.repeats * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for lpa_step in range(self.lpa_steps):
            micro = self.micro_batches(lpa_step)
            for _ in range(self.repeats):
                yield from micro
