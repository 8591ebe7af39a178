"""Frozen layers in fewer passes: LoRA as its matrix products alone, float32 RMS norms in five passes, not twelve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facts import NotYet, hooks_everywhere, hooks_on, remembered
from .hooks import forwards
from .walk import modules_of


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """Within it, peft's plain LoRA layers over `nn.Linear` and float32 RMS norms run lean while they are frozen.

    The same numbers up to rounding. Whatever is not exactly such a layer when it is called (other dtypes, several
    adapters, DoRA, hooks on its parts, sharded or quantised weights) runs as it is. So does a model that is compiled,
    and every model while there are hooks on all modules.
    """
    modules = modules_of(model)
    # compiled code guards on a module's forward, and would be compiled again at every attack
    as_it_is = hooks_everywhere() or any(map(is_compiled, modules))
    lean = [(m, f) for m in modules if "forward" not in m.__dict__ and (f := _lean_forward(m)) is not None]
    with forwards(() if as_it_is else lean):
        yield


def is_compiled(module: nn.Module) -> bool:
    """By `torch.compile` of the module, its `compile`, or `torch.compile` of its forward."""
    own = module.__dict__.get("forward")
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return True
    return hasattr(own, "_torchdynamo_orig_callable")


def _lean_forward(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        return partial(_lora_forward, module, module.forward)
    eps = _norm_eps(module)
    if eps is not None and (offset := norm_offset(module, eps)) is not None:
        return partial(_norm_forward, module, module.forward, offset, eps)
    return None


# ---- LoRA ----------------------------------------------------------------------------------------------------------


class _FrozenLora(torch.autograd.Function):
    """x [T, H] -> x W^T + bias + scaling (x A^T) B^T, differentiated by x alone; the products take the sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(weight, a, b)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(x @ a.t(), b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b = ctx.saved_tensors
        (grad,) = grads
        return (grad @ weight).addmm_(grad @ b, a, alpha=ctx.scaling), None, None, None, None, None


def _lora_parts(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
    """(W, bias, A, B, scaling) where `layer` is these and no more at the moment; None otherwise."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[active[0]], layer.lora_B[active[0]]
    if not all(_untouched(m) for m in (base, down, up)):
        return None
    if down.bias is not None or up.bias is not None or layer.lora_dropout[active[0]].training:
        return None
    weights = base.weight, down.weight, up.weight
    if any(type(w) is not nn.Parameter or w.requires_grad or w.dtype != base.weight.dtype for w in weights):
        return None
    return base.weight, base.bias, down.weight, up.weight, layer.scaling[active[0]]


def _untouched(module: nn.Module) -> bool:
    """An `nn.Linear` that does what its class says: accelerate's offloading, for one, exchanges the forward of one."""
    return type(module) is nn.Linear and not hooks_on(module) and "forward" not in module.__dict__


def _lora_forward(layer: nn.Module, own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    parts = None if args or kwargs or autocast else _lora_parts(layer)
    if parts is None or (x.dtype, x.device) != (parts[0].dtype, parts[0].device):
        return own(x, *args, **kwargs)
    out: Tensor = _FrozenLora.apply(x.reshape(-1, x.shape[-1]), *parts)
    return out.view(*x.shape[:-1], out.shape[-1])  # not -1: an expert may get no token


# ---- RMS norms -----------------------------------------------------------------------------------------------------


class _FrozenNorm(torch.autograd.Function):
    """x [..., H] -> x / sqrt(mean(x^2) + eps) * weight, differentiated by x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        scaled = grads[0] * weight
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse**3).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, along), None, None


def _norm_eps(module: nn.Module) -> float | None:
    """The epsilon of what may be an RMS norm: one vector of float32 weights and one small number; None elsewhere."""
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.dtype != torch.float32 or weight.is_meta:
        return None
    found = [module.__dict__[name] for name in ("variance_epsilon", "eps") if name in module.__dict__]
    return found[0] if len(found) == 1 and isinstance(found[0], float) else None


def norm_offset(module: nn.Module, eps: float) -> float | None:
    """What an RMS norm adds to its weight before it multiplies by it, 0 or 1; None for what is no RMS norm.

    Found out by trying, once a module.

    Args:
        module: has one vector of weights.
    """
    key = type(module), eps, module._parameters["weight"].dtype  # type: ignore[union-attr]
    return remembered(module, "norm's offset", key, partial(_tried_offset, module, eps))


@torch.no_grad()
def _tried_offset(module: nn.Module, eps: float) -> float | None:
    weight: Any = module.weight.detach()  # type: ignore[operator]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    x = torch.linspace(-1, 2, 2 * weight.shape[0], device=weight.device).view(2, -1)
    x = torch.cat([x, x * eps**0.5]).to(weight.dtype)  # among these its epsilon shows
    unit = x.to(wide.dtype) * torch.rsqrt(x.to(wide.dtype).square().mean(-1, keepdim=True) + eps)
    try:
        given = type(module).forward(module, x).to(wide.dtype)
        fits = [torch.allclose(given, unit * (wide + n), 8 * torch.finfo(weight.dtype).eps, 1e-6) for n in (0, 1)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever it is, it is not called with hidden states alone
        return None
    if not bool(given.any()):  # with zero weights, nothing is known about others
        raise NotYet(None)
    return None if fits[0] == fits[1] else float(fits[1])


def _norm_forward(
    norm: Any, own: Callable[..., Any], offset: float, eps: float, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or x.dtype != torch.float32 or norm.weight.requires_grad:
        return own(x, *args, **kwargs)
    return _FrozenNorm.apply(x, norm.weight + offset if offset else norm.weight, eps)
