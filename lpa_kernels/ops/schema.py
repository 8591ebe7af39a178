"""The ops of this package in torch.library: one schema each, their fakes, and a default kernel that picks a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry

SCHEMAS = (
    "perturb(Tensor hidden, Tensor delta, Tensor rows) -> Tensor",
    "pgd_update_(Tensor(a!) delta, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, Tensor[] grads, Tensor tokens,"
    " Tensor step, Tensor step_size, Tensor epsilon, Tensor(d!) norms, Tensor(e!) clipped, str rule, str norm,"
    " bool maximize, float beta1, float beta2, float eps, float weight_decay) -> ()",
    "token_loss_(Tensor(a!) logits, Tensor labels, Tensor away, Tensor? weight, float threshold)"
    " -> (Tensor losses, Tensor hits)",
    "add_norm(Tensor x, Tensor? residual, Tensor? low, Tensor? up, Tensor? delta, Tensor? rows, Tensor? weight,"
    " float scale, float eps) -> (Tensor r, Tensor normed, Tensor rstd)",
    "add_norm_backward(Tensor grad, Tensor r, Tensor rstd, Tensor weight, Tensor? residual) -> Tensor",
    "swiglu(Tensor gate, Tensor up, str activation) -> Tensor",
    "swiglu_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor grad, str activation) -> ()",
    "rotate_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor q_places, Tensor k_places, bool back) -> ()",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor q_places, Tensor k_places,"
    " Tensor q_starts, Tensor k_starts, int longest_q, int longest_k, float scale, float softcap, int window)"
    " -> (Tensor out, Tensor lse)",
    "attention_backward_(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) d_q,"
    " Tensor(b!) d_k, Tensor(c!) d_v, Tensor? cos, Tensor? sin, Tensor q_places, Tensor k_places, Tensor q_starts,"
    " Tensor k_starts, int longest_q, int longest_k, float scale, float softcap, int window) -> ()",
)
OPS = tuple(schema.partition("(")[0] for schema in SCHEMAS)

_library = torch.library.Library("lpa_kernels", "DEF")


def _default(op: str) -> Any:
    def run(*args: Any) -> Any:
        return registry.select(op, "auto", args)(*args)

    return run


for _schema, _op in zip(SCHEMAS, OPS, strict=True):
    _library.define(_schema)
    _library.impl(_op, _default(_op), "CompositeExplicitAutograd")


@torch.library.register_fake("lpa_kernels::perturb", lib=_library)
def _(hidden: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("lpa_kernels::pgd_update_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("lpa_kernels::token_loss_", lib=_library)
def _(logits: Tensor, labels: Tensor, away: Tensor, weight: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    return losses, logits.new_empty(logits.shape[0], dtype=torch.bool)


@torch.library.register_fake("lpa_kernels::add_norm", lib=_library)
def _(
    x: Tensor, residual: Tensor | None, low: Tensor | None, up: Tensor | None, delta: Tensor | None,
    rows: Tensor | None, weight: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    added = residual is not None or low is not None or (delta is not None and len(delta) > 0)
    r = x.new_empty(x.shape if added else 0)
    if weight is None:
        return r, x.new_empty(0), x.new_empty(0, dtype=wide)
    return r, x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=wide)


@torch.library.register_fake("lpa_kernels::add_norm_backward", lib=_library)
def _(grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    return r.new_empty(r.shape)


@torch.library.register_fake("lpa_kernels::swiglu", lib=_library)
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("lpa_kernels::attention", lib=_library)
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("lpa_kernels::swiglu_backward_", lib=_library)
@torch.library.register_fake("lpa_kernels::rotate_", lib=_library)
@torch.library.register_fake("lpa_kernels::attention_backward_", lib=_library)
def _(*args: Any) -> None:
    return None


def _setup_perturb(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, delta, rows = inputs
    ctx.save_for_backward(rows)
    ctx.delta = (delta.shape, delta.dtype)


def perturb_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """Gradients of perturb's hidden, delta and rows from that of its result, grad [T, H].

    delta's is the sum of the gradients of each row's tokens, in float32 or wider.
    """
    if not ctx.needs_input_grad[1]:
        return grad, None, None
    (rows,) = ctx.saved_tensors
    shape, dtype = ctx.delta
    total = torch.zeros(shape[0] + 1, shape[1], dtype=torch.promote_types(dtype, torch.float32), device=grad.device)
    total.index_add_(0, torch.where(rows >= 0, rows, shape[0]), grad.to(total.dtype))  # the last row is the bin
    return grad, total[:-1].to(dtype), None


torch.library.register_autograd("lpa_kernels::perturb", perturb_gradients, setup_context=_setup_perturb, lib=_library)
