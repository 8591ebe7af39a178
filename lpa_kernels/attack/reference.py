"""The oracle: the conventional two-pass inner loop, written plainly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.hooks import gradients, grid_rows, perturbed, rows_by_length
from ..model.modes import kept_flags
from ..model.sites import Site, hidden_of
from ..ops import token_loss
from .batch import PairBatch
from .objective import Objective, PairRows, kl_rows, loss_scale
from .state import AttackState

if TYPE_CHECKING:
    from .pgd import LatentPGD


def text_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [n, V] before each True of mask [B, L], from one plain pass over ids [B, L]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    row, before = mask[:, 1:].nonzero(as_tuple=True)  # autograd keeps these, and may not keep a caller's inference mask
    return logits[row, before]


def two_pass_rows(model: nn.Module, batch: PairBatch, halves: tuple[bool, bool] = (True, True)) -> PairRows:
    """`PairRows` from one pass for each completion. `halves`: whether rejected and chosen are wanted."""
    logits, labels, rejected, example = [], [], [], []
    for name, wanted in zip(("rejected", "chosen"), halves, strict=True):
        if not wanted:
            continue
        mask = getattr(batch, f"{name}_mask")
        logits.append(text_logits(model, getattr(batch, f"{name}_ids"), mask))
        labels.append(batch.labels(name))
        rejected.append(torch.full_like(labels[-1], name == "rejected", dtype=torch.bool))
        example.append(mask[:, 1:].nonzero()[:, 0])
    return PairRows(torch.cat(logits), torch.cat(labels), torch.cat(rejected), torch.cat(example), len(batch))


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its adapters.

    Raises:
        ValueError: it has none, so that there is no reference model.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError("the reference model is this one without adapters, and it has none; use reference_free=True")
    with kept_flags(model), model.disable_adapter():  # peft turns every adapter's requires_grad on at its end
        yield


@torch.no_grad()
def reference_gap(model: nn.Module, batch: PairBatch, objective: Objective, backend: str) -> Tensor:
    """[B] difference of log-probabilities of rejected and chosen, adapters and perturbation off."""
    with adapters_off(model):
        rows = two_pass_rows(model, batch)
    losses, _ = token_loss(rows.logits, rows.labels, torch.zeros_like(rows.rejected), backend=backend)
    return objective.pair_gap(losses, rows.rejected, rows.example, rows.size)


@torch.no_grad()
def hidden_norms(model: nn.Module, sites: Sequence[Site], batch: PairBatch) -> Tensor:
    """[S, R] float32: norm of the unperturbed hidden state at each site and attacked position, mean of both texts."""
    grid, rows = batch.grid, int(batch.attack_mask.sum())
    total = torch.zeros(len(sites), rows, device=grid.device)
    count = torch.zeros(rows, device=grid.device)
    for ids, mask in ((batch.rejected_ids, batch.rejected_mask), (batch.chosen_ids, batch.chosen_mask)):
        seen: dict[str, Tensor] = {}

        def watch(name: str, seen: dict[str, Tensor] = seen) -> Any:
            return lambda module, args, out: seen.__setitem__(name, hidden_of(out).flatten(0, -2).float().norm(dim=-1))

        handles = [site.module.register_forward_hook(watch(site.name)) for site in sites]
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        real = mask.flip(1).cumsum(1).flip(1) > 0  # up to the last label
        index = rows_by_length(grid, ids.shape[1])
        use = (index >= 0) & real.flatten()
        count.index_add_(0, index[use], torch.ones_like(index[use], dtype=count.dtype))
        for i, site in enumerate(sites):
            total[i].index_add_(0, index[use], seen[site.name].to(total.device)[use])
    return total / count.clamp(min=1)


def run(pgd: LatentPGD, batch: PairBatch, state: AttackState) -> None:
    """The inner loop of §3: forward both texts, backward, update, project. `state` is changed in place."""
    objective, model, halves = pgd.objective, pgd.model, pgd.halves
    reference = clean = None
    if objective.needs_reference:
        reference = reference_gap(model, batch, objective, pgd.backend)
    if "kl" in objective.terms:
        with torch.no_grad():
            clean = two_pass_rows(model, batch, halves).logits.float().log_softmax(-1)
    for _ in range(pgd.steps):
        leaves = [delta.detach().clone().requires_grad_() for delta in state.deltas]
        with perturbed(pgd.sites, leaves, grid_rows(batch.grid), backend=pgd.backend):
            rows = two_pass_rows(model, batch, halves)
            away = objective.scored_away(rows.rejected)
            losses, hits = token_loss(rows.logits, rows.labels, away, objective.threshold, backend=pgd.backend)
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
        state.update(pgd, grads, state.own_rows)
