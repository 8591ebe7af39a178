"""One LPA step on one rank: its micro-batches, the attack on each, and the losses of the updates under them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lpa_kernels.attack import PairBatch

from ..config import BENIGN_TERMS
from ..evaluation.measure import attack_of
from .losses import BenignBatch, benign_terms, pair_terms
from .microbatch import MicroBatch
from .record import StepRecord


class LPAStep:
    """What is kept from the arrival of a global batch to the last update on it.

    Args:
        trainer: the `LPATrainer` that takes the step.
        pairs: this rank's micro-batches, on the host.
        benign: the benign rows of each micro-batch, None where no term needs them.
        limit: how many pairs run at once.

    Attributes:
        micro: the micro-batches, each as a list of its parts (one part where memory is enough).
        record: the numbers to log.

    Raises:
        ValueError: the batch has no token of a completion that the objective scores, or none that is attacked.
    """

    def __init__(
        self, trainer: Any, pairs: Sequence[PairBatch], benign: Sequence[BenignBatch | None], limit: int
    ) -> None:
        self.trainer, self.args, self.number = trainer, trainer.args, trainer.lpa_step
        args, device = self.args, self.args.device
        own = [(*p.counts, 0 if b is None else b.count, int(p.attack_mask.sum()))
               for p, b in zip(pairs, benign, strict=True)]  # fmt: skip
        *counts, attacked = trainer.accelerator.reduce(torch.tensor(own, device=device).sum(0)).tolist()
        self.counts = (counts[0], counts[1], counts[2])
        if trainer.objective is not None and args.attack_steps:
            trainer.pgd.check_counts(counts[0], counts[1], attacked)
        self.record = StepRecord(args, pairs, benign, device, self.number)
        whole = [
            MicroBatch.of(
                p.to(device), None if b is None else replace(b, ids=b.ids.to(device), mask=b.mask.to(device)),
                (index * args.world_size + args.process_index) * args.per_device_train_batch_size,
            )
            for index, (p, b) in enumerate(zip(pairs, benign, strict=True))
        ]  # fmt: skip
        self.micro = [micro.split(limit) for micro in whole]

    def split(self, limit: int) -> None:
        """Run `limit` pairs at once from now on. The losses of the present update are forgotten."""
        self.record.forget_defence(self.trainer.next_update)
        self.micro = [[part for micro in parts for part in micro.split(limit)] for parts in self.micro]

    def ask(self, parts: Sequence[MicroBatch]) -> None:
        """Run the base model on the parts of a micro-batch that have no attack yet.

        For all micro-batches before the first attack: where one fails, no other rank waits for its passes.
        """
        for part in parts:
            if not part.attacked:
                with self.record.timed("attack"):
                    self._ask_base_model(part)

    def held(self) -> AbstractContextManager[None]:
        """Within it the model is as attacks run it, which it becomes once for all micro-batches."""
        waiting = any(not part.attacked for parts in self.micro for part in parts)
        attacks = self.trainer.objective is not None and self.args.attack_radius(self.number)
        return self.trainer.pgd.held() if waiting and attacks else nullcontext()

    def attack(self, parts: Sequence[MicroBatch]) -> None:
        """Attack the parts of a micro-batch that have no attack yet."""
        for part in parts:
            if not part.attacked:
                with self.record.timed("attack"):
                    self._attack(part)

    def update(self, parts: Sequence[MicroBatch]) -> Tensor:
        """Add the gradients of a micro-batch. Returns its loss."""
        trainer, update = self.trainer, self.trainer.next_update
        trainer.model.train()
        losses = []
        for part in parts:
            with self.record.timed("defence"):
                torch.manual_seed(self._seed(part, update + 1))
                total, terms = self.losses(part)
                # DDP averages the ranks' gradients, and the loss is a sum over all of them
                total = total * self.args.world_size
                trainer.accelerator.backward(total)
            self.record.add_defence(update, terms)
            losses.append(total.detach())
        return torch.stack(losses).sum()

    def losses(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch, and its terms by name."""
        trainer, every = self.trainer, self.args.benign_every
        rejected, chosen, answers = self._normalisers(micro)
        total: Any = 0.0
        terms: dict[str, Tensor] = {}
        if trainer.objective is not None:
            counts = (rejected, chosen)
            total, terms = pair_terms(
                trainer.pgd, micro.pairs, micro.attack, trainer.objective, counts, micro.reference
            )
            if trainer.objective.preference:  # it is a mean over these pairs
                whole = trainer.batch_size if self.args.normaliser == "global" else micro.size
                total = total * (len(micro.pairs) / whole)
                terms = {name: value * micro.share for name, value in terms.items()}
        if micro.benign is not None and trainer.state.global_step % every == 0:
            own = {name: every * value for name, value in self.args.coefs.items() if name in BENIGN_TERMS}
            base = None if micro.base is None else micro.base.to(micro.benign.ids.device)
            part, more = benign_terms(trainer.model, micro.benign, own, answers, self.args.kl, base)
            total, terms = total + part, terms | more
        return total, terms

    def _attack(self, micro: MicroBatch) -> None:
        trainer, args, seed = self.trainer, self.args, self._seed(micro, 0)
        torch.manual_seed(seed)
        radius = args.attack_radius(self.number)
        if trainer.objective is not None and radius:
            whole = radius == args.attack_epsilon
            pgd = trainer.pgd if whole else attack_of(trainer.model, args, trainer.processing_class, epsilon=radius)
            generator = torch.Generator().manual_seed(seed) if args.attack_random_start else None
            try:
                counts = self._normalisers(micro)[:2]
                micro.attack = pgd.attack(micro.pairs, counts, part=True, generator=generator)
            except FloatingPointError as error:
                raise FloatingPointError(f"LPA step {self.number + 1}: {error}") from error
        if micro.attack is not None:
            self.record.add_attack(micro.attack, micro.share)
        if args.offload_attacks:
            micro.to_host()
        micro.attacked = True

    def _ask_base_model(self, micro: MicroBatch) -> None:
        """Run the base model once for all updates: for the kl term's logits and for a preference's reference."""
        trainer = self.trainer
        if micro.benign is not None and "kl" in self.args.coefs and self.args.benign_updates(self.number):
            micro.base = trainer.base_logits.of(micro.benign)
        if trainer.objective is not None:
            micro.reference = trainer.reference(micro.pairs, trainer.objective)

    def _normalisers(self, micro: MicroBatch) -> tuple[float, float, float]:
        """Tokens that the means over rejected, chosen and benign completions divide by."""
        return self.counts if self.args.normaliser == "global" else micro.counts

    def _seed(self, micro: MicroBatch, draw: int) -> int:
        """A seed of the LPA step's number and the pairs' place in it: resumed and split runs draw as whole ones do."""
        seed = self.args.seed * 1_000_003 + self.number
        return int((seed * 65_537 + micro.first) * 257 + draw) % 2**63
