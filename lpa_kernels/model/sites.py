"""Where a perturbation is added: names like "mlp:8" made into modules of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import hooked

# Attribute names, not model names: what decoder blocks call their two halves.
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "moe", "fc2")
ATTENTION = ("self_attn", "attention", "attn", "self_attention", "temporal_block", "mixer", "conv", "mamba")
KINDS = {"mlp": FEED_FORWARD, "attn": ATTENTION, "block": ()}


@dataclass(frozen=True)
class Site:
    """A module whose output is perturbed. `layer` is its decoder block, None outside the blocks."""

    name: str
    module: nn.Module = field(repr=False)
    layer: int | None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module under wrappers of LAT's kind (an nn.Module that holds the real one as `.module` and a `.hook_fn`)."""
    while hasattr(module, "hook_fn") and isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def language_model(model: nn.Module) -> nn.Module:
    """The language model under wrappers that hide it, such as DistributedDataParallel.

    Raises:
        ValueError: no module underneath has get_input_embeddings().
    """
    inner: Any = model
    while not hasattr(inner, "get_input_embeddings"):
        inner = getattr(inner, "module", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} is no causal language model: it has no get_input_embeddings()")
    return inner


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the nn.ModuleList nearest to the embedding that is as long as the configuration says.

    Where none is, one whose length divides that number: a block may hold several of the counted layers.

    Raises:
        ValueError: the model has none.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None) or 0
    around = [*reversed(_way_to_embedding(model)), model]  # a vision tower may be as deep as the text model
    for fits in (lambda length: length == depth, lambda length: 1 < length < depth and depth % length == 0):
        for owner in around:
            for module in owner.modules():  # stops at the first, of thousands of modules
                if isinstance(module, nn.ModuleList) and len(module) and fits(len(module)):
                    return module
    raise ValueError(
        f"{type(model).__name__} has no nn.ModuleList of config.num_hidden_layers={depth} blocks; "
        "name the site's module in full instead"
    )


def _way_to_embedding(model: nn.Module) -> list[nn.Module]:
    """The modules around the input embedding, outermost first; none where the model has no such embedding."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if get is None else get()
    except NotImplementedError:
        embedding = None
    way: list[nn.Module] = []

    def find(module: nn.Module) -> bool:
        if module is embedding:
            return True
        way.append(module)
        if any(find(child) for child in module.children()):
            return True
        way.pop()
        return False

    return way if embedding is not None and find(model) else []


def in_block(block: nn.Module, index: int, kind: str) -> nn.Module:
    """The module of a decoder block that a site of `kind` ("mlp", "attn", "block") means.

    Raises:
        ValueError: the block has none; the message lists what it has.
    """
    for attribute in KINDS[kind]:
        if isinstance(child := getattr(block, attribute, None), nn.Module):
            return unwrapped(child)
    if kind == "block":
        return block
    have = [name for name, _ in block.named_children()]
    raise ValueError(
        f"site '{kind}:{index}': block {index} ({type(block).__name__}) has no {kind} submodule; "
        f"it has {have}; use 'block:{index}' or a module's full name"
    )


def resolve_sites(model: nn.Module, sites: str | int | Site | Sequence[str | int | Site]) -> list[Site]:
    """The sites of a model, in the order given.

    Args:
        sites: "embedding", "mlp:8", "attn:8", "block:8", an int (the mlp of that layer, LAT's default), or the full
            name of any module; one or several. A `Site` stands for itself.

    Raises:
        ValueError: an unknown site, a layer out of range, a site given twice, or none at all.
    """
    names = [sites] if isinstance(sites, (str, int, Site)) else list(sites)
    if not names:
        raise ValueError("no sites given; name at least one, such as 'embedding' or 'mlp:8'")
    found = [name if isinstance(name, Site) else _resolve(model, name) for name in names]
    modules = [site.module for site in found]
    if len({id(module) for module in modules}) != len(modules):
        raise ValueError(f"sites {names} name the same module twice")
    if len({site.name for site in found}) != len(found):
        raise ValueError(f"sites {[site.name for site in found]} give one name to two modules")
    return found


def _resolve(model: nn.Module, site: str | int) -> Site:
    name = f"mlp:{site}" if isinstance(site, int) else site
    if name == "embedding":
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return Site(name, unwrapped(embedding), None)
    kind, _, number = name.partition(":")
    if kind in KINDS and number.lstrip("-").isdigit():
        layers = decoder_layers(model)
        index = int(number)
        if not 0 <= index < len(layers):
            raise ValueError(f"site {name!r} is out of range: the model has layers 0 to {len(layers) - 1}")
        return Site(name, in_block(layers[index], index, kind), index)
    modules = dict(model.named_modules())
    if name in modules and name:
        return Site(name, unwrapped(modules[name]), _layer_of(model, modules[name]))
    raise ValueError(
        f"site {name!r} is unknown; use 'embedding', 'mlp:N', 'attn:N', 'block:N', a layer number, "
        "or the full name of a module"
    )


def _layer_of(model: nn.Module, module: nn.Module) -> int | None:
    try:
        layers = decoder_layers(model)
    except ValueError:
        return None
    for index, block in enumerate(layers):
        if any(child is module for child in block.modules()):
            return index
    return None


def hidden_of(output: Any, name: str = "site") -> Tensor:
    """The hidden states in a module's output: the output itself, or the first item of a tuple.

    Raises:
        TypeError: there is no float tensor there.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
        raise TypeError(f"{name}: the module returned {type(hidden).__name__}, not hidden states [..., width]")
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states replaced."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden


@torch.no_grad()
def site_widths(model: nn.Module, sites: Sequence[Site]) -> list[tuple[int, torch.device]]:
    """The width and device of each site's hidden states, read off a forward pass of two tokens.

    Raises:
        ValueError: a site is never run, or more than once, by the model's forward pass, or on
            other tokens than the text's.
        RuntimeError: the model does not run on two tokens.
    """
    wrong: list[Exception] = []
    seen: dict[str, list[tuple[int, torch.device]]] = {site.name: [] for site in sites}

    def watch(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                seen[site.name].append(_width_of_two(output, site.name))
            except (TypeError, ValueError) as error:
                wrong.append(error)
                raise

        return hook

    with hooked((site.module, watch(site)) for site in sites):
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if wrong:
                raise
            name, kind = type(model).__name__, type(error).__name__
            raise RuntimeError(f"{name} cannot be run plainly, on tokens alone: {kind}: {error}") from error
    for name, calls in seen.items():
        if len(calls) != 1:
            raise ValueError(f"site {name!r} ran {len(calls)} times in one forward pass; a site must run exactly once")
    return [seen[site.name][0] for site in sites]


def _width_of_two(output: Any, name: str) -> tuple[int, torch.device]:
    hidden = hidden_of(output, name)
    if (tokens := hidden.numel() // hidden.shape[-1]) != 2:
        raise ValueError(
            f"site {name!r} has {tokens} tokens where the text has 2: the model adds tokens of its own (prompt tuning "
            "does), which no engine supports"
        )
    return hidden.shape[-1], hidden.device
