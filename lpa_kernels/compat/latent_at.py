"""Drop-in for aengusl/latent-adversarial-training: its inner loop, with its signature and return values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..attack import LatentPGD, PairBatch
from ..model import Site, in_block, language_model, say_once, unwrapped
from .latent_at_hooks import CustomHook, GDAdversary, clear_hooks, install, make_room
from .patch import Patch, find_in, foreign_module, imports, same_parameters

NAMES = ("projected_gradient_descent", "clear_hooks", "GDAdversary")  # what `patch_latent_at` replaces
HOME = "lat_methods"  # their submodule, for forks whose package imports nothing by itself
ACCUMULATION = ("each", "upstream")


def _labels(batch: Mapping[str, Any], side: str) -> Tensor | None:
    value = batch.get(f"{side}_labels")
    if isinstance(value, (list, tuple)):
        flat = [label for row in value for label in (row if isinstance(row, (list, tuple)) else [row])]
        return torch.tensor(flat)
    return value


def pair_batch(
    batch: Mapping[str, Any], coefs: Mapping[str, float], add_completions_pgd: bool, device: Any
) -> PairBatch:
    """A batch of the public code as a `PairBatch`: adv is the completion that the adversary goes toward.

    Args:
        batch: see `fused_latent_pgd`.
        coefs: the terms that are computed. The batch may lack the keys that none of them needs.
        add_completions_pgd: attack the completions too.
        device: where the result goes.

    Raises:
        KeyError: the batch lacks a key; the message lists the keys that it has.
    """
    preference = "dpo" in coefs
    wanted = {"adv": preference or "toward" in coefs, "def": preference or "away" in coefs}
    needed = [f"{side}_{what}" for side, want in wanted.items() if want for what in ("tokens", "labels_mask")]
    if add_completions_pgd:
        needed += ["prompt_mask", "adv_labels_mask", "def_labels_mask"]
    elif "prompt_mask" not in batch:
        needed.append("adv_labels_mask")
    for key in needed:
        if key not in batch:
            raise KeyError(f"the batch has no {key!r}; its keys are {sorted(batch)}")
    masks = {k: batch[k].bool() for k in ("prompt_mask", "adv_labels_mask", "def_labels_mask") if k in batch}
    attack_mask = masks.get("prompt_mask", masks.get("adv_labels_mask"))
    if add_completions_pgd:
        attack_mask = masks["prompt_mask"] | masks["adv_labels_mask"] | masks["def_labels_mask"]
    assert attack_mask is not None

    def half(side: str, other: str) -> tuple[Tensor, Tensor, Tensor | None]:
        if not wanted[side]:
            tokens = batch[f"{other}_tokens"]
            return tokens, torch.zeros_like(tokens, dtype=torch.bool), None
        # as there: a preference loss scores the tokens themselves
        return batch[f"{side}_tokens"], masks[f"{side}_labels_mask"], None if preference else _labels(batch, side)

    rejected, chosen = half("adv", "def"), half("def", "adv")
    return PairBatch(*rejected[:2], *chosen[:2], attack_mask, rejected[2], chosen[2]).to(device)


def _counts(pairs: PairBatch) -> tuple[int, int] | None:
    """How many rejected and chosen labels count (are not -100): the public means divide by it. None where all do."""
    if pairs.rejected_labels is None and pairs.chosen_labels is None:
        return None
    return int((pairs.labels("rejected") != -100).sum()), int((pairs.labels("chosen") != -100).sum())


def lat_sites(model: nn.Module, model_layers_module: str, layer: int | str | Sequence[int | str]) -> list[Site]:
    """The sites in the order of the public code: the numbered layers' feed-forward modules, then the embedding.

    Raises:
        ValueError: the model has no model_layers_module, or no such layer in it.
    """
    layers = [layer] if isinstance(layer, (int, str)) else list(layer)
    inner: Any = language_model(model)
    sites = []
    for index in (x for x in layers if isinstance(x, int)):
        try:
            block = model.get_submodule(f"{model_layers_module}.{index}")
        except AttributeError as error:
            raise ValueError(
                f"model_layers_module={model_layers_module!r} has no layer {index} in {type(model).__name__}: {error}"
            ) from error
        sites.append(Site(f"mlp:{index}", in_block(block, index, "mlp"), index))
    if "embedding" in layers:
        sites.append(Site("embedding", unwrapped(inner.get_input_embeddings()), None))
    if not sites or len(sites) != len(layers):
        raise ValueError(f"layer={layer!r} is unknown; use layer numbers and at most one 'embedding'")
    return sites


def _coefs(loss_coefs: Mapping[str, float]) -> dict[str, float]:
    if "dpo" in loss_coefs:  # as there: a preference loss stands alone
        return {"dpo": loss_coefs["dpo"]}
    return {k: v for k, v in loss_coefs.items() if k in ("toward", "away") and v > 0}


def _autocast(value: torch.dtype | str | None, device: Any) -> torch.dtype | None:
    """The dtype of the inner loop's autocast. "public" stands for that of `torch.autocast("cuda")` on CUDA, else None.

    Raises:
        ValueError: a string other than "public".
    """
    if value == "public":
        return torch.get_autocast_dtype("cuda") if torch.device(device).type == "cuda" else None
    if isinstance(value, str):
        raise ValueError(f"autocast={value!r} is unknown; use a torch.dtype, 'public' or None")
    return value


def _logged(step: Mapping[str, float], log_loss: bool | None) -> dict[str, float]:
    names = ("toward", "away", "dpo", "total", "l2_norm") if log_loss else ("l2_norm",)
    return {f"adv_{k}": v for k, v in step.items() if k in names}


def fused_latent_pgd(
    batch: Mapping[str, Any],
    model: nn.Module,
    model_layers_module: str,
    layer: int | str | Sequence[int | str],
    epsilon: float,
    learning_rate: float,
    pgd_iterations: int,
    loss_coefs: Mapping[str, float],
    l2_regularization: float = 0,
    device: Any = "cuda",
    log_loss: bool | None = True,
    return_loss_over_time: bool | None = False,
    clip_grad: float | None = None,
    accelerator: Any = None,
    add_completions_pgd: bool | None = False,
    *,
    engine: str = "auto",
    backend: str = "auto",
    merge_adapters: bool = False,
    capture_graph: bool | str = "auto",
    autocast: torch.dtype | str | None = None,
    accumulation: str = "each",
) -> tuple[dict[str, float] | list[dict[str, float]], list[CustomHook]]:
    """`projected_gradient_descent` of latent-adversarial-training (arXiv 2407.15549): same call, same results.

    The differences: the width and the embedding are read from the model. NaN gradients and `clip_grad` are treated
    over all sites jointly; the public code treats the last alone. The model runs in eval mode. An earlier attack that
    is disabled (`wrapper.enabled = False`) stays usable, so that with gradient accumulation every micro-batch keeps
    its own. The perturbations are forward hooks, so that no module of the model changes its name.

    Args:
        batch: adv_tokens, def_tokens [B, S] int64 and adv_labels_mask, def_labels_mask [B, S] bool; optionally
            prompt_mask [B, S] bool (without it the attack mask is adv_labels_mask) and explicit adv_labels,
            def_labels (lists or tensors of int64, -100 ignored).
        model: of transformers or PEFT, possibly under DistributedDataParallel.
        model_layers_module: the name of the list of blocks, such as "model.layers".
        layer: layer numbers (their feed-forward modules) and/or "embedding".
        epsilon, learning_rate, pgd_iterations: radius, step size and number of inner steps.
        loss_coefs: weights of "toward" and "away", or of "dpo".
        l2_regularization: weight of the penalty on the perturbations' norms.
        device: where the batch goes; `accelerator.device` where an accelerator is given, and the model's device in
            place of "cuda" where torch has no CUDA.
        log_loss: whether the returned losses hold all terms, or the penalty alone.
        return_loss_over_time: return the losses of every step.
        clip_grad: clip the perturbations' gradients to this norm, jointly.
        accelerator: an `accelerate.Accelerator`; its gradient accumulation scales the losses, as there.
        add_completions_pgd: attack the completions too.
        engine, backend, merge_adapters, capture_graph: as in `LatentPGD`.
        autocast: a dtype to run the inner loop under, or "public" for the public code's (on CUDA,
            `torch.autocast("cuda")`: float16 unless set otherwise); by default none.
        accumulation: "each" lets every micro-batch keep its attack; "upstream" takes earlier attacks off the model
            even if they are disabled, as the public code does.

    Returns:
        (losses, wrappers): the last step's losses ("adv_toward", "adv_away", "adv_total", "adv_l2_norm"), or with
        return_loss_over_time a list of every step's; and one `CustomHook` a site, in force on the model for as long as
        it is kept.

    Raises:
        KeyError: the batch lacks a key.
        ValueError: an unknown or impossible setting.
        FloatingPointError: the losses are not finite.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> at = torch.arange(4)[None]
    >>> batch = {"adv_tokens": at, "def_tokens": at.flip(1), "adv_labels_mask": at > 2, "def_labels_mask": at > 2}
    >>> losses, wrappers = fused_latent_pgd(batch | {"prompt_mask": at < 1}, LlamaForCausalLM(LlamaConfig(**size)),
    ...     "model.layers", ["embedding", 0], 6.0, 1e-1, 2, {"toward": 0.5, "away": 0.5})
    >>> sorted(losses), wrappers[0].hook_fn.attack.shape
    (['adv_away', 'adv_total', 'adv_toward'], torch.Size([1, 4, 8]))
    """
    if accumulation not in ACCUMULATION:
        raise ValueError(f"accumulation={accumulation!r} is unknown; use one of {', '.join(ACCUMULATION)}")
    inner: Any = language_model(model)
    _warn_of_the_callers_own(sys._getframe(1).f_globals, inner)
    coefs, scale = _coefs(loss_coefs), 1.0
    if accelerator is not None:
        device = accelerator.device
        if "dpo" not in coefs:  # as there: a preference loss goes past the accelerator, whose backward divides
            scale = 1 / (getattr(accelerator, "gradient_accumulation_steps", None) or 1)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        device = unwrapped(inner.get_input_embeddings()).weight.device
    if clip_grad is not None:
        say_once(
            inner, "clip_grad clips the gradients of all perturbations jointly; the public code clips the last alone"
        )
    make_room(inner, accumulation)
    pgd = LatentPGD(
        inner,
        lat_sites(model, model_layers_module, layer),
        epsilon=epsilon,
        step_size=learning_rate,
        steps=pgd_iterations,
        coefs={name: value * scale for name, value in coefs.items()},
        l2_penalty=float(l2_regularization),
        clip_grad=clip_grad,
        engine=engine,
        backend=backend,
        merge_adapters=merge_adapters,
        capture_graph=capture_graph,
        autocast=_autocast(autocast, device),
        nonfinite="zero",  # as in the public code
    )
    pairs = pair_batch(batch, coefs, bool(add_completions_pgd), device)
    attack = pgd.attack(pairs, _counts(pairs))
    wrappers = install(inner, attack, epsilon)
    history = [_logged(step, log_loss) for step in attack.losses] if log_loss or l2_regularization else []
    history = history or [{} for _ in range(pgd_iterations)]
    return (history if return_loss_over_time else history[-1]), wrappers


def _warn_of_the_callers_own(names: Mapping[str, Any], model: nn.Module) -> None:
    """Warn, once a model, of a `clear_hooks` that is not ours among the global names of the calling module."""
    theirs = names.get("clear_hooks")
    if callable(theirs) and not getattr(theirs, "__module__", "").startswith("lpa_kernels"):
        say_once(
            model,
            f"{names.get('__name__')}.clear_hooks does not know the hooks of fused_latent_pgd, which leave the model "
            "when the returned wrappers are dropped, or at the next attack. To clear them at once: "
            "`from lpa_kernels import clear_hooks`, or use lpa_kernels.patch_latent_at()",
        )


def patch_latent_at(package_or_module: str | ModuleType | None = None, **options: Any) -> Patch:
    """Let the public trainer, unmodified, use `fused_latent_pgd`: replace the functions that it calls.

    Args:
        package_or_module: the package or module that defines `projected_gradient_descent` and `clear_hooks`, itself
            or its name; "latent_at" by default.
        options: keyword-only arguments of `fused_latent_pgd` for every call (`engine`, `autocast`, `accumulation`...).

    Returns:
        A handle. Its `.undo()` puts everything back and takes the attacks made meanwhile off their models. As a
        context manager it does so at the end, also after an exception.

    Raises (and changes nothing):
        ImportError: no such package.
        TypeError: neither a name nor a module, or an unknown option.
        ValueError: it lacks the functions, or their parameters are unknown.
        RuntimeError: it is patched already.

    >>> with patch_latent_at(engine="reference") as patch:  # doctest: +SKIP
    ...     trainer.train()
    """
    known = [p.name for p in inspect.signature(fused_latent_pgd).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(f"patch_latent_at() has no option {name!r}; the options are {', '.join(known)}")
    module = foreign_module("latent_at" if package_or_module is None else package_or_module)
    found = find_in(module, NAMES)
    if not found[NAMES[0]] and imports(module, HOME):
        found = find_in(module, NAMES)
    for name in NAMES[:2]:
        if not found[name]:
            raise ValueError(f"{module.__name__} has no {name}; expected latent-adversarial-training or a fork of it")
    ours = (fused_latent_pgd, clear_hooks, GDAdversary)
    if any(value in ours or hasattr(value, "_lpa_patch") for values in found.values() for value in values):
        raise RuntimeError(f"{module.__name__} is patched already; call .undo() of the first patch before another one")
    for theirs in found["clear_hooks"]:
        same_parameters("clear_hooks", theirs, clear_hooks)
    for theirs in found["GDAdversary"]:
        same_parameters("GDAdversary", theirs, GDAdversary)
    attacks: WeakSet[CustomHook] = WeakSet()
    pairs: list[tuple[Any, Any]] = [(theirs, GDAdversary) for theirs in found["GDAdversary"]]
    pairs += [(theirs, _replacing_clear(theirs)) for theirs in found["clear_hooks"]]
    pairs += [(theirs, _replacing_pgd(theirs, options, attacks)) for theirs in found["projected_gradient_descent"]]

    def forget() -> None:
        for hook in list(attacks):
            hook.remove()

    return Patch(module, pairs, forget)


def _replacing_pgd(theirs: Callable[..., Any], options: Mapping[str, Any], attacks: WeakSet[CustomHook]) -> Any:
    signature = same_parameters("projected_gradient_descent", theirs, fused_latent_pgd)

    def projected_gradient_descent(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # a fork may have its own
        losses, wrappers = fused_latent_pgd(**bound.arguments, **options)
        attacks.update(wrappers)
        return losses, wrappers

    projected_gradient_descent.__doc__ = fused_latent_pgd.__doc__
    projected_gradient_descent.__signature__ = signature  # type: ignore[attr-defined]
    projected_gradient_descent._lpa_patch = True  # type: ignore[attr-defined]
    return projected_gradient_descent


def _replacing_clear(theirs: Callable[[nn.Module], None]) -> Any:
    def clear(model: nn.Module) -> None:
        theirs(model)  # the hooks of others
        clear_hooks(model)

    clear.__name__ = "clear_hooks"
    clear._lpa_patch = True  # type: ignore[attr-defined]
    return clear
