"""Lean layers: the same numbers as the layers they stand for, only where that is so, and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpa_kernels.model.lean import _FrozenLora, _FrozenNorm, lean_layers
from lpa_kernels.model.modes import inner_mode

from ...support.batches import llama, with_lora
from ...support.models import DEVICE, VOCAB, implementations, tiny


def leans(model: nn.Module) -> dict[str, int]:
    """How many LoRA layers and norms have another forward than their own."""
    changed = [m for m in model.modules() if "forward" in m.__dict__]
    lora = sum(hasattr(m, "lora_A") for m in changed)
    return {"lora": lora, "norm": len(changed) - lora}


@pytest.mark.parametrize("bias", [True, False])
def test_lora_against_autograd(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, b, a, up = (
        torch.randn(n, dtype=torch.double, generator=draw) for n in ((5, 7), (6, 7), (6,), (2, 7), (6, 2))
    )
    x.requires_grad_()
    given = b if bias else None
    assert torch.autograd.gradcheck(lambda x: _FrozenLora.apply(x, w, given, a, up, 0.3), (x,))
    expected = nn.functional.linear(x, w, given) + 0.3 * (x @ a.T @ up.T)
    torch.testing.assert_close(_FrozenLora.apply(x, w, given, a, up, 0.3), expected)


def test_norm_against_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, dtype=torch.double, generator=draw)
    w = torch.randn(7, dtype=torch.double, generator=draw)
    x[0, 0] *= 1e-3  # where epsilon counts
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _FrozenNorm.apply(x, w, 1e-5), (x,))
    torch.testing.assert_close(
        _FrozenNorm.apply(x, w, 1e-5), x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    )


@pytest.mark.parametrize(("family", "norms"), [("llama", 9), ("qwen3", 17), ("gemma2", 17), ("olmo2", 17), ("gpt2", 0)])
def test_families(family: str, norms: int) -> None:
    """Plain weights, weights to which 1 is added (gemma), norms of each head (qwen3); layer norms stay as they are."""
    model = with_lora(tiny(family, attn=implementations(family)[-1]), lora_dropout=0.0)
    ids = torch.arange(12, device=DEVICE).view(2, 6) % VOCAB

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=hidden, use_cache=False).logits
        return logits, torch.autograd.grad(logits.square().mean(), hidden)[0]

    model.requires_grad_(False)
    want = run()
    with inner_mode(model):
        found = leans(model)
        got = run()
    assert found["norm"] == norms
    assert found["lora"] > 0
    assert leans(model) == {"lora": 0, "norm": 0}
    for a, b in zip(got, want, strict=True):
        off = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert off < 2e-5
        assert (off > 0) == (family != "gpt2")  # other sums, so not the same bits; gpt2's base layers are no nn.Linear


def test_they_are_gone_after_an_exception() -> None:
    model = llama(lora=True)
    with pytest.raises(ZeroDivisionError), lean_layers(model):
        _ = 1 / (1 - bool(leans(model)["lora"]))
    assert leans(model) == {"lora": 0, "norm": 0}


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def _two(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        layer_of(model).lora_B["second"].weight.normal_()
    model.base_model.set_adapter(["default", "second"])
    model.requires_grad_(False)


ODD: dict[str, Any] = {
    "two adapters": _two,
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.base_model.merge_adapter(),
    "hooked": lambda model: layer_of(model).lora_A["default"].register_forward_hook(lambda m, args, out: 2 * out),
    "patched": lambda model: setattr(layer_of(model).base_layer, "forward", lambda x: 2 * x),
    "training with dropout": lambda model: model.train(),
    "trained": lambda model: layer_of(model).lora_A["default"].weight.requires_grad_(),
    "narrower adapters": lambda model: (layer_of(model).lora_A.bfloat16(), layer_of(model).lora_B.bfloat16()),
    "another base": lambda model: setattr(layer_of(model), "base_layer", nn.Sequential(layer_of(model).base_layer)),
    "autocast": lambda model: None,
}


@pytest.mark.parametrize("kind", [*ODD, "dora"])
def test_other_layers_run_as_they_are(kind: str) -> None:
    model = with_lora(tiny("llama"), use_dora=kind == "dora")
    model.requires_grad_(False)
    ODD.get(kind, lambda model: None)(model)
    layer, x = layer_of(model), torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "autocast"):
        for lean in (False, True):
            torch.manual_seed(0)  # for dropout
            if lean:
                with lean_layers(model):
                    results.append(layer(x))
            else:
                results.append(layer(x))
    assert torch.equal(*results)
    assert results[0].requires_grad == (kind == "trained")


def test_a_norm_of_another_kind_runs_as_it_is() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    class Gated(Centred):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    for module in (Centred(), Gated(), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), nn.RMSNorm(8, dtype=torch.bfloat16)):
        with lean_layers(module):
            assert "forward" not in module.__dict__
    with lean_layers(norm := nn.RMSNorm(8, eps=1e-5)):
        assert "forward" in norm.__dict__
        assert norm(torch.ones(2, 8)).requires_grad  # its weight is trained, so it is its own forward that ran


def test_no_token_at_all() -> None:
    """As an expert may get none."""
    model = with_lora(tiny("llama"))
    model.requires_grad_(False)
    with lean_layers(model):
        assert layer_of(model)(torch.zeros(0, 32, device=DEVICE)).shape == (0, 32)


def test_weights_of_zero_prove_nothing() -> None:
    norm = nn.RMSNorm(8, eps=1e-5)
    nn.init.zeros_(norm.weight)
    with lean_layers(norm):
        assert "forward" not in norm.__dict__
    nn.init.ones_(norm.weight)
    with lean_layers(norm):
        assert "forward" in norm.__dict__


def test_compiled_models_stay_as_they_were_compiled() -> None:
    model = with_lora(tiny("llama"))
    model.base_model.model.model.layers[0].mlp.compile(backend="eager")
    with lean_layers(model):
        assert leans(model) == {"lora": 0, "norm": 0}
    other = with_lora(tiny("llama"))
    mlp = other.base_model.model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    with lean_layers(other):
        assert leans(other) == {"lora": 0, "norm": 1}  # the one that is compiled
