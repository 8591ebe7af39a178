"""What the base model says of benign rows, kept from one LPA step to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..data import BenignCollator
from .losses import BenignBatch

MAX_BYTES = 512 * 2**20


class BaseLogits:
    """The base model's logits of benign answers. The base model stays as it is in a run, and the rows come back.

    The first rows of the data set are kept, as many as fit. The others are asked for anew, those of a batch together. A
    row that is kept has a pass of its own: its logits are then bitwise the same in every batch and in a resumed run.

    Args:
        base: gives the base model, ready for a pass.
        at: as in `BenignBatch.logits`.
        answers: answer tokens of each row of the data set; empty where nothing is to be kept.
        token_bytes: of the logits of one token.
    """

    def __init__(
        self,
        base: Callable[[], AbstractContextManager[Any]],
        at: bool,
        answers: Sequence[int] = (),
        token_bytes: int = 0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.base, self.at = base, at
        self.fit = sum(end * token_bytes <= max_bytes for end in accumulate(answers))  # rows 0 .. fit - 1
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def for_run(cls, trainer: Any) -> BaseLogits:
        """For one run of an `LPATrainer`.

        Nothing is kept of rows by a user's own collator, which may give other tokens each time; on a GPU, whose passes
        cost no more than a copy of their logits; under FSDP2, where the ranks' passes must stay as many; and for the
        public KL, which divides by its own value, at first rounding alone.
        """
        args, benign = trainer.args, trainer.benign
        ours = benign is not None and type(trainer.benign_collator) is BenignCollator
        keep = ours and args.kl == "standard" and args.device.type == "cpu" and not trainer.is_fsdp_enabled
        answers = [len(row) for row in benign["response_tokens"]] if keep else []
        weight = trainer.model.get_input_embeddings().weight
        return cls(trainer.base_model, args.kl == "public", answers, weight.shape[0] * weight.element_size())

    @torch.no_grad()
    def of(self, batch: BenignBatch) -> Tensor:
        """[N, V], what `batch.logits` of the base model gives."""
        together = [place for place, row in enumerate(batch.rows) if row >= self.fit]
        alone = {row: place for place, row in enumerate(batch.rows) if row < self.fit and row not in self._kept}
        found: dict[int, Tensor] = {}
        if alone or together:
            with self.base() as model:
                for row, place in alone.items():
                    self._kept[row] = batch.take([place]).logits(model, at=self.at)
                if together:
                    some = batch.take(together)
                    logits = some.logits(model, at=self.at)
                    if len(together) == len(batch.rows):
                        return logits
                    sizes = some.mask[:, 1:].sum(1).tolist()
                    found = dict(zip(together, logits.split(sizes), strict=True))
        return torch.cat([found[p] if p in found else self._kept[row] for p, row in enumerate(batch.rows)])
