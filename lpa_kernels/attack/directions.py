"""Adversaries without an inner pass: a fixed direction, its ablation, and random perturbations.

Unit direction u, hidden state h of an attacked token at a site, radius epsilon:

- vector: h + epsilon u, or h + v for the direction v as it is where norm is "none". Steering (arXiv 2308.10248), and
  as an adversary of training preventative steering (persona vectors, arXiv 2507.21509, section 5).
- ablate: h - (u . h) u. The refusal direction taken out (arXiv 2406.11717, equation 4), as an adversary of training
  at random layers in ReFAT (arXiv 2409.20089), and at random tokens and layers in DeepRefusal (arXiv 2509.15202).
- random: h + epsilon r, r uniform on the sphere of the norm: the control of an attack of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.hooks import hooked
from ..model.modes import probing
from ..model.sites import Site, hidden_of, resolve_sites
from .settings import AttackSettings
from .state import AttackState

ALL_SITES = "direction"  # the name in a file of one direction for every site

Directions = Mapping[str, Tensor] | Tensor


def mean_difference(
    model: nn.Module,
    sites: str | int | Site | Sequence[str | int | Site],
    towards: Sequence[Tensor],
    away: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The difference of means of two sets of prompts at each site: mean of `towards` minus mean of `away`.

    The hidden states are those of each prompt's last token (arXiv 2406.11717, equation 1). Every prompt runs alone.

    Args:
        towards, away: token ids [L] int64 of prompts.

    Returns:
        by the site's name, [H] float32.

    Raises:
        ValueError: a set is empty, or a site is unknown.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> found = mean_difference(model, "mlp:0", [torch.tensor([1, 2])], [torch.tensor([3])])
    >>> {site: tuple(direction.shape) for site, direction in found.items()}
    {'mlp:0': (8,)}
    """
    found = resolve_sites(model, sites)
    for name, prompts in (("towards", towards), ("away", away)):
        if not len(prompts) or any(not len(ids) for ids in prompts):
            raise ValueError(f"{name} has {len(prompts)} prompts; give at least one, and none without a token")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    sums: dict[str, Tensor] = {}

    def watch(site: Site, scale: float) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            last = hidden_of(output, site.name)[..., -1, :].float().flatten() * scale
            sums[site.name] = sums.get(site.name, torch.zeros_like(last)) + last

        return hook

    with probing(model):
        for prompts, sign in ((towards, 1.0), (away, -1.0)):
            with hooked((site.module, watch(site, sign / len(prompts))) for site in found):
                for ids in prompts:
                    model(input_ids=ids[None].to(device), use_cache=False)
    return {site.name: sums[site.name] for site in found}


def read_directions(path: str | Path) -> dict[str, Tensor]:
    """Directions from a safetensors file: one tensor [H] a site, by its name, or one called "direction" for all.

    Raises:
        ValueError: no such file, or no safetensors one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read directions from {str(path)!r}: {error}; expected a .safetensors file") from error


def checked(directions: Directions | None, sites: Sequence[Site], adversary: str) -> list[Tensor]:
    """One direction a site, [H] float32.

    Raises:
        ValueError: there is none for a site, one for a site that is not attacked, or one that is no finite vector
            other than 0.
    """
    if directions is None:
        raise ValueError(f"adversary={adversary!r} needs directions, one a site; see mean_difference, read_directions")
    if isinstance(directions, Tensor):
        directions = {ALL_SITES: directions}
    names = [site.name for site in sites]
    unknown = sorted(set(directions) - {*names, ALL_SITES})
    if unknown:
        raise ValueError(f"there is a direction for {unknown[0]!r}, which is no site of the attack: {', '.join(names)}")
    found = []
    for name in names:
        direction = directions.get(name, directions.get(ALL_SITES))
        if direction is None:
            raise ValueError(f"there is no direction for site {name!r}, only for {', '.join(directions) or 'none'}")
        direction = direction.detach().float()
        if direction.dim() != 1 or not bool(direction.isfinite().all()) or not bool(direction.any()):
            raise ValueError(
                f"the direction of site {name!r} has shape {tuple(direction.shape)} and norm {direction.norm():.3g}; "
                "expected a vector [width] of finite numbers, not all 0 (as where all prompts end with the same token)"
            )
        found.append(direction)
    return found


def check_widths(directions: Sequence[Tensor], sites: Sequence[Site], widths: Sequence[tuple[int, Any]]) -> None:
    """Refuse directions of another width than their sites'.

    Raises:
        ValueError: the site and both widths.
    """
    for direction, site, (width, _) in zip(directions, sites, widths, strict=True):
        if len(direction) != width:
            raise ValueError(
                f"the direction of site {site.name!r} has width {len(direction)}; the model's hidden states there have "
                f"width {width}"
            )


def acting(settings: AttackSettings, state: AttackState, generator: torch.Generator | None) -> Tensor:
    """[S, R] bool: the sites and rows that the adversary acts on, drawn at random by `share`."""
    live = (state.own_rows[:, 0] >= 0).expand(len(state.deltas), state.rows)
    if settings.share == 1:
        return live.clone()
    where = live.device if generator is None else generator.device
    return live & (torch.rand(live.shape, generator=generator, device=where) < settings.share).to(live.device)


def fill(
    settings: AttackSettings,
    state: AttackState,
    directions: Sequence[Tensor],
    on: Tensor,
    generator: torch.Generator | None,
) -> None:
    """Write the perturbations of "vector" or "random" into the state. on: see `acting`."""
    if settings.adversary == "random":
        state.start_randomly(generator, boundary=True)
    for group in state.groups:
        for k, site in enumerate(group.sites):
            delta = group.delta[k]
            if settings.adversary == "vector":
                vector = directions[site].to(delta.device)
                if settings.norm != "none":
                    radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k][:, None]
                    vector = vector / length_of(vector, settings.norm) * radius
                delta.copy_(vector.expand(delta.shape))
            delta.mul_(on[site].to(delta.device)[:, None])
            group.norms[k].copy_(delta.float().norm(dim=-1))


def length_of(vector: Tensor, norm: str) -> Tensor:
    """[] the length of a vector [H] by a norm of the settings."""
    return vector.abs().max() if norm == "linf" else vector.norm()
