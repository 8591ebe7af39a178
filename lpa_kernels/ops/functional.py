"""What people call: the ops with defaults, shape checks, gradients and a choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import registry, schema
from .reference import NORMS, RULES

THRESHOLD = -5.0  # log-probability below which "away" leaves a token alone (HarmBench's value)
CHUNK_ELEMENTS = 1 << 25  # logits that linear_token_loss holds at once
SPELLINGS = {"normalized": "normalised"}  # other names of rules, and ours


def run(op: str, backend: str, args: tuple[Any, ...], written: Sequence[Tensor | None] = ()) -> Any:
    """Call `op`: straight to its backend in eager mode; through the dispatcher, which costs more, when compiling.

    Args:
        written: the arguments that the op writes. Kernels write behind autograd's back, so their versions are counted
            up here.
    """
    if torch.compiler.is_compiling() and backend == "auto":
        return getattr(torch.ops.lpa_kernels, op)(*args)
    result = registry.select(op, backend, args)(*args)
    for tensor in written:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)
    return result


def _fits(own: Sequence[int], shape: Sequence[int]) -> bool:
    if len(own) != len(shape):
        return False
    for i, size in enumerate(shape):  # noqa: SIM110  before every call, and a generator costs more
        if size != own[i] and size != -1:
            return False
    return True


def expect(name: str, tensor: Tensor | None, *shapes: Sequence[int]) -> None:
    """Raise ValueError where `tensor` has none of these shapes; -1 stands for any size."""
    if tensor is None:
        return
    own = tensor.shape
    for shape in shapes:
        if _fits(own, shape):
            return
    expected = " or ".join(str(list(shape)).replace("-1", "any") for shape in shapes)
    raise ValueError(f"{name} has shape {list(own)}; expected {expected}")


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, delta: Tensor, rows: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.delta = (delta.shape, delta.dtype)
        return run("perturb", backend, (hidden, delta, rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *schema.perturb_gradients(ctx, grads[0]), None


def perturb(hidden: Tensor, delta: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Add a row of delta to each attacked token, out of place.

    The sum is taken in float32 and rounded once. The gradient of `hidden` is the incoming one, uncopied.

    Args:
        hidden: [T, H], any float dtype.
        delta: [R, H] float32.
        rows: [T] int64, the row of each token (below R), -1 where the token is left alone.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        [T, H] in hidden's dtype.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> hidden, delta = torch.zeros(3, 2), torch.tensor([[1.0, 2.0]])
    >>> perturb(hidden, delta, torch.tensor([-1, 0, -1])).tolist()
    [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]
    """
    expect("hidden", hidden, (-1, delta.shape[-1]))
    expect("delta", delta, (-1, -1))
    expect("rows", rows, hidden.shape[:1])
    rows = rows.contiguous()
    if torch.compiler.is_compiling() and backend == "auto":
        return torch.ops.lpa_kernels.perturb(hidden, delta, rows)
    if torch.is_grad_enabled() and (hidden.requires_grad or delta.requires_grad):
        return _Perturb.apply(hidden, delta, rows, backend)
    return run("perturb", backend, (hidden, delta, rows))


def rule_named(rule: str) -> str:
    """The name in `RULES` of an update rule, whose other spellings are accepted.

    Raises:
        ValueError: no rule has this name.

    >>> rule_named("normalized")
    'normalised'
    """
    name = SPELLINGS.get(rule, rule)
    if name not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
    return name


def norm_named(norm: str) -> str:
    """`norm`, if it is one of `NORMS`.

    Raises:
        ValueError: no norm has this name.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    return norm


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """`value` as a [] float32 tensor on `device`; a number is written there without a copy from the host."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=torch.float32, device=device)


def pgd_update_(
    delta: Tensor,
    grads: Sequence[Tensor],
    tokens: Tensor,
    *,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    step: float | Tensor = 1,
    step_size: float | Tensor,
    epsilon: float | Tensor = float("inf"),
    norms: Tensor | None = None,
    clipped: Tensor | None = None,
    rule: str = "adamw",
    norm: str = "l2",
    maximize: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of projected gradient descent on the perturbations of all sites, in place and in one pass.

    For each row the gradients of its tokens are summed in float32, non-finite entries count as 0, the rule moves
    the row, and the projection brings it back inside the ball: delta /= max(norm2(delta)/epsilon, 1) for "l2"
    (Sheshadri et al., arXiv 2407.15549). A row without tokens is left as it is. "adamw" computes what
    torch.optim.AdamW computes.

    Args:
        delta: [S, R, H] float32, S sites, R rows of width H.
        grads: S tensors [T, H] of any float dtype and strides: the loss's gradient at the perturbed hidden states.
        tokens: [R, K] int64, the tokens that row r was added to (K is 1 or 2), -1 for none. Each must be below T: a
            GPU kernel cannot check that without waiting.
        exp_avg, exp_avg_sq: [S, R, H] float32 moments ("adamw", "adam"; "rmsprop" needs the second alone).
        step: the number of this step, from 1. A number or a [] float32 tensor on the device, as are the next two.
        step_size: how far a step goes.
        epsilon: the radius; a tensor may also be [S, R], one radius a row.
        norms: [S, R] float32, written: each row's norm after the step and before the projection.
        clipped: [S] int32, added to: the number of rows that the projection shortened.
        rule: "adamw", "normalised" (step_size times the gradient's direction), "sign"; on the reference backend also
            "adam", "rmsprop", "sgd".
        norm: "l2" (a row's Euclidean norm), "linf" or "none".
        maximize: climb instead of descend.
        betas, eps, weight_decay: of the rules that have them.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (norms, clipped); new tensors where none were given.

    Raises:
        ValueError: an unknown rule, norm or backend, missing moments, or shapes that do not fit.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> delta = torch.zeros(1, 1, 2)
    >>> norms, clipped = pgd_update_(
    ...     delta, [torch.tensor([[3.0, 4.0]])], torch.tensor([[0]]), rule="normalised", step_size=2.0, epsilon=1.0
    ... )
    >>> delta.tolist(), norms.tolist(), clipped.tolist()
    ([[[-0.6..., -0.8...]]], [[2.0]], [1])
    """
    rule, norm = rule_named(rule), norm_named(norm)
    expect("delta", delta, (-1, -1, -1))
    if len(grads) != delta.shape[0]:
        raise ValueError(f"there are {len(grads)} grads; expected {delta.shape[0]}, one for each site of delta")
    rows, device = delta.shape[:2], delta.device
    for grad in grads:
        expect("a gradient", grad, (-1, delta.shape[2]))
    expect("tokens", tokens, (rows[1], -1))
    if rule in ("adamw", "adam", "rmsprop") and (exp_avg_sq is None or (exp_avg is None and rule != "rmsprop")):
        raise ValueError(f"rule={rule!r} needs the moments exp_avg and exp_avg_sq, [S, R, H]")
    if norms is None:
        norms = torch.empty(rows, dtype=torch.float32, device=device)
    if clipped is None:
        clipped = torch.zeros(rows[:1], dtype=torch.int32, device=device)
    scalars = [as_scalar(value, device) for value in (step, step_size, epsilon)]
    # a kernel would read or write past the end of what is too small
    expect("exp_avg", exp_avg, delta.shape)
    expect("exp_avg_sq", exp_avg_sq, delta.shape)
    expect("norms", norms, rows)
    expect("clipped", clipped, rows[:1])
    expect("step", scalars[0], ())
    expect("step_size", scalars[1], ())
    expect("epsilon", scalars[2], (), rows)
    if clipped.dtype != torch.int32:
        raise ValueError(f"clipped has dtype {clipped.dtype}; expected torch.int32")
    scalars = [scalar.contiguous() for scalar in scalars]
    args = (delta, exp_avg, exp_avg_sq, list(grads), tokens.contiguous(), *scalars, norms, clipped, rule, norm,
            maximize, *betas, eps, weight_decay)  # fmt: skip
    run("pgd_update_", backend, args, written=(delta, exp_avg, exp_avg_sq, norms, clipped))
    return norms, clipped


def project_(delta: Tensor, epsilon: float | Tensor, norm: str = "l2", *, backend: str = "auto") -> Tensor:
    """Bring every row of delta inside the ball of radius epsilon, in place: the update with a step of 0.

    Args:
        delta: [..., H] float32.
        epsilon: a number or a [] tensor; or one radius a row, in the shape of delta without its last dimension.
        norm: "l2" (Euclidean, a row at a time) or "linf".
        backend: "auto", "reference", "triton" or "native".

    Returns:
        delta.

    Raises:
        ValueError: norm is neither.

    >>> project_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0).tolist()
    [[0.6..., 0.8...], [0.3..., 0.4...]]
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm={norm!r} has no projection; use 'l2' or 'linf'")
    with torch.no_grad():
        flat = delta.detach().contiguous().view(1, -1, delta.shape[-1])
        nothing = torch.zeros((), dtype=torch.float32, device=delta.device).expand(flat.shape[1:])
        tokens = torch.arange(flat.shape[1], device=delta.device)[:, None]
        if isinstance(epsilon, Tensor) and epsilon.dim():
            epsilon = epsilon.reshape(flat.shape[:2])
        pgd_update_(flat, [nothing], tokens, step_size=0.0, epsilon=epsilon, rule="sign", norm=norm, backend=backend)
        if not delta.is_contiguous():
            delta.copy_(flat.view(delta.shape))
    return delta


def token_loss_(
    logits: Tensor,
    labels: Tensor,
    away: Tensor,
    weight: Tensor | None = None,
    threshold: float = THRESHOLD,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """ "Toward" and "away" losses of rows of logits, and optionally their gradient over the logits in place.

    With s = z_y - logsumexp of the other logits: toward is softplus(-s) = -log p, away is softplus(s) =
    -log(1 - p), and 0 where log p < threshold. This form is accurate for p near 0 and near 1.

    Args:
        logits: [N, V], any float dtype. With `weight`, overwritten by weight[n] * d loss[n] / d logits[n].
        labels: [N] int64, -100 for a row that does not count (loss and gradient 0).
        away: [N] bool.
        weight: [N] float32, or None to leave the logits alone.
        threshold: log-probability.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        losses [N] float32 (without the weight) and hits [N] bool: the label is the most probable token.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> logits = torch.zeros(1, 4)
    >>> losses, hits = token_loss_(logits, torch.tensor([2]), torch.tensor([False]), torch.ones(1))
    >>> losses.tolist(), logits.tolist()
    ([1.386...], [[0.25, 0.25, -0.75..., 0.25]])
    """
    expect("logits", logits, (-1, -1))
    for name, tensor in (("labels", labels), ("away", away), ("weight", weight)):
        expect(name, tensor, logits.shape[:1])
    labels, away = labels.contiguous(), away.contiguous()
    if weight is None:
        return run("token_loss_", backend, (logits, labels, away, None, threshold))
    return run("token_loss_", backend, (logits, labels, away, weight.contiguous(), threshold), written=(logits,))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, away: Tensor, threshold: float, inplace: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = (threshold, inplace, backend)
        weight = torch.ones(labels.shape, device=logits.device) if inplace else None
        buffer = logits.detach()
        losses, hits = token_loss_(buffer, labels, away, weight, threshold, backend=backend)
        ctx.save_for_backward(buffer, labels, away)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold, inplace, backend = ctx.settings
        buffer, labels, away = ctx.saved_tensors
        grad = buffer if inplace else buffer.clone()
        if inplace:
            grad.mul_(grads[0][:, None])
        else:
            token_loss_(grad, labels, away, grads[0].contiguous(), threshold, backend=backend)
        return grad, None, None, None, None, None


def token_loss(
    logits: Tensor,
    labels: Tensor,
    away: Tensor,
    threshold: float = THRESHOLD,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`token_loss_` with a gradient: losses [N] float32 that can be summed, weighted and differentiated once.

    Args:
        logits: [N, V], any float dtype.
        labels, away, threshold, backend: as in `token_loss_`.
        inplace: keep the gradient in the memory of `logits`, whose values are lost, so that no second [N, V] is
            ever held. The backward may then run once.

    Returns:
        losses [N] float32 and hits [N] bool, as `token_loss_`.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown.

    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> losses, hits = token_loss(logits, torch.tensor([2]), torch.tensor([True]))
    >>> torch.autograd.grad(losses.sum(), logits)[0].tolist()
    [[-0.0833..., -0.0833..., 0.25, -0.0833...]]
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return token_loss_(logits, labels, away, None, threshold, backend=backend)
    return _TokenLoss.apply(logits, labels, away, threshold, inplace, backend)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, away: Tensor,
        threshold: float, rows: int, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses, hits = [], []
        for part in range(0, max(hidden.shape[0], 1), rows):
            span = slice(part, part + rows)
            logits = torch.nn.functional.linear(hidden[span], weight, bias)
            ones = None if grad_hidden is None else torch.ones(logits.shape[0], device=logits.device)
            loss, hit = token_loss_(logits, labels[span], away[span], ones, threshold, backend=backend)
            losses.append(loss)
            hits.append(hit)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[span])
            del logits  # or two chunks would stand while the next one is made
        ctx.save_for_backward(grad_hidden)
        hit_rows = torch.cat(hits)
        ctx.mark_non_differentiable(hit_rows)
        return torch.cat(losses), hit_rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        grad = grad_hidden * grads[0][:, None].to(grad_hidden.dtype)
        return grad, None, None, None, None, None, None, None


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    away: Tensor,
    threshold: float = THRESHOLD,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Token losses straight from the hidden states of a frozen LM head; [N, V] is never held, only chunks of it.

    A row's gradient is linear in the gradient of its loss, so one sweep in the forward pass is enough for any
    objective on the losses.

    Args:
        hidden: [N, H], any float dtype; computed in that of `weight`.
        weight: [V, H], frozen.
        labels, away, threshold, backend: as in `token_loss_`.
        bias: [V] or None.
        chunk_rows: rows of logits held at once; by default as many as fit 2^25 elements.

    Returns:
        losses [N] float32 and hits [N] bool.

    Raises:
        ValueError: the head wants a gradient (use `token_loss` on its logits), or shapes do not fit.

    >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.eye(4, 3)
    >>> linear_token_loss(hidden, head, torch.tensor([0, 1]), torch.tensor([False, True]))[0].tolist()
    [1.386..., 0.287...]
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the head's weight or bias requires a gradient; linear_token_loss is for a frozen head")
    expect("weight", weight, (-1, -1))
    expect("hidden", hidden, (-1, weight.shape[1]))
    for name, tensor in (("labels", labels), ("away", away)):
        expect(name, tensor, hidden.shape[:1])
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // weight.shape[0])
    with no_autocast(hidden.device):  # its products are written into tensors of a known dtype
        return _LinearTokenLoss.apply(hidden.to(weight.dtype), weight, bias, labels, away, threshold, rows, backend)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on a device that has it (meta has none)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
