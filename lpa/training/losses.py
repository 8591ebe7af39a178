"""What the defence minimises: the pair's losses under attack, and cross entropy and divergence on benign text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_kernels.attack import (
    AttackResult,
    LatentPGD,
    Objective,
    PairBatch,
    kl_rows,
    layout_logits,
    two_pass_rows,
    unshared,
)
from lpa_kernels.ops import token_loss


@dataclass(frozen=True)
class BenignBatch:
    """Prompts with their wanted answers, right padded: ids [B, L] int64, mask [B, L] bool, True at answer tokens; and
    the places of the B rows in their data set."""

    ids: Tensor
    mask: Tensor
    rows: Sequence[int] = ()

    @classmethod
    def from_dict(cls, batch: Mapping[str, Any], rows: Sequence[int] = ()) -> BenignBatch:
        """From `BenignCollator`'s keys, benign_ids and benign_mask."""
        return cls(batch["benign_ids"], batch["benign_mask"].bool(), rows)

    @property
    def count(self) -> int:
        """How many answer tokens are predicted."""
        return int(self.mask[:, 1:].sum())

    def take(self, places: Sequence[int]) -> BenignBatch:
        """Some of the B rows, without the columns that follow the last answer token of them all."""
        ids, mask = self.ids[list(places)], self.mask[list(places)]
        columns = mask.any(0).nonzero()
        width = int(columns[-1]) + 1 if len(columns) else 1
        return BenignBatch(ids[:, :width], mask[:, :width], [self.rows[place] for place in places] if self.rows else ())

    @property
    def labels(self) -> Tensor:
        """[N] int64, the answer tokens."""
        return self.ids[:, 1:][self.mask[:, 1:]]

    def logits(self, model: Any, *, at: bool = False) -> Tensor:
        """[N, V], from one plain pass of which only these rows reach the head: those that predict the answer tokens, or
        with `at` those at them, as the public code's KL reads them."""
        mask = F.pad(self.mask, (1, 0)) if at else self.mask
        ids = F.pad(self.ids, (0, 1)) if at else self.ids
        nothing = torch.zeros_like(mask)
        layout = unshared(PairBatch(ids, nothing, ids, mask, nothing))
        return layout_logits(model, layout)


@torch.no_grad()
def reference_gap(pgd: LatentPGD, base: Any, batch: PairBatch, objective: Objective) -> Tensor:
    """[B] log-probability of chosen less that of rejected in the base model, without a perturbation.

    Args:
        base: the trained model with its adapters off, or another.
    """
    rows = pgd.rows(batch) if base is pgd.model else two_pass_rows(base, batch)
    losses, _ = token_loss(rows.logits, rows.labels, torch.zeros_like(rows.rejected), backend=pgd.settings.backend)
    return objective.pair_gap(losses, ~rows.rejected, rows.example, rows.size)


def pair_terms(
    pgd: LatentPGD,
    batch: PairBatch,
    attack: AttackResult | None,
    objective: Objective,
    counts: tuple[float, float],
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mirrored objective under an attack: toward chosen, away from rejected.

    Args:
        counts: tokens that the means divide by, (rejected, chosen) as everywhere in the attack.
        reference: [B], of `reference_gap`, for a preference loss.

    Returns:
        the weighted sum, with gradients for the weights, and each term, detached.
    """
    rows = pgd.rows(batch, attack)
    favoured = ~rows.rejected
    losses, _ = token_loss(
        rows.logits, rows.labels, objective.scored_away(favoured), objective.threshold, backend=pgd.settings.backend
    )
    return objective.combine(losses, favoured, rows.example, rows.size, (counts[1], counts[0]), reference)


def benign_terms(
    model: Any, batch: BenignBatch, coefs: Mapping[str, float], count: float, kl: str, base: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy ("sft") and divergence from the base model ("kl") on benign answers, as weighted in coefs.

    The standard divergence is KL(base || model), a mean over answer tokens. The public one reads the rows at the answer
    tokens instead of those before them, is KL(model || base) averaged over the vocabulary too, and is divided by its
    own value, so that its gradient has no size of its own; logged is the undivided one.

    Args:
        count: answer tokens that the means divide by.
        base: logits [N, V] of the base model (`batch.logits`, the public form's `at` the tokens), needed for "kl".
    """
    total = torch.zeros((), device=batch.ids.device)
    terms: dict[str, Tensor] = {}
    public = "kl" in coefs and kl == "public"
    logits = batch.logits(model, at=public and "sft" not in coefs)
    if "sft" in coefs:
        terms["sft"] = F.cross_entropy(logits.float(), batch.labels, reduction="sum") / count
        total = total + coefs["sft"] * terms["sft"]
    if "kl" in coefs:
        assert base is not None
        rows = batch.logits(model, at=True) if public and "sft" in coefs else logits
        log_base = base.float().log_softmax(-1)
        if public:
            log_new = rows.float().log_softmax(-1)
            terms["kl"] = (log_new.exp() * (log_new - log_base)).mean()
            total = total + coefs["kl"] * terms["kl"] / (terms["kl"].detach() + 1e-8)
        else:
            terms["kl"] = kl_rows(log_base, rows).sum() / count
            total = total + coefs["kl"] * terms["kl"]
    return total, {name: term.detach() for name, term in terms.items()}
