"""Do the gradients of a model belong to its losses? Quantised layers and adapters have given others, without a word."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.perturbation import gradients, grid_rows, kept_for_recompute, perturbed
from ..model.sharding import is_sharded
from ..model.sites import Site
from ..ops import token_loss
from .batch import PairBatch
from .passes import text_logits, texts
from .verdicts import is_half


def wrong_gradients(
    model: nn.Module, sites: Sequence[Site], widths: Sequence[tuple[int, torch.device]], batch: PairBatch, backend: str
) -> str:
    """Why the model's backward pass does not belong to its forward pass; "" where it does.

    The loss of one text is moved along its own gradient: a central finite difference and the gradient's norm must agree
    within a factor of two at one of several sizes. A small step may vanish in rounding, a large one may turn a router.
    To be called in the mode that the attack runs the model in.

    Args:
        widths: width and device of each site. backend: of the op that perturbs.
    """
    text = max(texts(batch, alone=True), key=lambda one: one.ids.shape[1])
    grid = batch.grid[text.rows, : text.ids.shape[1]]
    grid = torch.where(grid >= 0, (grid >= 0).long().cumsum(1) - 1, -1)
    rows, labels = int(grid.max()) + 1, text.ids[:, 1:][text.mask[:, 1:]]
    if not rows or not len(labels):
        return ""

    def loss(deltas: Sequence[Tensor]) -> Tensor:
        with kept_for_recompute(model, lambda: perturbed(sites, deltas, grid_rows(grid), backend=backend)):
            logits = text_logits(model, text.ids, text.mask)
        toward = torch.zeros_like(labels, dtype=torch.bool)
        return token_loss(logits, labels, toward, backend="reference")[0].double().mean()

    leaves = [torch.zeros(rows, width, device=device, requires_grad=True) for width, device in widths]
    name = type(model).__name__
    try:
        with torch.enable_grad():
            grads = gradients(loss(leaves), leaves)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{name} cannot be differentiated as an attack runs it: {type(error).__name__}: {error}"
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    if not 0 < norm < math.inf:
        return ""  # the attack itself counts losses that are not finite
    slopes: list[float] = []
    for nats in (0.3, 1.0, 3.0) if is_half(model) else (1e-4, 1e-3, 1e-2, 0.1, 1.0):
        step = nats / (2 * norm)
        with torch.no_grad():
            up, down = (float(loss([grad * (sign * step / norm) for grad in grads])) for sign in (1, -1))
        slopes.append((up - down) / (2 * step))
        if norm / 2 <= slopes[-1] <= norm * 2 and not is_sharded(model):  # there all ranks make the same passes
            return ""
    if any(norm / 2 <= slope <= norm * 2 for slope in slopes):
        return ""
    kinds = ", ".join(_unusual(model)) or "a hook or an autograd.Function of its own"
    return (
        f"the gradients of {name} are not those of its losses: along the gradient the loss of a text rises by "
        f"{norm:.2g} a unit by autograd and by {min(slopes, key=lambda s: abs(s - norm)):.2g} by finite differences; "
        f"what may be the cause: {kinds}"
    )


def _unusual(model: nn.Module) -> list[str]:
    """The classes of modules with weights that come neither from torch nor from transformers nor from peft's LoRA."""
    known = ("torch.", "transformers.", "peft.tuners.lora.layer")
    kinds = {type(module) for module in model.modules() if module._parameters}
    return sorted(
        f"{kind.__module__.split('.')[0]}'s {kind.__name__}" for kind in kinds if not kind.__module__.startswith(known)
    )
