"""Drop-in for aengusl/latent-adversarial-training: its inner loop, with its signature and its return values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import LatentAttack, LatentPGD, PairBatch
from ..attack.hooks import rows_by_length
from ..attack.sites import Site, hidden_of, in_block, unwrapped, with_hidden
from ..ops import perturb, project_

_HOOKS = "_lpa_latent_hooks"  # where a model keeps the hooks that are in place


class GDAdversary(nn.Module):
    """A perturbation by position, with the attributes of the public class of this name.

    Unlike there it is kept in float32, added out of place, and reads the outputs of modules that return tuples.

    Args:
        dim: width.
        epsilon: radius.
        attack_mask: [B, S] bool.
    """

    def __init__(
        self, dim: int, epsilon: float, attack_mask: Tensor, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.epsilon = epsilon
        self.attack_mask = attack_mask.bool().to(device)
        self.attack = nn.Parameter(torch.zeros(*attack_mask.shape, dim, device=device, dtype=dtype or torch.float32))

    def forward(self, output: Any) -> Any:
        """`output` with the perturbation added at the attacked positions; a single position passes untouched."""
        hidden = hidden_of(output, "the hooked module")
        size, attacked = self.attack_mask.shape
        length = hidden.numel() // hidden.shape[-1] // (hidden.shape[0] if hidden.dim() > 2 else size)
        if length == 1 and attacked != 1:  # generation with a cache: the perturbation is in the cached states
            return output
        if hidden.dim() > 2 and hidden.shape[0] != size:
            raise ValueError(
                f"the attack is on a batch of {size}; the model was called with a batch of {hidden.shape[0]}"
            )
        if self.attack.device != hidden.device:
            self.to(hidden.device)
            self.attack_mask = self.attack_mask.to(hidden.device)
            self.device = hidden.device
        cells = torch.arange(size * attacked, device=hidden.device).view(size, attacked)
        rows = rows_by_length(torch.where(self.attack_mask, cells, -1), length)
        flat = perturb(hidden.reshape(-1, hidden.shape[-1]), self.attack.flatten(0, 1), rows)
        return with_hidden(output, flat.view(hidden.shape))

    def clip_attack(self) -> None:
        """Bring every position's perturbation back inside the ball."""
        project_(self.attack.data, self.epsilon)


class CustomHook:
    """One perturbed module: `.module`, `.hook_fn` (its `GDAdversary`), and `.enabled`, which may be toggled."""

    def __init__(self, module: nn.Module, hook_fn: nn.Module) -> None:
        self.module = module
        self.hook_fn = hook_fn
        self.enabled = True
        self._handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.hook_fn(output) if self.enabled else output

    def remove(self) -> None:
        """Take the hook off its module for good."""
        self._handle.remove()


def clear_hooks(model: nn.Module) -> None:
    """Take every hook of `fused_latent_pgd` off the model, enabled or not."""
    for hook in model.__dict__.pop(_HOOKS, []):
        hook.remove()


def _remove_enabled(model: nn.Module) -> None:
    """A new attack takes the place of those in force; disabled ones stay, so that every micro-batch keeps its own."""
    hooks: list[CustomHook] = model.__dict__.setdefault(_HOOKS, [])
    for hook in hooks:
        if hook.enabled:
            hook.remove()
    hooks[:] = [hook for hook in hooks if not hook.enabled]


def _labels(batch: Mapping[str, Any], key: str) -> Tensor | None:
    value = batch.get(key)
    if isinstance(value, list):
        flat = [label for row in value for label in (row if isinstance(row, (list, tuple)) else [row])]
        return torch.tensor(flat)
    return value


def pair_batch(batch: Mapping[str, Any], add_completions_pgd: bool, device: Any) -> PairBatch:
    """A batch of the public code as a `PairBatch`: adv is what the adversary goes toward, def what it avoids.

    Raises:
        KeyError: adv_tokens or adv_labels_mask (or, with add_completions_pgd, prompt_mask) is missing.
    """
    needed = ["adv_tokens", "adv_labels_mask"] + (["prompt_mask", "def_labels_mask"] if add_completions_pgd else [])
    for key in needed:
        if key not in batch:
            raise KeyError(f"the batch has no {key!r}; its keys are {sorted(batch)}")
    rejected_mask = batch["adv_labels_mask"].bool()
    chosen_ids = batch.get("def_tokens", batch["adv_tokens"])
    chosen_mask = batch["def_labels_mask"].bool() if "def_tokens" in batch else torch.zeros_like(rejected_mask)
    attack_mask = batch["prompt_mask"].bool() if "prompt_mask" in batch else rejected_mask
    if add_completions_pgd:
        attack_mask = attack_mask | rejected_mask | chosen_mask
    return PairBatch(
        batch["adv_tokens"],
        rejected_mask,
        chosen_ids,
        chosen_mask,
        attack_mask,
        _labels(batch, "adv_labels"),
        _labels(batch, "def_labels") if "def_tokens" in batch else None,
    ).to(device)


def lat_sites(model: nn.Module, model_layers_module: str, layer: int | str | Sequence[int | str]) -> list[Site]:
    """The sites in the order of the public code: the integer layers' feed-forward modules, then the embedding.

    Raises:
        ValueError: model_layers_module is not in the model, or a layer is out of range.
    """
    layers = [layer] if isinstance(layer, (int, str)) else list(layer)
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
        sites.append(Site("embedding", unwrapped(model.get_input_embeddings()), None))  # type: ignore[operator]
    if not sites or len(sites) != len(layers):
        raise ValueError(f"layer={layer!r} must hold layer numbers and at most one 'embedding'")
    return sites


def _coefs(loss_coefs: Mapping[str, float]) -> dict[str, float]:
    if "dpo" in loss_coefs:  # as there: a preference loss stands alone
        return {"dpo": loss_coefs["dpo"]}
    return {k: v for k, v in loss_coefs.items() if k in ("toward", "away") and v > 0}


def install(model: nn.Module, attack: LatentAttack, epsilon: float) -> list[CustomHook]:
    """Put an attack in force on the model, one `CustomHook` a site, until `clear_hooks` or the next attack."""
    wrappers = []
    for site in attack.sites:
        delta = attack.delta(site.name)
        adversary = GDAdversary(delta.shape[-1], epsilon, attack.grid >= 0, device=delta.device)
        adversary.attack.data = delta
        wrappers.append(CustomHook(site.module, adversary))
    model.__dict__.setdefault(_HOOKS, []).extend(wrappers)
    return wrappers


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
    autocast: torch.dtype | None = None,
) -> tuple[dict[str, float] | list[dict[str, float]], list[CustomHook]]:
    """`projected_gradient_descent` of latent-adversarial-training (arXiv 2407.15549): same call, same results.

    The differences: the width and the embedding are read from the model; NaN gradients and `clip_grad` are treated
    over all sites jointly; earlier attacks that are disabled (`wrapper.enabled = False`) stay usable, so that with
    gradient accumulation every micro-batch keeps its own.

    Args:
        batch: adv_tokens, def_tokens, adv_labels_mask, def_labels_mask [B, S], optionally prompt_mask (without it
            the attack mask is adv_labels_mask) and explicit adv_labels / def_labels.
        model_layers_module: the name of the list of blocks, such as "model.layers".
        layer: layer numbers (their feed-forward modules) and/or "embedding".
        epsilon, learning_rate, pgd_iterations: radius, step size and number of inner steps.
        loss_coefs: "toward" and "away", or "dpo".
        add_completions_pgd: attack the completions too, not only the prompt.
        engine, backend, merge_adapters, capture_graph, autocast: as in `LatentPGD`.

    Returns:
        (losses, wrappers): the last step's losses ("adv_toward", "adv_away", "adv_total", "adv_l2_norm"), or with
        return_loss_over_time those of every step; and one `CustomHook` a site, in force on the model.
    """
    if accelerator is not None:
        device = accelerator.device
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    _remove_enabled(inner)
    pgd = LatentPGD(
        inner,
        lat_sites(model, model_layers_module, layer),
        epsilon=epsilon,
        step_size=learning_rate,
        steps=pgd_iterations,
        coefs=_coefs(loss_coefs),
        l2_penalty=float(l2_regularization),
        clip_grad=clip_grad,
        engine=engine,
        backend=backend,
        merge_adapters=merge_adapters,
        capture_graph=capture_graph,
        autocast=autocast,
    )
    attack = pgd.attack(pair_batch(batch, bool(add_completions_pgd), device))
    wrappers = install(inner, attack, epsilon)
    names = ("toward", "away", "dpo", "total", "l2_norm")
    history = [{f"adv_{k}": v for k, v in step.items() if k in names} for step in attack.losses] if log_loss else [{}]
    return (history if return_loss_over_time else history[-1]), wrappers
