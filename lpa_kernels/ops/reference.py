"""The oracle: every op in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry

RULES = ("adamw", "normalised", "sign", "adam", "rmsprop", "sgd")
NORMS = ("l2", "linf", "none")
BLOCK = 1 << 18  # logits that token_loss_ takes at once on a CPU, so that its temporaries stay in the cache


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _correction(beta: float, step: Tensor) -> Tensor:
    """Adam's bias correction 1 - beta**step. In float32 the plain difference loses 6e-5 of it at step 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)


def perturb(hidden: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    """hidden [T, H] plus delta [R, H] at `rows` [T] (-1: none), summed in float32 and rounded once."""
    touched = rows >= 0
    if delta.shape[0] == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    total = hidden.to(_at_least_float32(hidden.dtype)) + delta[rows.clamp(min=0)]
    return torch.where(touched[:, None], total.to(hidden.dtype), hidden).contiguous()


def gather_grad(grad: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the gradients of each row's tokens.

    Args:
        grad: [T, H], any float dtype.
        tokens: [R, K] int64, -1 for none.

    Returns:
        [R, H], float32 or wider.
    """
    dtype = _at_least_float32(grad.dtype)
    if grad.shape[0] == 0 or tokens.shape[1] == 0:
        return torch.zeros(tokens.shape[0], grad.shape[1], dtype=dtype, device=grad.device)
    parts = [
        grad.index_select(0, token.clamp(min=0)).to(dtype).masked_fill_(token[:, None] < 0, 0)
        for token in tokens.unbind(1)
    ]
    return parts[0] if len(parts) == 1 else torch.add(*parts)


def row_norm(delta: Tensor, norm: str) -> Tensor:
    """The norm of each row of delta [..., H]: largest magnitude for "linf", Euclidean otherwise."""
    if norm == "linf":
        return delta.abs().amax(-1) if delta.shape[-1] else delta.new_zeros(delta.shape[:-1])
    return torch.linalg.vector_norm(delta, dim=-1)


def project(delta: Tensor, norms: Tensor, epsilon: Tensor, norm: str) -> Tensor:
    """delta [..., H] brought inside the ball of radius epsilon ([], or one a row), given its `row_norm`."""
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
    """One step of `rule` on delta [S, R, H] and the projection, as `lpa_kernels.pgd_update_` describes it."""
    dtype = _at_least_float32(delta.dtype)
    live = (tokens >= 0).any(1, keepdim=True)
    # one factor a row: a row without tokens has gradient 0 and is multiplied by 1, so it keeps every bit
    one = torch.ones((), dtype=dtype, device=delta.device)  # torch.where of two numbers has torch's default dtype
    moved = torch.where(live, step_size, 0.0)
    kept1, kept2, least = (torch.where(live, one * value, one) for value in (beta1, beta2, eps))
    for site, grad in enumerate(grads):
        g = gather_grad(grad, tokens).to(dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        g = -g if maximize else g
        d = delta[site].to(dtype)
        if rule == "adamw":
            d = d * (1 - moved * weight_decay)
        elif weight_decay and rule in ("adam", "rmsprop", "sgd"):
            g = torch.where(live, g + weight_decay * d, g)
        if rule == "normalised":
            largest = g.abs().amax(-1, keepdim=True) if g.shape[-1] else g.new_ones(g.shape[0], 1)
            unit = torch.where(largest > 0, g / largest, torch.zeros_like(g))  # squares of small numbers vanish
            length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
            direction = torch.where(length > 0, unit / length, unit)
        elif rule == "sign":
            direction = g.sign()
        elif rule == "sgd":
            direction = g
        else:
            assert exp_avg_sq is not None
            v = torch.addcmul(exp_avg_sq[site].to(dtype) * kept2, g, g, value=1 - beta2)
            exp_avg_sq[site].copy_(v)
            if rule == "rmsprop":
                direction = g / v.sqrt_().add_(least)
            else:
                assert exp_avg is not None
                m = torch.add(exp_avg[site].to(dtype) * kept1, g, alpha=1 - beta1)
                exp_avg[site].copy_(m)
                scale = v.sqrt_().div_(_correction(beta2, step).sqrt()).add_(least)
                direction = m.div_(_correction(beta1, step)).div_(scale)
        d = d - moved * direction
        length = row_norm(d, norm)
        norms[site].copy_(length)
        radius = epsilon if epsilon.dim() == 0 else epsilon[site]
        if norm != "none":
            radius = torch.where(live.squeeze(1), radius, math.inf)
            clipped[site] += (length > radius).sum()
            d = project(d, length, radius, norm)
        delta[site].copy_(d)


def token_loss_(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row of logits [N, V]; with `weight`, the gradient over the logits in place.

    As `lpa_kernels.token_loss_` describes it. The softplus form keeps full precision where the label's probability
    is near 0 or near 1.
    """
    on_cpu = logits.device.type == "cpu"
    rows = max(1, BLOCK // max(logits.shape[1], 1) if on_cpu else logits.shape[0])
    losses, hits = [], []
    for start in range(0, max(logits.shape[0], 1), rows):
        part = slice(start, start + rows)
        scale = None if weight is None else weight[part]
        loss, hit = _token_loss_rows(logits[part], labels[part], away[part], scale, threshold)
        losses.append(loss)
        hits.append(hit)
    return torch.cat(losses), torch.cat(hits)


def _token_loss_rows(
    logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
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
        slope = torch.where(away, s.sigmoid(), -(-s).sigmoid()) * weight  # d loss / d s
        finite = log_rest.clamp(min=torch.finfo(z.dtype).min)  # -inf where no other token is possible
        grad = others.sub_(finite[:, None]).exp_().mul_(-slope[:, None]).scatter_(1, label, slope[:, None])
        logits.copy_(grad.masked_fill_(off[:, None], 0))
    return losses, hits


def _takes(*args: object) -> str | None:
    return None


registry.register("perturb", "reference", perturb, _takes)
registry.register("pgd_update_", "reference", pgd_update_, _takes)
registry.register("token_loss_", "reference", token_loss_, _takes)
