"""The oracle: every op in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry

RULES = ("adamw", "normalized", "sign", "adam", "rmsprop", "sgd")
NORMS = ("l2", "linf", "none")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _correction(beta: float, step: Tensor) -> Tensor:
    """Adam's bias correction 1 - beta**step; the difference itself would lose 6e-5 of it in float32 at step 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)


def perturb(hidden: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    """hidden [T,H] plus delta [R,H] at `rows` [T] (-1: untouched), summed in float32 and rounded once."""
    touched = rows >= 0
    if delta.shape[0] == 0:
        return hidden.clone()
    total = hidden.to(_at_least_float32(hidden.dtype)) + delta[rows.clamp(min=0)]
    return torch.where(touched[:, None], total.to(hidden.dtype), hidden)


def gather_grad(grad: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the token gradients of each row: grad [T,H], tokens [R,K] (-1: none) -> [R,H], float32 or wider."""
    dtype = _at_least_float32(grad.dtype)
    total = torch.zeros(tokens.shape[0], grad.shape[1], dtype=dtype, device=grad.device)
    if grad.shape[0] == 0:
        return total
    for token in tokens.unbind(1):
        part = grad[token.clamp(min=0)].to(dtype)
        total = total + torch.where(token[:, None] >= 0, part, torch.zeros((), dtype=dtype, device=grad.device))
    return total


def row_norm(delta: Tensor, norm: str) -> Tensor:
    """The norm of each row of delta [..., H]: largest magnitude for "linf", Euclidean otherwise."""
    if norm == "linf":
        return delta.abs().amax(-1) if delta.shape[-1] else delta.new_zeros(delta.shape[:-1])
    return torch.linalg.vector_norm(delta, dim=-1)


def project(delta: Tensor, norms: Tensor, epsilon: Tensor, norm: str) -> Tensor:
    """delta [..., H] inside the ball of radius epsilon ([] or one a row); `norms` as `row_norm` gives them."""
    radius = epsilon.expand(norms.shape).unsqueeze(-1)
    if norm == "l2":
        length = norms.unsqueeze(-1)
        return torch.where(length > radius, delta / (length / radius), delta)  # also for a radius of 0
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, radius), -radius)
    return delta


def pgd_update_(
    delta: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    grads: list[Tensor],
    tokens: Tensor,
    step: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
    norms: Tensor,
    clipped: Tensor,
    rule: str,
    norm: str,
    maximize: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of `rule` on delta [S,R,H] and the projection; see `lpa_kernels.ops.pgd_update_`."""
    live = (tokens >= 0).any(1)
    for site, grad in enumerate(grads):
        old = delta[site]
        dtype = _at_least_float32(old.dtype)
        g = gather_grad(grad, tokens).to(dtype)
        g = torch.where(g.isfinite(), -g if maximize else g, torch.zeros_like(g))
        d = old.to(dtype)
        if rule == "adamw":
            d = d * (1 - step_size * weight_decay)
        elif weight_decay and rule in ("adam", "rmsprop", "sgd"):
            g = g + weight_decay * d
        if rule == "normalized":
            largest = g.abs().amax(-1, keepdim=True) if g.shape[-1] else g.new_ones(g.shape[0], 1)
            unit = torch.where(largest > 0, g / largest, torch.zeros_like(g))  # squares of small numbers would vanish
            length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
            direction = torch.where(length > 0, unit / length, unit)
        elif rule == "sign":
            direction = g.sign()
        elif rule == "sgd":
            direction = g
        else:
            assert exp_avg_sq is not None
            v = exp_avg_sq[site].to(dtype) * beta2 + (1 - beta2) * g * g
            exp_avg_sq[site].copy_(torch.where(live[:, None], v, exp_avg_sq[site].to(dtype)))
            if rule == "rmsprop":
                direction = g / (v.sqrt() + eps)
            else:
                assert exp_avg is not None
                m = exp_avg[site].to(dtype) * beta1 + (1 - beta1) * g
                exp_avg[site].copy_(torch.where(live[:, None], m, exp_avg[site].to(dtype)))
                direction = (m / _correction(beta1, step)) / (v.sqrt() / _correction(beta2, step).sqrt() + eps)
        d = torch.where(live[:, None], d - step_size * direction, old.to(dtype))
        length = row_norm(d, norm)
        norms[site].copy_(length)
        radius = epsilon if epsilon.dim() == 0 else epsilon[site]
        if norm != "none":
            clipped[site] += (live & (length > radius)).sum()
            d = torch.where(live[:, None], project(d, length, radius, norm), d)
        old.copy_(d)


def token_loss_(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row of logits [N,V]; with `weight`, the gradient over the logits in place.

    See `lpa_kernels.ops.token_loss_`. The softplus form keeps full precision where the probability of the label
    is near 0 or near 1.
    """
    z = logits.to(_at_least_float32(logits.dtype))
    ignored = labels == -100
    label = torch.where(ignored, torch.zeros_like(labels), labels)[:, None]
    own = z.gather(1, label).squeeze(1)
    others = z.scatter(1, label, float("-inf"))
    log_rest = others.logsumexp(1)
    s = own - log_rest
    off = ignored | (away & (F.logsigmoid(s) < threshold))
    losses = -F.logsigmoid(torch.where(away, -s, s))
    losses = torch.where(off, torch.zeros_like(losses), losses)
    hits = ~ignored & (own >= others.amax(1)) if z.shape[0] else ~ignored
    if weight is not None:
        slope = torch.where(away, s.sigmoid(), -(-s).sigmoid())  # d loss / d s
        slope = torch.where(off, torch.zeros_like(slope), slope * weight)
        possible = others > float("-inf")  # where no other token is, log_rest is -inf too
        grad = -slope[:, None] * torch.where(possible, others - log_rest[:, None], others).exp()
        grad.scatter_(1, label, slope[:, None])
        logits.copy_(torch.where(off[:, None], torch.zeros_like(grad), grad))
    return losses, hits


def _takes(*args: object) -> str | None:
    return None


registry.register("perturb", "reference", perturb, _takes)
registry.register("pgd_update_", "reference", pgd_update_, _takes)
registry.register("token_loss_", "reference", token_loss_, _takes)
