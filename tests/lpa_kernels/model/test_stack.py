"""The stack's arithmetic, backward passes written by hand against autograd in float64, and which models it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_kernels.model.blocks import Linear, Norm, UnsupportedStack, read_decoder
from lpa_kernels.model.stack import (
    attend,
    gate_backward_,
    gate_forward,
    head_norm_backward,
    head_norm_forward,
    norm_backward,
    norm_forward,
    rotate_,
)
from tests.support.batches import with_lora
from tests.support.models import DEVICE, tiny

READ = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "gemma2", "gemma3_text", "granite")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(given: Tensor, wanted: Tensor) -> bool:
    return bool((given - wanted).abs().max() <= 1e-12 * wanted.abs().max())


def plain_norm(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


@pytest.mark.parametrize("width", [2, 7, 64])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norm_and_its_backward_with_what_passes_by(width, eps):
    r, grad, passing = drawn(5, width), drawn(5, width, seed=1), drawn(5, width, seed=2)
    norm = Norm(drawn(width, seed=3), eps)
    leaf = r.clone().requires_grad_()
    wanted = plain_norm(leaf, norm)
    normed, rstd = norm_forward(r, norm)
    assert close(normed, wanted.detach())
    (slope,) = torch.autograd.grad(wanted, leaf, grad)
    assert close(norm_backward(grad, r, rstd, norm), slope)
    assert close(norm_backward(grad, r, rstd, norm, passing), slope + passing)


@pytest.mark.parametrize("width", [4, 12])
def test_the_norm_of_heads_over_each_or_over_all(width):
    x, grad, norm = drawn(5, 12), drawn(5, 12, seed=1), Norm(drawn(width, seed=2), 1e-6)
    leaf = x.clone().requires_grad_()
    wanted = plain_norm(leaf.view(5, -1, width), norm).reshape(5, 12)
    normed, kept = head_norm_forward(x, norm)
    assert close(normed, wanted.detach())
    assert close(head_norm_backward(grad, norm, kept), torch.autograd.grad(wanted, leaf, grad)[0])


@pytest.mark.parametrize("turned", [4, 8])
def test_a_rotation_leaves_the_rest_of_a_head_and_turns_back(turned):
    x, angle = drawn(5, 3, 8), drawn(5, 1, turned // 2, seed=1)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
    wanted = torch.cat([x[..., :turned] * cos + torch.cat([-b, a], -1) * sin, x[..., turned:]], -1)
    given = x.clone()
    rotate_(given, cos, sin)
    assert close(given, wanted)
    rotate_(given, cos, -sin)
    assert close(given, x)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_the_gate_both_ways(act):
    gate, up, grad = drawn(5, 9), drawn(5, 9, seed=1), drawn(5, 9, seed=2)
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    active = F.silu(leaves[0]) if act == "silu" else F.gelu(leaves[0], approximate="tanh")
    wanted = active * leaves[1]
    assert close(gate_forward(gate, up, act), wanted.detach())
    slopes = torch.autograd.grad(wanted, leaves, grad)
    gate_backward_(grad, gate, up, act)
    assert close(gate, slopes[0])
    assert close(up, slopes[1])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_grouped_queries(softcap, kv_heads):
    q, k, v = drawn(2, 4, 3, 8), drawn(2, kv_heads, 5, 8, seed=1), drawn(2, kv_heads, 5, 8, seed=2)
    seen = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.6
    seen[..., 0] = True
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=DEVICE).masked_fill(~seen, float("-inf"))
    wide = [t.repeat_interleave(4 // kv_heads, 1) for t in (k, v)]
    scores = q @ wide[0].transpose(-1, -2) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    wanted = (scores + bias).softmax(-1) @ wide[1]
    assert close(attend(q, k, v, bias, 0.3, softcap), wanted)


def test_a_linear_map_with_an_adapter_forward_backward_split_and_merged():
    x, grad = drawn(5, 6), drawn(5, 8, seed=1)
    linear = Linear(drawn(8, 6, seed=2), drawn(8, seed=3), drawn(2, 6, seed=4), drawn(8, 2, seed=5), 0.7)
    assert linear.a is not None
    assert linear.b is not None
    weight = linear.weight + 0.7 * linear.b @ linear.a
    wanted = x @ weight.t() + linear.bias
    assert close(linear(x), wanted)
    assert close(linear.merged()(x), wanted)
    assert close(torch.cat([part(x) for part in linear.split([3, 5])], 1), wanted)
    assert close(linear.back(grad), grad @ weight)
    into = drawn(5, 6, seed=6)
    assert close(linear.back(grad, into.clone()), into + grad @ weight)


# ---- which models are read -------------------------------------------------------------------------------------------


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("lora", [False, True])
def test_blocks_are_read_as_they_are(family, lora):
    model = tiny(family)
    decoder = read_decoder(frozen(with_lora(model) if lora else model))
    assert len(decoder.blocks) == model.config.num_hidden_layers
    block = decoder.blocks[0]
    assert (block.attention.q.a is not None) == lora
    assert (block.post_mlp is None) == (family not in ("gemma2", "gemma3_text", "olmo2"))
    x = torch.randn(3, model.config.hidden_size, device=DEVICE)
    mlp = block.mlp
    with torch.no_grad():
        wanted = model.model.layers[0].mlp(x)
    assert torch.allclose(mlp.down(gate_forward(mlp.gate(x), mlp.up(x), mlp.act)), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gpt2", "no module with its blocks as .layers"),
        ("stablelm", "block 0.input_layernorm is no RMS norm"),
        ("qwen3_moe", "block 0.mlp"),
        ("falcon", "no module with its blocks"),
    ],
)
def test_other_kinds_are_refused_by_name(family, says):
    with pytest.raises(UnsupportedStack, match=says):
        read_decoder(frozen(tiny(family)))


def hooked(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def replaced(model):
    model.model.layers[1].self_attn.forward = lambda *_, **__: None


def trained(model):
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(True)


def scaled(model):
    norm = model.model.layers[1].input_layernorm

    class Other(type(norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    norm.__class__ = Other


def another(model):
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hooked, "block 1.mlp.up_proj"),
        (replaced, "block 1.self_attn .* has hooks or a forward"),
        (trained, "block 1.self_attn.k_proj"),
        (scaled, "block 1.input_layernorm .* does not give what an RMS norm gives"),
        (another, "block 1.mlp .* has extra"),
    ],
)
def test_a_changed_part_is_refused_by_name(change, says):
    model = frozen(tiny("llama"))
    change(model)
    with pytest.raises(UnsupportedStack, match=says):
        read_decoder(model)
