"""Sites: what names mean, which are refused, and that finding the blocks does not walk over the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from lpa_kernels.attack import LatentPGD, Site, resolve_sites
from lpa_kernels.model.sites import decoder_layers

from ...support.batches import llama, pairs, with_lora
from ...support.models import tiny

BAD_SITES: list[tuple[str, Any]] = [
    ("no sites given", []),
    (r"'mlp:4' is out of range: the model has layers 0 to 3", "mlp:4"),
    ("'mlp:-1' is out of range", [-1]),
    ("'ffn:1' is unknown", "ffn:1"),
    ("'' is unknown", ""),
    ("name the same module twice", [1, "mlp:1"]),
    ("give one name to two modules", "two"),
    (r"'mlp:0': block 0 \(Mamba2Block\) has no mlp submodule; it has .*'mixer'", "mamba"),
]


@pytest.mark.parametrize(("message", "sites"), BAD_SITES, ids=[message for message, _ in BAD_SITES])
def test_bad_sites(message: str, sites: Any) -> None:
    model = llama()
    if sites == "mamba":
        model, sites = tiny("mamba2"), "mlp:0"
    if sites == "two":
        sites = [Site("x", layer.mlp, i) for i, layer in enumerate(model.model.layers[:2])]
    with pytest.raises(ValueError, match=message):
        LatentPGD(model, sites)


def test_sites_that_do_not_run_once() -> None:
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="'mlp:0' ran 2 times"):
        LatentPGD(model, ["mlp:0"]).attack(pairs())
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' ran 0 times"):
        LatentPGD(model, ["unused"]).attack(pairs())
    with pytest.raises(TypeError, match="model: the module returned"):
        LatentPGD(model, ["model"]).attack(pairs())
    with pytest.raises(ValueError, match="name the site's module in full instead"):
        resolve_sites(nn.Linear(2, 2), "mlp:0")


def test_a_model_that_does_not_run_raises() -> None:
    model = llama()
    model.model.layers[1].mlp.double()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot be run plainly, on tokens alone: RuntimeError"):
        LatentPGD(model, ["embedding"]).attack(pairs())


def test_the_blocks_are_found_without_a_walk_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack asks for them, and an 8B model with LoRA has thousands of modules under several wrappers."""
    model, seen, modules = with_lora(llama()), [], nn.Module.modules

    def counted(self: nn.Module) -> Iterator[nn.Module]:
        for module in modules(self):
            seen.append(module)
            yield module

    monkeypatch.setattr(nn.Module, "modules", counted)
    assert len(decoder_layers(model)) == 4
    assert len(seen) < 10
