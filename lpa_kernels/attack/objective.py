"""What is minimised, as a function of the losses of completion tokens: toward/away, DPO, IPO, KL, an L2 penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import THRESHOLD

TERMS = ("toward", "away", "dpo", "ipo", "kl")


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, to be minimised over the perturbation (or, mirrored, over the weights).

    Attributes:
        coefs: term -> weight, used as given. "toward": mean cross entropy over the favoured completion's tokens.
            "away": mean of -log(1 - p) over the other's, 0 where log p < threshold (still counted). "dpo" and "ipo"
            (one of them, alone): preference losses of the pair (arXiv 2305.18290 eq. 7; 2310.12036 eq. 17, log
            probabilities averaged over tokens) against the model without adapters and perturbation. "kl": mean over
            all completion tokens of KL(unperturbed || perturbed); a negative weight drives the two apart.
        l2_penalty: weight of the sum over sites of norm2(delta) / sqrt(B * La * H), attacked positions or not.
        beta, label_smoothing, reference_free: of "dpo" and "ipo".

    Raises:
        ValueError: an unknown term, no term, terms that exclude each other, or a number out of its range.

    >>> Objective({"toward": 1.0, "kl": 0.1}).terms
    ['toward', 'kl']
    """

    coefs: Mapping[str, float] = field(default_factory=lambda: {"toward": 0.5, "away": 0.5})
    threshold: float = THRESHOLD
    l2_penalty: float = 0.0
    beta: float = 0.3
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.coefs) - set(TERMS))
        if unknown:
            raise ValueError(f"coefs has unknown terms {unknown}; the terms are {', '.join(TERMS)}")
        if not self.terms:
            raise ValueError(f"coefs={dict(self.coefs)} weighs nothing; give at least one term a weight other than 0")
        if self.preference and len(set(self.terms) - {"kl"}) > 1:
            raise ValueError(f"coefs={dict(self.coefs)} mixes {self.preference!r} with other losses of the same pair")
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"beta={self.beta} must be positive and label_smoothing={self.label_smoothing} in [0, 0.5)"
            )
        if self.l2_penalty < 0:
            raise ValueError(f"l2_penalty={self.l2_penalty} must not be negative")

    @property
    def terms(self) -> list[str]:
        """The terms with a weight other than 0."""
        return [name for name in TERMS if self.coefs.get(name, 0) != 0]

    @property
    def preference(self) -> str | None:
        """ "dpo" or "ipo" where the objective is one."""
        return next((name for name in ("dpo", "ipo") if name in self.terms), None)

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the model without adapters are needed."""
        return self.preference is not None and not self.reference_free

    def needs(self, favoured: bool) -> bool:
        """Whether the favoured (True) or the other completion takes part at all."""
        return bool(self.preference or "kl" in self.terms or ("toward" if favoured else "away") in self.terms)

    def scored_away(self, favoured: Tensor) -> Tensor:
        """[N] bool: the rows whose loss is the "away" one. A preference loss wants -log p of every row."""
        return torch.zeros_like(favoured) if self.preference else ~favoured

    def combine(
        self,
        losses: Tensor,
        favoured: Tensor,
        example: Tensor,
        size: int,
        counts: tuple[float, float] | Tensor,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted objective of token losses [N] (without "kl" and the penalty), and its terms by name.

        Args:
            favoured: [N] bool, True for the tokens of the completion to go toward.
            example: [N] int64, which of the `size` pairs a row belongs to.
            counts: tokens that the means of (toward, away) divide by.
            reference: [size] difference of the pair's log-probabilities in the reference model.
        """
        terms = self.terms_of(losses, favoured, example, size, counts, reference)
        total = losses.new_zeros(())
        for name, term in terms.items():
            total = total + self.coefs[name] * term
        return total, {name: term.detach() for name, term in terms.items()}

    def terms_of(
        self,
        losses: Tensor,
        favoured: Tensor,
        example: Tensor,
        size: int,
        counts: tuple[float, float] | Tensor,
        reference: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms of `combine` by name, to be differentiated."""
        terms: dict[str, Tensor] = {}
        for name, rows, count in (("toward", favoured, counts[0]), ("away", ~favoured, counts[1])):
            if name in self.terms:
                terms[name] = torch.where(rows, losses, 0).sum() / count
        if self.preference is not None:
            name = self.preference
            gap = self.pair_gap(losses, favoured, example, size)
            gap = gap if reference is None else gap - reference
            if name == "ipo":
                each = (gap - 1 / (2 * self.beta)) ** 2
            else:
                smooth = self.label_smoothing
                each = -F.logsigmoid(self.beta * gap) * (1 - smooth) - F.logsigmoid(-self.beta * gap) * smooth
            terms[name] = each.mean()
        return terms

    def pair_gap(self, losses: Tensor, favoured: Tensor, example: Tensor, size: int) -> Tensor:
        """[size] log-probability of the favoured completion minus the other's; per token for "ipo"."""
        sign = torch.where(favoured, -losses, losses)
        if self.preference == "ipo":
            halves = example * 2 + favoured
            tokens = losses.new_zeros(2 * size).index_add_(0, halves, torch.ones_like(losses))
            sign = sign / tokens[halves]
        return losses.new_zeros(size).index_add_(0, example, sign)

    def penalty(self, deltas: list[Tensor], positions: Tensor) -> Tensor:
        """Sum over sites of norm2(delta) / sqrt(positions * H), without its weight; its gradient at 0 is 0."""
        norms = [torch.linalg.vector_norm(d.float()).to(positions.device) / d.shape[-1] ** 0.5 for d in deltas]
        return torch.stack(norms).sum() / positions.sqrt()


def loss_scale(dtype: torch.dtype, *weights: Tensor) -> Tensor | None:
    """For float16 [] float32, the power of two that brings the largest of `weights` into (1/2, 1]; None otherwise.

    Losses are means over many tokens: unscaled, gradients of single logits lie below 6e-8, the least float16.
    """
    if dtype != torch.float16:
        return None
    nothing = torch.zeros(1, device=weights[0].device)
    largest = torch.cat([nothing, *(w.detach().float().abs() for w in weights)]).amax()
    return torch.exp2(-largest.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil())


def kl_rows(base_log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(base || model) of each row, [N] float32, from base log-probabilities [N, V] and the model's logits [N, V]."""
    log_probs = logits.float().log_softmax(-1)
    return (base_log_probs.exp() * (base_log_probs - log_probs)).sum(-1)
