"""The fast inner loop: one pass a step, the rows that matter, every site in one update, nothing read by the host."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.frozen import frozen_blocks
from ..model.hooks import fixed_rows, gradients, kept_for_recompute, perturbed
from ..model.sharding import is_sharded, tell_off
from ..ops import linear_token_loss, token_loss_
from ..ops.reference import gather_grad
from .attack import LatentAttack
from .head import output_head, plain_head, selected_logits
from .objective import PairRows, loss_scale
from .packing import PackedLayout
from .reference import adapters_off
from .state import AttackState
from .trim import scored_tokens, trimmable, trimmed

if TYPE_CHECKING:
    from .pgd import LatentPGD

CHUNK_FROM = 1 << 27  # logits (N x V) from which the head is run in chunks


def layout_rows(model: nn.Module, layout: PackedLayout, size: int, packed: bool, run_head: bool = True) -> PairRows:
    """`PairRows` of one pass over a layout; with run_head=False the head's inputs [N, H] stand for the logits."""
    values = selected_logits(model, layout, packed, run_head)
    return PairRows(values, layout.labels, layout.rejected, layout.example, size)


def attacked_rows(
    model: nn.Module, layout: PackedLayout, size: int, packed: bool, attack: LatentAttack | None
) -> PairRows:
    """`layout_rows` under an attack, with gradients for the weights: what the defence computes its losses from."""
    if attack is None:
        return layout_rows(model, layout, size, packed)
    with kept_for_recompute(model, lambda: attack.applied(fixed_rows(layout.token_rows))):
        return layout_rows(model, layout, size, packed)


def _chunked(model: nn.Module, layout: PackedLayout, pgd: LatentPGD) -> bool:
    head = output_head(model)
    size = layout.labels.shape[0] * getattr(head, "out_features", 0)
    whole = "kl" in pgd.objective.terms or pgd.autocast is not None  # the chunked head's products know no autocast
    if size < CHUNK_FROM or whole:
        return False
    if is_sharded(model):  # and it depends on this rank's batch, so that no pass may be made to find out
        tell_off(model, f"the head makes all of its {size / 1e6:.0f}M logits at once, not in chunks")
        return False
    return plain_head(model)


class InnerStep:
    """One inner step on fixed tensors: forward, losses, backward, update. Nothing in it waits for the device."""

    def __init__(
        self, pgd: LatentPGD, state: AttackState, layout: PackedLayout, packed: bool, chunked: bool | None = None
    ) -> None:
        self.pgd, self.state, self.layout, self.packed = pgd, state, layout, packed
        self.away = pgd.objective.scored_away(layout.rejected)
        self.chunked = _chunked(pgd.model, layout, pgd) if chunked is None else chunked
        self.clean: Tensor | None = None
        self.reference: Tensor | None = None
        self.weights: Tensor | None = None
        self.last: nn.Module | None = None  # what need be run on `needed` alone
        self.needed: Tensor | None = None

    def trim(self) -> None:
        """Leave out what the last block computes for tokens that predict nothing."""
        self.last = trimmable(self.pgd.model, self.pgd.sites)
        if self.last is not None and len(self.layout.labels):
            self.needed = scored_tokens(self.layout)

    def prepare(self) -> None:
        """What is computed once an attack, without the perturbation: reference and clean probabilities, weights."""
        objective, state, layout = self.pgd.objective, self.state, self.layout
        if objective.needs_reference:
            with torch.no_grad(), adapters_off(self.pgd.model):
                rows = layout_rows(self.pgd.model, layout, state.size, self.packed)
                losses, _ = token_loss_(rows.logits, layout.labels, self.away, backend=self.pgd.backend)
            self.reference = objective.pair_gap(losses, layout.rejected, layout.example, state.size)
        if "kl" in objective.terms:
            with torch.no_grad():
                rows = layout_rows(self.pgd.model, layout, state.size, self.packed)
            self.clean = rows.logits.float().log_softmax(-1)
        if objective.preference is None:
            self.weights = self._weights(torch.zeros(layout.labels.shape, device=layout.labels.device))

    def _weights(self, losses: Tensor) -> Tensor:
        """d objective / d loss of every row: constant, except for a preference loss."""
        leaf = losses.detach().requires_grad_()
        total, _ = self._combine(leaf)
        return torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)

    def _combine(self, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        layout, state = self.layout, self.state
        return self.pgd.objective.combine(
            losses, layout.rejected, layout.example, state.size, state.counts, self.reference
        )

    def __call__(self) -> None:
        """Run the step; the losses go into the state's history."""
        kept: dict[str, Tensor] = {}
        state, layout, penalty = self.state, self.layout, self.pgd.objective.l2_penalty
        few = nullcontext() if self.last is None or self.needed is None else trimmed(self.last, self.needed)
        with few, perturbed(self.pgd.sites, state.deltas, fixed_rows(layout.token_rows), kept, self.pgd.backend):
            rows = layout_rows(self.pgd.model, layout, state.size, self.packed, run_head=not self.chunked)
            output, grad_output, losses, hits, kl, scale = self._loss(rows)
            grads = gradients(output, [kept[site.name] for site in self.pgd.sites], grad_output)
        _, terms = self._combine(losses)
        if kl is not None:
            terms["kl"] = kl
        terms["total"] = torch.stack([term.double() for term in terms.values()]).sum()
        tokens = layout.row_tokens
        if scale is not None:
            grads = [gather_grad(g, tokens.to(g.device)) / scale.to(g.device) for g in grads]
            tokens = state.own_rows
        if penalty:
            terms["l2_norm"] = self.pgd.objective.penalty(state.deltas, state.positions)
            grads, tokens = self._penalised(grads, tokens), state.own_rows
        state.record(terms, losses, hits, rows)
        state.update(self.pgd, grads, tokens)

    def _loss(self, rows: PairRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(what to differentiate, its gradient, losses [N], hits [N], the KL term, by what the gradient is scaled)."""
        labels, objective, backend = self.layout.labels, self.pgd.objective, self.pgd.backend
        kl_share = objective.coefs.get("kl", 0) / max(len(labels), 1)
        if self.chunked:
            head = output_head(self.pgd.model)
            assert isinstance(head, nn.Linear)
            losses, hits = linear_token_loss(
                rows.logits, head.weight, labels, self.away, objective.threshold, bias=head.bias, backend=backend
            )
            slope = self._weights(losses) if self.weights is None else self.weights
            scale = loss_scale(rows.logits.dtype, slope)
            slope = slope if scale is None else slope * scale
            return losses, slope, losses.detach(), hits, None, scale
        logits = rows.logits
        # The gradient takes the logits' place, unless the operation that made them needs them for its own backward.
        # `.data`, as writing to what `.detach()` gives makes autograd copy the gradient of a view of the logits.
        grad = logits.data.clone() if _saved(logits) else logits.data
        kl = extra = None
        if self.clean is not None:
            log_probs = grad.float().log_softmax(-1)
            kl = (self.clean.exp() * (self.clean - log_probs)).sum(-1).mean()
            extra = (log_probs.exp() - self.clean.exp()) * kl_share
        weights = self.weights
        if weights is None:
            weights = self._weights(token_loss_(grad, labels, self.away, None, objective.threshold, backend=backend)[0])
        scale = loss_scale(grad.dtype, weights, weights.new_full((1,), kl_share))
        if scale is not None:
            weights = weights * scale
            extra = None if extra is None else extra * scale
        losses, hits = token_loss_(grad, labels, self.away, weights, objective.threshold, backend=backend)
        if extra is not None:
            grad += extra.to(grad.dtype)
        return logits, grad, losses, hits, kl, scale

    def _penalised(self, grads: list[Tensor], tokens: Tensor) -> list[Tensor]:
        """Row gradients [R, H] with that of the penalty: delta / norm2(delta), 0 at 0."""
        rows = []
        for grad, delta in zip(grads, self.state.deltas, strict=True):
            values = delta.float()
            norm = torch.linalg.vector_norm(values)
            unit = torch.where(norm > 0, values / norm, torch.zeros_like(values))
            scale = self.pgd.objective.l2_penalty / (self.state.positions.to(grad.device) * delta.shape[-1]).sqrt()
            rows.append(gather_grad(grad, tokens.to(grad.device)) + scale * unit)
        return rows


def _saved(logits: Tensor) -> bool:
    """Whether the operation that made the logits keeps them for its backward (a tanh does, a product does not).

    One that is written in Python, or compiled, may.
    """
    base = logits._base if logits._is_view() else logits
    if base is None or isinstance(base.grad_fn, torch.autograd.function.BackwardCFunction):
        return True
    return hasattr(base.grad_fn, "_saved_result")


def run(pgd: LatentPGD, state: AttackState, layout: PackedLayout, packed: bool) -> None:
    """The inner loop on a layout. `packed`: whether it is of `pack`, or of `unshared`."""
    step = InnerStep(pgd, state, layout, packed)
    step.prepare()
    step.trim()
    depth = pgd.frozen_depth()
    with frozen_blocks(pgd.model, depth) if depth else nullcontext():
        for _ in range(pgd.steps):
            step()
