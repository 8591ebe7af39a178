"""A micro-batch and what is kept for it over an LPA step; parts of it, where the device has too little memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from lpa_kernels.attack import AttackResult, PairBatch

from .losses import BenignBatch
from .ranks import from_all

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class MicroBatch:
    """One micro-batch, or a part of one, and what is kept for it over the updates of an LPA step.

    Attributes:
        first: the place of its first pair in the global batch; seeds follow from it.
        counts: completion tokens (rejected, chosen, benign), and `size` pairs, of the whole micro-batch.
        attacked: whether its attack and the base model's answers are there.
        attack: its own. base: the base model's benign logits [N, V]. reference: its log-probability gaps [B] of the
            pairs.
    """

    pairs: PairBatch
    benign: BenignBatch | None
    first: int
    counts: tuple[int, int, int]
    size: int
    attacked: bool = False
    attack: AttackResult | None = None
    base: Tensor | None = None
    reference: Tensor | None = None

    @classmethod
    def of(cls, pairs: PairBatch, benign: BenignBatch | None, first: int) -> MicroBatch:
        """A whole one, not yet attacked."""
        return cls(pairs, benign, first, (*pairs.counts, 0 if benign is None else benign.count), len(pairs))

    @property
    def share(self) -> float:
        """Of the whole micro-batch."""
        return len(self.pairs) / self.size

    def split(self, limit: int) -> list[MicroBatch]:
        """Itself, or parts of at most `limit` pairs with the same attack. Reads the device where there is one.

        A part of a whole micro-batch adds its share to the same sums: its means divide by the whole's tokens.
        """
        if len(self.pairs) <= limit:
            return [self]
        if self.attack is not None and self.attack.layout is not None:
            self.attack.layout.masks.clear()
        starts = range(0, len(self.pairs), limit)
        return [self._part(start, min(start + limit, len(self.pairs))) for start in starts]

    def _part(self, start: int, stop: int) -> MicroBatch:
        part = replace(self, pairs=self.pairs.part(start, stop), first=self.first + start)
        if self.benign is not None:
            # the benign rows of a micro-batch are as many as its pairs
            part.benign = self.benign.take(range(start, stop))
            if self.base is not None:
                before = self.benign.take(range(start)).count if start else 0
                part.base = self.base[before : before + part.benign.count]
        if self.attack is not None:
            part.attack = self.attack.part(start, stop, part.pairs)
        if self.reference is not None:
            part.reference = self.reference[start:stop]
        return part

    def to_host(self) -> None:
        """Keep the perturbations and base logits in the host's memory; they are moved where they are used."""
        if self.attack is not None:
            self.attack.to("cpu")
        self.base = None if self.base is None else self.base.cpu()


class MemoryLimit:
    """How many pairs run at once, on every rank. It is halved when memory runs out, for the rest of the run.

    Args:
        size: to begin with, the micro-batch's.
        why_not: why a run's micro-batches cannot be split; "" where they can.
        awaited: whether the other ranks wait for this one's weights in every pass (FSDP2). They then cannot learn that
            a pass has failed here.
    """

    def __init__(self, accelerator: Any, size: int, why_not: str = "", awaited: bool = False) -> None:
        self.accelerator, self.size, self.why_not, self.awaited = accelerator, size, why_not, awaited
        if awaited:
            self.why_not = "it cannot halve them while other ranks wait for its weights (FSDP2)"

    def attempt(
        self, doing: str, work: Callable[[Sequence[MicroBatch]], T], micro: Sequence[Sequence[MicroBatch]]
    ) -> list[T] | None:
        """The results of `work` for each micro-batch's parts, or None where memory ran out on some rank.

        After None, the limit is half of the size that was too much. Ranks meet only at the end, so that none waits for
        a rank that has failed.

        Args:
            doing: in words, for messages.

        Raises:
            torch.OutOfMemoryError: a single pair is too much, or the run's micro-batches cannot be split.
            RankError: another rank has failed.
        """
        found, too_many, failed = [], 0, None
        try:
            for parts in micro:
                found.append(work(parts))
        except Exception as error:
            try:
                too_many = self._too_many(error, parts, doing)
            except Exception as other:
                if self.awaited and not isinstance(other, FloatingPointError):  # that comes after an attack's last pass
                    raise
                failed = other
        short = [int(size) for size in from_all(self.accelerator, too_many, failed) if size]
        if not short:
            return found
        self.size = (min(short) + 1) // 2
        logger.warning("going on with %d pairs at a time, of the same batch", self.size)
        return None

    def _too_many(self, error: Exception, parts: Sequence[MicroBatch], doing: str) -> int:
        """The number of pairs that memory could not hold. An error about anything else is raised again."""
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise error
        largest = max(len(part.pairs) for part in parts)
        said = str(error).splitlines()[0] if str(error) else "out of memory"
        where = f" on rank {self.accelerator.process_index}" if self.awaited else ""
        if largest == 1:
            tokens = max(part.pairs.rejected_ids.shape[1] for part in parts)
            raise torch.OutOfMemoryError(
                f"out of memory in the {doing}{where} with a single pair of up to {tokens} tokens; use "
                "gradient_checkpointing=True, load_in_4bit=True, fewer lora_targets, shorter rows or a larger device "
                f"(lpa plan tells what a run needs) ({said})"
            ) from error
        if self.why_not:
            raise torch.OutOfMemoryError(
                f"out of memory in the {doing}{where}, with {largest} pairs at once, and {self.why_not}; halve "
                "per_device_train_batch_size and double gradient_accumulation_steps, which keeps the batches as they "
                f"are, those of a resumed run too ({said})"
            ) from error
        logger.warning("out of memory in the %s with %d pairs at once (%s)", doing, largest, said)
        return largest
