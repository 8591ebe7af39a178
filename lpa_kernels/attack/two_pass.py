"""The oracle: the conventional inner loop of two plain passes a step, written plainly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.hooks import hooked
from ..model.perturbation import gradients, grid_rows, perturbed, rows_by_length
from ..model.sites import Site, hidden_of
from ..ops import token_loss
from .base_model import adapters_off
from .batch import PairBatch
from .objective import Objective, kl_rows, loss_scale
from .passes import texts, two_pass_rows
from .settings import AttackSettings
from .state import AttackState


@torch.no_grad()
def reference_gap(
    model: nn.Module, batch: PairBatch, objective: Objective, backend: str, alone: bool = False
) -> Tensor:
    """[B] difference of log-probabilities of rejected and chosen, adapters and perturbation off."""
    with adapters_off(model):
        rows = two_pass_rows(model, batch, alone=alone)
    losses, _ = token_loss(rows.logits, rows.labels, torch.zeros_like(rows.rejected), backend=backend)
    return objective.pair_gap(losses, rows.rejected, rows.example, rows.size)


@torch.no_grad()
def hidden_norms(model: nn.Module, sites: Sequence[Site], batch: PairBatch, alone: bool = False) -> Tensor:
    """[S, R] float32: norm of the unperturbed hidden state at each site and attacked position, mean of both texts."""
    grid, rows = batch.grid, int(batch.attack_mask.sum())
    total = torch.zeros(len(sites), rows, device=grid.device)
    count = torch.zeros(rows, device=grid.device)
    for part, ids, mask in texts(batch, alone=alone):
        seen: dict[str, Tensor] = {}

        def watch(name: str, seen: dict[str, Tensor] = seen) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = hidden_of(output).flatten(0, -2).float().norm(dim=-1)

            return hook

        with hooked((site.module, watch(site.name)) for site in sites):
            model(input_ids=ids, use_cache=False)
        real = mask.flip(1).cumsum(1).flip(1) > 0  # up to the last label
        index = rows_by_length(grid[part], ids.shape[1])
        use = (index >= 0) & real.flatten()
        count.index_add_(0, index[use], torch.ones_like(index[use], dtype=count.dtype))
        for i, site in enumerate(sites):
            total[i].index_add_(0, index[use], seen[site.name].to(total.device)[use])
    return total / count.clamp(min=1)


def run(
    model: nn.Module,
    sites: Sequence[Site],
    settings: AttackSettings,
    state: AttackState,
    batch: PairBatch,
    alone: bool = False,
) -> None:
    """The inner loop: forward both texts, backward, update, project. `state` is changed in place.

    Args:
        alone: every text in a pass of its own, for models whose rows depend on each other or on padding.
    """
    objective, halves, backend = settings.objective, settings.halves, settings.backend
    reference = clean = None
    if objective.needs_reference:
        reference = reference_gap(model, batch, objective, backend, alone)
    if "kl" in objective.terms:
        with torch.no_grad():
            clean = two_pass_rows(model, batch, halves, alone).logits.float().log_softmax(-1)
    for _ in range(settings.steps):
        leaves = [delta.detach().clone().requires_grad_() for delta in state.deltas]
        under = partial(_under, sites, leaves, backend)
        rows = two_pass_rows(model, batch, halves, alone, under)
        away = objective.scored_away(rows.rejected)
        losses, hits = token_loss(rows.logits, rows.labels, away, objective.threshold, backend=backend)
        total, terms = objective.combine(losses, rows.rejected, rows.example, rows.size, state.counts, reference)
        if clean is not None:
            terms["kl"] = kl_rows(clean, rows.logits).mean()
            total = total + objective.coefs["kl"] * terms["kl"]
        terms["total"] = torch.stack([term.detach().double() for term in terms.values()]).sum()
        if objective.l2_penalty:
            terms["l2_norm"] = objective.penalty(leaves, state.positions)
            total = total + objective.l2_penalty * terms["l2_norm"]
        (weights,) = torch.autograd.grad(total, losses, retain_graph=True, materialize_grads=True)
        each = losses.new_full((1,), objective.coefs.get("kl", 0) / max(len(losses), 1))
        scale = loss_scale(rows.logits.dtype, weights, each)
        grads = gradients(total, leaves, None if scale is None else scale.to(total.dtype))
        grads = grads if scale is None else [grad / scale.to(grad.device) for grad in grads]
        state.record(terms, losses, hits, rows)
        state.update(grads, state.own_rows)


def _under(sites: Sequence[Site], deltas: Sequence[Tensor], backend: str, grid: Tensor) -> AbstractContextManager[None]:
    return perturbed(sites, deltas, grid_rows(grid), backend=backend)
