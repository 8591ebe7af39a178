"""The attack of the papers, one text a pass and one tensor a pair: an oracle that shares no code with the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lpa_kernels.attack import PairBatch

CUT_OFF = -20.0  # no token of a tiny model falls below it, so that no rounding can decide whether one counts


def plain_attack(
    model: Any, modules: list[nn.Module], batch: PairBatch, steps: int, step_size: float, epsilon: float
) -> tuple[Tensor, list[Tensor]]:
    """The adversary's losses and perturbations, every text in a pass of its own without padding.

    Args:
        modules: where to perturb. batch: whose attack mask holds whole texts.

    Returns:
        totals [steps] before each update, and deltas, one [R, H] a module, a row for each attacked position.
    """
    counts = {name: int(getattr(batch, f"{name}_mask")[:, 1:].sum()) for name in ("rejected", "chosen")}
    totals = torch.zeros(steps, dtype=torch.float64)
    found = []
    for i in range(len(batch)):
        attacked = batch.attack_mask[i].nonzero()[:, 0]
        deltas: list[Tensor] = []
        optimiser: torch.optim.Optimizer | None = None
        for step in range(steps):
            loss: Any = 0.0
            for name in ("rejected", "chosen"):
                mask = getattr(batch, f"{name}_mask")[i]
                length = int(mask.nonzero()[-1]) + 1
                ids = getattr(batch, f"{name}_ids")[i : i + 1, :length]
                logits = _logits(model, modules, ids, deltas, attacked)
                terms = _terms(logits, ids[0], mask[:length], toward=name == "rejected")
                loss = loss + 0.5 * terms / counts[name]
                totals[step] += float(terms.detach().double()) / counts[name]
            if optimiser is None:
                optimiser = torch.optim.AdamW(deltas, lr=step_size, weight_decay=0.01)
            for delta, grad in zip(deltas, torch.autograd.grad(loss, deltas), strict=True):
                delta.grad = grad
            optimiser.step()
            with torch.no_grad():
                for delta in deltas:
                    delta.div_((delta.norm(dim=-1, keepdim=True) / epsilon).clamp(min=1))
        found.append([delta.detach() for delta in deltas])
    return totals, [torch.cat(rows) for rows in zip(*found, strict=True)]


def _logits(model: Any, modules: list[nn.Module], ids: Tensor, deltas: list[Tensor], attacked: Tensor) -> Tensor:
    """[L, V] of one text, each module's output perturbed; the first call makes the deltas, of zeros."""

    def adding(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if len(deltas) == index:
                deltas.append(torch.zeros(len(attacked), hidden.shape[-1], dtype=hidden.dtype, requires_grad=True))
            flat = hidden.reshape(-1, hidden.shape[-1])
            inside = attacked < flat.shape[0]
            moved = flat.index_add(0, attacked[inside], deltas[index][inside]).view(hidden.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [module.register_forward_hook(adding(index)) for index, module in enumerate(modules)]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits[logits.shape[0] - ids.shape[1] :]  # virtual tokens stand before the text


def _terms(logits: Tensor, ids: Tensor, mask: Tensor, toward: bool) -> Tensor:
    """The sum over a completion's tokens of -log p (toward) or -log(1 - p) (away)."""
    where = mask[1:].nonzero()[:, 0]
    log_p = logits[where].double().log_softmax(-1)
    own = log_p.gather(1, ids[where + 1][:, None])[:, 0]
    if toward:
        return -own.sum()
    others = log_p.scatter(1, ids[where + 1][:, None], -torch.inf).logsumexp(-1)
    return -torch.where(own < CUT_OFF, torch.zeros_like(others), others).sum()
