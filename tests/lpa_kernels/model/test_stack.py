"""The parts of a frozen stack: its linear maps, the rules of attention that it reads, and which models it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lpa_kernels.model import linear as linears
from lpa_kernels.model.blocks import UnsupportedStack, read_decoder
from lpa_kernels.model.linear import Linear
from lpa_kernels.model.stack import Given, rules_of
from lpa_kernels.ops import seen_by, swiglu
from tests.support.batches import with_lora
from tests.support.joining import joining
from tests.support.models import DEVICE, tiny

READ = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "gemma2", "gemma3_text", "granite")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(given: Tensor, wanted: Tensor) -> bool:
    return bool((given - wanted).abs().max() <= 1e-12 * wanted.abs().max())


def test_a_linear_map_with_an_adapter_forward_backward_and_split():
    x, grad = drawn(5, 6), drawn(5, 8, seed=1)
    linear = Linear(drawn(8, 6, seed=2), drawn(8, seed=3), drawn(2, 6, seed=4), drawn(8, 2, seed=5), 0.7)
    assert linear.a is not None
    assert linear.b is not None
    weight = linear.weight + 0.7 * linear.b @ linear.a
    wanted = x @ weight.t() + linear.bias
    assert close(linear(x), wanted)
    assert close(torch.cat([part(x) for part in linear.split([3, 5])], 1), wanted)
    assert close(linear.back(grad), grad @ weight)
    into = drawn(5, 6, seed=6)
    assert close(linear.back(grad, into.clone()), into + grad @ weight)


def test_an_adapter_is_added_to_the_weight_where_that_takes_fewer_operations():
    linear = Linear(drawn(8, 6, seed=2), None, drawn(2, 6, seed=4), drawn(8, 2, seed=5), 0.7)
    few, many = drawn(4, 6), drawn(50, 6)
    assert linear._summed(few) is None
    assert linear._summed(many) is not None
    assert linear._summed(many.half()) is None
    assert close(linear(many)[:4], linear(many[:4]))
    grad = drawn(50, 8, seed=1)
    assert close(linear.back(grad)[:4], linear.back(grad[:4]))


def test_a_sum_of_weight_and_adapter_is_made_once_for_a_backward_pass_and_the_next_forward(monkeypatch):
    linear, many = Linear(drawn(8, 6, seed=2), None, drawn(2, 6, seed=4), drawn(8, 2, seed=5), 0.7), drawn(50, 6)
    wanted = linear(many)
    assert not linear.held
    linear.back(drawn(50, 8, seed=1))
    monkeypatch.setattr(Linear, "_summed", None)
    assert torch.equal(linear(many), wanted)
    assert not linear.held


def test_a_wide_head_in_parts_is_the_whole_product(monkeypatch):
    linear, x = Linear(drawn(70, 6).float()), drawn(5, 6, seed=1).float()
    wanted = linear(x)
    monkeypatch.setattr(linears, "_WIDE", 64)
    monkeypatch.setattr(linears, "_PART", 16)
    assert torch.allclose(linear(x), wanted, rtol=1e-6, atol=1e-6)


# two rows, of a prefix of 3, completions of 2 and 2, and of a prefix of 2 and one completion of 1
BRANCH = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, -1, -1, -1, -1]])
POSITION = torch.tensor([[0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 0, 0, 0, 0]])


def given_by_a_model(window: int) -> Given:
    branch, position = BRANCH, POSITION
    mask = seen_by(branch[:, :, None], position[:, :, None], branch[:, None], position[:, None], window)
    angle = position[..., None] * torch.tensor([1.0, 0.3])
    return Given(mask[:, None], *(torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin)))


@pytest.mark.parametrize(("window", "binds"), [(0, 0), (2, 2), (4, 4), (5, 0), (9, 0)])
def test_a_window_and_a_rotation_are_read_from_what_blocks_are_given(window, binds):
    given = given_by_a_model(window)
    (rule,) = rules_of([given], BRANCH, POSITION)
    assert rule.window == binds
    wanted = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3])
    assert torch.equal(rule.rotation[0][:5], wanted.cos())
    assert torch.equal(rule.rotation[1][:5], wanted.sin())
    numbers = Given(torch.zeros(given.mask.shape).masked_fill_(~given.mask, -1e9), given.cos, given.sin)
    assert rules_of([numbers], BRANCH, POSITION)[0].window == binds


def test_other_masks_and_rotations_are_refused():
    given = given_by_a_model(0)
    holes = given.mask.clone()
    holes[0, 0, 4, 1] = False  # a key between two that are seen
    with pytest.raises(UnsupportedStack, match="neither causal nor a window"):
        rules_of([given, given._replace(mask=holes)], BRANCH, POSITION)
    for changed in ((0, 1, 3), (0, 5, 1)):  # of the second half, and of one of two tokens at a position
        cos = given.cos.clone()
        cos[changed] += 1
        with pytest.raises(UnsupportedStack, match="does not go by position"):
            rules_of([given._replace(cos=cos)], BRANCH, POSITION)


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
    assert (block.attention.qkv.each[0].a is not None) == lora
    assert (block.post_mlp is None) == (family not in ("gemma2", "gemma3_text", "olmo2"))
    x = torch.randn(3, model.config.hidden_size, device=DEVICE)
    mlp = block.mlp
    with torch.no_grad():
        wanted = model.model.layers[0].mlp(x)
        gate, up = mlp.gate_up.parts(mlp.gate_up(x))
        assert torch.allclose(*mlp.down.parts(mlp.down(swiglu(gate, up, mlp.act))), wanted, atol=1e-5)


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


class Linear4bit(nn.Linear):
    """A layer like bitsandbytes': its weight is packed, two entries a byte, and its forward unpacks it."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.weight = nn.Parameter(plain.weight.new_zeros(plain.weight.numel() // 2, 1).byte(), requires_grad=False)


def quantised(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Linear4bit(mlp.up_proj)


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
        (quantised, r"block 1.mlp.up_proj is .*\.Linear4bit, not a frozen nn.Linear"),
    ],
)
def test_a_changed_part_is_refused_by_name(change, says):
    model = frozen(tiny("llama"))
    change(model)
    with pytest.raises(UnsupportedStack, match=says):
        read_decoder(model)


@pytest.mark.parametrize("together", [False, True])
def test_a_quantised_layer_under_an_adapter_is_refused_by_name(together):
    """And no weight is moved for a model that is not run."""
    model = tiny("llama")
    quantised(model)
    adapted = frozen(with_lora(model))
    places = [p.data_ptr() for p in adapted.parameters()]
    with joining(together), pytest.raises(UnsupportedStack, match=r"block 1.mlp.up_proj is .*\.Linear4bit, not a froz"):
        read_decoder(adapted)
    assert [p.data_ptr() for p in adapted.parameters()] == places
