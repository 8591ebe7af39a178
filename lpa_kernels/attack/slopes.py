"""Do the gradients of a model belong to its losses? Quantised layers and adapters have given others, without a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.facts import NotYet, hooks_everywhere, hooks_on, is_ours, say_once
from ..model.hooks import hooked
from ..model.perturbation import gradients, grid_rows, kept_for_recompute, perturbed
from ..model.sharding import is_sharded
from ..model.sites import Site
from ..model.walk import modules_of
from ..ops import token_loss
from .batch import PairBatch
from .passes import Texts, text_logits, text_rows, texts
from .verdicts import ROUNDINGS, agreed, is_half, rounded_embeddings

_STEPS = (1e-2, 1e-3, 1e-4, 0.1, 1.0)  # changes of a loss to aim at, in nats
_HALF_STEPS = (0.3, 1.0, 3.0)
_SMOOTH = 0.02
_LAYER = 1e-3  # of a layer's slope, whose step is not bound to what a loss stands
_TURNED = 0.05  # of the gradients, by one rounding: from here on rounding may be what is off


def wrong_gradients(
    model: nn.Module, sites: Sequence[Site], widths: Sequence[tuple[int, torch.device]], batch: PairBatch, backend: str,
    few: bool = False,
) -> str:  # fmt: skip
    """Why the model's backward pass does not belong to its forward pass; "" where it does.

    Every site of one text is moved along its own gradient, all by one length, and a central finite difference of the
    loss is compared with the sum of the gradients' norms. Where losses are smooth, which two sizes that agree show, it
    must be the same within 2%. Elsewhere (half precision, quantised activations) within a factor of two at one of
    several sizes: a small step may vanish in rounding, a large one may turn a router. Where it is not, the gradients
    are taken once more with rounded embeddings: what rounding turns so far is no fault, and is said once. A site
    without any gradient must not move the loss. To be called in the mode that the attack runs the model in.

    Args:
        widths: width and device of each site. backend: of the op that perturbs.
        few: the head is run on the rows that matter alone, as engines of one pass do; all logits take memory.

    Raises:
        NotYet: no text has both a label and an attacked position.
    """
    tried = [one for one in texts(batch, alone=True) if one.mask[:, 1:].any() and (_grid(batch, one) >= 0).any()]
    if agreed(model, not tried):
        raise NotYet("")
    text = max(tried, key=lambda one: one.ids.shape[1])
    grid, labels = _grid(batch, text), text.ids[:, 1:][text.mask[:, 1:]]
    grid = torch.where(grid >= 0, (grid >= 0).long().cumsum(1) - 1, -1)
    rows = int(grid.max()) + 1

    def loss(deltas: Sequence[Tensor]) -> Tensor:
        with kept_for_recompute(model, lambda: perturbed(sites, deltas, grid_rows(grid), backend=backend)):
            logits = (text_rows if few else text_logits)(model, text.ids, text.mask)
        toward = torch.zeros_like(labels, dtype=torch.bool)
        return token_loss(logits, labels, toward, backend="reference")[0].double().mean()

    leaves = [torch.zeros(rows, width, device=device, requires_grad=True) for width, device in widths]
    name, half, sharded = type(model).__name__, is_half(model), is_sharded(model)
    unusual = _unusual(model)
    try:
        with torch.enable_grad(), _calls({} if sharded else unusual) as calls:
            grads = gradients(start := loss(leaves), leaves)
        for kind, call in calls.items():
            if fault := _wrong_layer(call):
                return f"the gradients of {name} are not those of its losses: {kind} {fault}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{name} cannot be differentiated as an attack runs it: {type(error).__name__}: {error}"
    norms = [float(grad.double().norm()) for grad in grads]
    total = sum(norms)
    if agreed(model, not math.isfinite(total) or (sharded and not total)):
        return ""  # the attack itself counts losses that are not finite
    # who has hooks on backward passes wants other gradients than those of the losses
    strict = not half and not any(m._backward_hooks or m._backward_pre_hooks for m in modules_of(model))
    kinds = ", ".join(sorted(unusual)) or "a hook or an autograd.Function of its own"

    @torch.no_grad()
    def moved(*lengths: float) -> float:
        """The loss with each site that far along its gradient, or in some direction where it has none."""
        units = [g / n if n else torch.ones_like(g) / g.shape[1] ** 0.5 for g, n in zip(grads, norms, strict=True)]
        return float(loss([unit * length for unit, length in zip(units, lengths, strict=True)]))

    silent = [] if sharded else [i for i, norm in enumerate(norms) if not norm]  # sharded, ranks make the same passes
    for i in silent:
        if abs(moved(*(float(i == k) for k in range(len(norms)))) - float(start.detach())) > (0.1 if half else 1e-4):
            return (
                f"{name} passes no gradient on to {sites[i].name!r}, though its losses depend on it; what may be the "
                f"cause: {kinds}"
            )
    if not total:
        return ""
    ratios: list[float] = []
    for nats in _HALF_STEPS if half else _STEPS:
        step = nats / (2 * total)
        along = [step if norm else 0.0 for norm in norms]
        ratios.append((moved(*along) - moved(*(-length for length in along))) / (2 * step * total))
        if not sharded and _agree(ratios, strict) is not None:
            break
    right = _agree(ratios, strict)
    if not agreed(model, right is not True):
        return ""
    with torch.enable_grad(), rounded_embeddings(model):
        again = gradients(loss(leaves), leaves)
    turned = abs(
        1 - sum(float((g.double() * a).sum()) / n for g, a, n in zip(grads, again, norms, strict=True) if n) / total
    )
    off = min(abs(ratio - 1) for ratio in ratios)
    if right is None and turned > _TURNED and off <= 0.5 + ROUNDINGS * turned:
        say_once(
            model,
            f"one rounding of its embeddings turns the gradients of {name} by {turned:.0%}, so its attacks follow "
            f"rounding as well as losses{'; load it in float32' if half else ''}",
        )
        right = True
    if right:
        return ""
    slopes = (
        f"along the gradient the loss of a text rises by {total:.2g} a unit by autograd and by "
        f"{total * min(ratios, key=lambda r: abs(r - 1)):.2g} by finite differences"
    )
    if not unusual and _untouched(model):
        say_once(model, f"{name} passes on a part of its gradients by its own code, which attacks follow: {slopes}")
        return ""
    return f"the gradients of {name} are not those of its losses: {slopes}; what may be the cause: {kinds}"


def _grid(batch: PairBatch, text: Texts) -> Tensor:
    """The rows of the perturbation at the tokens of a text, [1, L] int64, -1 = none."""
    return batch.grid[text.rows, : text.ids.shape[1]]


def _agree(ratios: list[float], strict: bool) -> bool | None:
    """Whether slopes by finite differences, as shares of autograd's, are the same; None where more are to be taken."""
    if strict:
        smooth = ratios[:2]
        if any(abs(ratio - 1) <= _SMOOTH for ratio in smooth):
            return True
        if len(smooth) == 2 and abs(smooth[0] - smooth[1]) <= _SMOOTH * max(map(abs, smooth)):
            return False
        if len(ratios) <= 2:
            return None
    return True if any(0.5 <= ratio <= 2 for ratio in ratios) else None


def _known(kind: type, *parts: str) -> bool:
    """Whether a class of modules is torch's, transformers' own (not its quantisers') or of `parts`."""
    return kind.__module__.startswith(("torch.", "transformers.", *parts)) and ".integrations." not in kind.__module__


def _untouched(model: nn.Module) -> bool:
    """Whether nothing but the libraries' own code runs in it: what cuts gradients off there does so by design."""
    modules = modules_of(model)
    return (
        not hooks_everywhere()
        and not any(map(hooks_on, modules))
        and all(_known(type(module), "peft.") for module in modules)
        and all("forward" not in module.__dict__ or is_ours(module.__dict__["forward"]) for module in modules)
    )


def _unusual(model: nn.Module) -> dict[str, nn.Module]:
    """By its kind, the first module with weights whose code is neither a known class's nor peft's LoRA's."""
    return {
        kind: module
        for module in reversed(modules_of(model))
        if module._parameters or isinstance(getattr(module, "adapter_layer_names", None), tuple)
        if (kind := _unusual_kind(module))
    }


def _unusual_kind(module: nn.Module) -> str:
    """What of a module is neither known nor peft's LoRA: its class, that of its weights, its forward; "" for none.

    Quantised, a torch.nn.Linear keeps its class: torchao 0.18 gives it a weight of another one, compressed-tensors 0.20
    another forward. Neither passes on gradients to its inputs where these are quantised too.
    """
    name = f"{type(module).__module__}.{type(module).__name__}"
    if not _known(type(module), "peft.tuners.lora.layer"):
        return name
    for kind in {type(p) for p in module._parameters.values() if p is not None}:
        if not (kind is Tensor or _known(kind)):
            return f"{name} with weights of {kind.__module__}.{kind.__name__}"
    forward = module.__dict__.get("forward")
    return "" if forward is None or is_ours(forward) else f"{name} with another forward"


@contextmanager
def _calls(modules: dict[str, nn.Module]) -> Iterator[dict[str, Callable[[Tensor | None], Any]]]:
    """What the modules are called with within it: by name, a function of another first argument, None for its own."""
    found: dict[str, Callable[[Tensor | None], Any]] = {}

    def keep(kind: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            first = args[0].detach()
            found[kind] = lambda x: first if x is None else module(x, *args[1:], **kwargs)

    with hooked(before=((module, partial(keep, kind)) for kind, module in modules.items()), with_kwargs=True):
        yield found


def _wrong_layer(call: Callable[[Tensor | None], Any]) -> str:
    """Why a layer's backward pass does not belong to its forward pass; "" where it does, or where nothing can be seen.

    Along a random direction the error of a gradient is as large a share of the slope as of the gradient, and of one
    layer alone a step can be as large as the input. Each size of a step is taken four times: a spread is rounding.
    """
    x, draw = call(None), torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return ""
        onto = torch.randn(out.shape, generator=draw).to(out.device)
        # an output that is a constant to autograd is at fault as soon as the input moves it
        grad = torch.autograd.grad((out.float() * onto).sum(), leaf)[0] if out.requires_grad else torch.zeros_like(leaf)
    size = float(x.float().square().mean().sqrt())
    along = torch.randn(x.shape, generator=draw).to(x.device) * size
    slope, scale = float((grad.double() * along).sum()), float(grad.double().norm()) * size

    @torch.no_grad()
    def difference(step: float) -> float:
        up, down = (call((x.float() + sign * step * along).to(x.dtype)) for sign in (1, -1))
        return float(((up.double() - down.double()) * onto).sum()) / (2 * step)

    for step in (0.01, 0.1, 1.0):
        found = [difference(step * share) for share in (1.0, 0.8, 0.6, 0.4)]
        off = abs(sum(found) / len(found) - slope)
        spread = max(found) - min(found)
        if off <= _LAYER * scale:
            return ""
        if 0 < 4 * spread < off:
            return (
                f"passes on other gradients than its own: along a direction what it gives rises by "
                f"{sum(found) / len(found):.3g} by finite differences and by {slope:.3g} by autograd"
            )
    return ""
