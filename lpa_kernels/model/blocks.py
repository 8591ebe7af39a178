"""Read a decoder as frozen weights: what a pass that is written by hand needs of a Llama-like model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .facts import hooks_on, is_ours
from .lean import _lora_parts, _untouched, norm_offset
from .sites import decoder_layers, unwrapped

Low = tuple[Tensor, Tensor]  # LoRA's product with its first factor, [T, rank], and its second factor, [out, rank]


_WIDE, _PART = 1 << 14, 1 << 10  # outputs from which a product is made in parts, and how many are one


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias. On a CPU a head's by parts of W, which stay in the caches: a sixth faster than whole."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(weight) < _WIDE or bias is not None:
        return nn.functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for part, rows in zip(out.split(_PART, 1), weight.split(_PART), strict=True):
        torch.mm(x, rows.t(), out=part)
    return out


class UnsupportedStack(ValueError):
    """A model is not of the kind that a frozen stack runs; the message names the module and why."""


@dataclass(frozen=True)
class Linear:
    """A frozen linear map y = x W^T + bias + scaling (x A^T) B^T.

    Attributes:
        weight: [out, in]. bias: [out] or None.
        a: [rank, in] and b: [out, rank], the factors of one LoRA adapter, or None. scaling: of their product.
        held: the sum of weight and adapter, from a backward pass to the next forward pass. Then least else is saved.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    held: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        """y [T, out] of x [T, in]."""
        if (sum_ := self.held.pop() if self.held else self._summed(x)) is not None:
            return _product(x, sum_, self.bias)
        out = _product(x, self.weight, self.bias)
        if self.a is not None and self.b is not None:
            out.addmm_(x @ self.a.t(), self.b.t(), alpha=self.scaling)
        return out

    def ahead(self, x: Tensor) -> tuple[Tensor, Low | None]:
        """y of x without LoRA's second product, and what that takes: for an op that makes it as it reads y.

        On a CPU the product of a library is faster, and y is whole.
        """
        if self.a is None or self.b is None or x.device.type == "cpu":
            return self(x), None
        low = torch.addmm(x.new_empty(0), x, self.a.t(), beta=0, alpha=self.scaling)
        return nn.functional.linear(x, self.weight, self.bias), (low, self.b)

    def back(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """The gradient of x [T, in] from that of y [T, out], added to `into` where one is given."""
        sum_ = self._summed(grad)
        weight = self.weight if sum_ is None else sum_
        out = grad @ weight if into is None else into.addmm_(grad, weight)
        if sum_ is not None:
            self.held[:] = [sum_]
        elif self.a is not None and self.b is not None:
            out.addmm_(grad @ self.b, self.a, alpha=self.scaling)
        return out

    def _summed(self, x: Tensor) -> Tensor | None:
        """The weight with the adapter added, where that takes fewer operations than the adapter on the rows of x.

        In float32 and float64 alone: there it is exact up to the order of sums.
        """
        if self.a is None or self.b is None or x.dtype not in (torch.float32, torch.float64):
            return None
        many, few = self.weight.shape
        if len(x) * (many + few) <= 1.25 * many * few:  # the copy of the weight costs something too
            return None
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scaling)

    def split(self, sizes: Sequence[int]) -> list[Linear]:
        """Maps to consecutive `sizes` of its outputs, as views of its weights."""
        biases = [None] * len(sizes) if self.bias is None else list(self.bias.split(list(sizes)))
        ups = [None] * len(sizes) if self.b is None else list(self.b.split(list(sizes)))
        weights = self.weight.split(list(sizes))
        return [Linear(w, bias, self.a, up, self.scaling) for w, bias, up in zip(weights, biases, ups, strict=True)]


@dataclass(frozen=True)
class Norm:
    """A root mean square norm x / sqrt(mean(x^2) + eps) * weight.

    Attributes:
        weight: [H] float32 (float64 for a float64 model). eps: added to the mean square.
    """

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Attributes:
        q, k, v, o: its maps. heads, kv_heads, head_dim: its shape.
        q_norm, k_norm: norms before the rotation, over each head or over all together; None where there are none.
        scaling: of the scores. softcap: scores s become softcap * tanh(s / softcap); None for none.
        rotates: whether queries and keys are rotated by their positions.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None
    k_norm: Norm | None
    scaling: float
    softcap: float | None
    rotates: bool


@dataclass(frozen=True)
class Mlp:
    """A gated feed-forward, down(act(gate(x)) * up(x)). act: "silu" or "gelu_tanh"."""

    gate: Linear
    up: Linear
    down: Linear
    act: str


@dataclass(frozen=True)
class Block:
    """A decoder block: r += scale * post_attention(attention(pre_attention(r))), then the same with the feed-forward.

    Attributes:
        pre_attention, post_attention, pre_mlp, post_mlp: norms, None where there are none.
        scale: of what a branch adds to the residual stream.
    """

    attention: Attention
    mlp: Mlp
    pre_attention: Norm | None
    post_attention: Norm | None
    pre_mlp: Norm | None
    post_mlp: Norm | None
    scale: float


@dataclass(frozen=True)
class Head:
    """Logits of hidden states: z = scale * linear(hidden), then softcap * tanh(z / softcap) where there is a cap."""

    linear: Linear
    scale: float
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N, V] logits of hidden [N, H]."""
        logits = self.linear(hidden)
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """[N, V], the derivative of the cap at its output `logits`; None without a cap."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()

    def back(self, grad: Tensor, slope: Tensor | None) -> Tensor:
        """[N, H], the gradient of the hidden states from that of the logits [N, V], which is overwritten."""
        if slope is not None:
            grad *= slope
        if self.scale != 1:
            grad *= self.scale
        return self.linear.back(grad)


@dataclass(frozen=True)
class Decoder:
    """A decoder language model of frozen weights, which are the model's own tensors.

    Attributes:
        embed: from ids [T] to what the embedding gives, [T, H]. embedding_scale: of what the first block gets.
        blocks, norm, head: what follows.
    """

    embed: Callable[[Tensor], Tensor]
    embedding_scale: float
    blocks: list[Block]
    norm: Norm
    head: Head


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_decoder(model: Any) -> Decoder:
    """`model` as frozen weights.

    Raises:
        UnsupportedStack: a part is of another kind, is trained, quantised or replaced, or has hooks of its own.
    """
    layers = decoder_layers(model)
    holder = next((m for m in model.modules() if getattr(m, "layers", None) is layers), None)
    if not isinstance(norm := getattr(holder, "norm", None), nn.Module):
        raise UnsupportedStack(f"{type(model).__name__} has no module with its blocks as .layers beside a .norm")
    config = model.config.get_text_config()
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):
        raise UnsupportedStack(f"{type(model).__name__} scales queries by their positions (llama_4_scaling_beta)")
    head = Head(_linear(model.get_output_embeddings(), "the head"), 1 / getattr(config, "logits_scaling", 1.0),
                getattr(config, "final_logit_softcapping", None))  # fmt: skip
    blocks = [_block(layer, f"block {index}") for index, layer in enumerate(layers)]
    embedding = _plain(unwrapped(model.get_input_embeddings()), "the embedding")
    return Decoder(embedding.forward, float(getattr(config, "embedding_multiplier", 1.0)), blocks,
                   _norm(norm, "the last norm"), head)  # fmt: skip


def _block(layer: Any, name: str) -> Block:
    layer = _plain(layer, name)
    children = dict(layer.named_children())
    if "self_attn" not in children or "mlp" not in children:
        raise UnsupportedStack(f"{name} ({type(layer).__name__}) has {list(children)}, and no self_attn or mlp")
    before = {"input_layernorm", "pre_feedforward_layernorm"} & set(children)
    after = {"post_feedforward_layernorm"} & set(children)
    if not after:  # llama and most others
        names = "input_layernorm", "", "post_attention_layernorm", ""
    elif len(before) == 2:  # gemma2, gemma3
        names = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    else:  # olmo2
        names = "", "post_attention_layernorm", "", "post_feedforward_layernorm"
    used = {"self_attn", "mlp", *names}
    if others := [key for key, child in children.items() if key not in used and list(child.parameters())]:
        raise UnsupportedStack(f"{name} ({type(layer).__name__}) has {others[0]}, which a stack does not run")
    first, second, third, fourth = (_norm(children.get(key), f"{name}.{key}") if key else None for key in names)
    return Block(
        attention=_attention(children["self_attn"], f"{name}.self_attn"),
        mlp=_mlp(children["mlp"], f"{name}.mlp"),
        pre_attention=first,
        post_attention=second,
        pre_mlp=third,
        post_mlp=fourth,
        scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _attention(module: Any, name: str) -> Attention:
    module = _plain(unwrapped(module), name)
    children = dict(module.named_children())
    config = getattr(module, "config", None)
    dim, heads = getattr(module, "head_dim", None), getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not (isinstance(dim, int) and isinstance(heads, int) and isinstance(kv_heads, int)):
        raise UnsupportedStack(f"{name} ({type(module).__name__}) does not say its number of heads and their width")
    if "qkv_proj" in children:
        linears = _linears(module, name, ("qkv_proj", "o_proj"))
        maps = [*linears[0].split([heads * dim, kv_heads * dim, kv_heads * dim]), linears[1]]
    else:
        maps = _linears(module, name, ("q_proj", "k_proj", "v_proj", "o_proj"))
    if maps[0].weight.shape[0] != heads * dim or maps[1].weight.shape[0] != kv_heads * dim:
        raise UnsupportedStack(f"{name}'s queries are {maps[0].weight.shape[0]} wide, not {heads} heads of {dim}")
    q_norm, k_norm = (
        _norm(children[key], f"{name}.{key}") if key in children else None for key in ("q_norm", "k_norm")
    )
    if (q_norm is None) != (k_norm is None):
        raise UnsupportedStack(f"{name} ({type(module).__name__}) norms one of queries and keys alone")
    q, k, v, o = maps
    softcap = getattr(module, "attn_logit_softcapping", None)
    return Attention(
        q, k, v, o, heads, kv_heads, dim, q_norm, k_norm, float(module.scaling), softcap,
        bool(getattr(module, "use_rope", True)),
    )  # fmt: skip


def _mlp(module: Any, name: str) -> Mlp:
    module = _plain(unwrapped(module), name)
    act = _activation(getattr(module, "act_fn", None) or getattr(module, "activation_fn", None), name)
    if hasattr(module, "gate_up_proj"):
        joint, down = _linears(module, name, ("gate_up_proj", "down_proj"))
        gate, up = joint.split([joint.weight.shape[0] // 2] * 2)
    else:
        gate, up, down = _linears(module, name, ("gate_proj", "up_proj", "down_proj"))
    return Mlp(gate, up, down, act)


def _linears(module: nn.Module, name: str, keys: Sequence[str]) -> list[Linear]:
    """The maps of these names, where they are all that `module` has with weights beside its norms of heads."""
    children = dict(module.named_children())
    if missing := [key for key in keys if key not in children]:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has no {missing[0]}")
    known = {*keys, "q_norm", "k_norm"}
    others = [key for key, child in children.items() if key not in known and list(child.parameters())]
    others += list(module._parameters)
    if others:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has {others[0]}, which a stack does not run")
    return [_linear(children[key], f"{name}.{key}") for key in keys]


def _linear(module: Any, name: str) -> Linear:
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        _plain(module, name)
        if (parts := _lora_parts(module)) is not None:
            frozen = [None if part is None else part.detach() for part in parts[:4]]
            assert frozen[0] is not None
            return Linear(frozen[0], frozen[1], frozen[2], frozen[3], parts[4])
        if module.disable_adapters or module.merged or not set(module.active_adapters) & set(module.lora_A):
            module = module.base_layer
    module = unwrapped(module)
    weight = getattr(module, "weight", None)
    if not _untouched(module) or type(weight) is not nn.Parameter or weight.requires_grad:
        base = getattr(module, "base_layer", module)  # that an adapter is on
        kind = type(module if type(base) is nn.Linear else base)
        raise UnsupportedStack(f"{name} is {kind.__module__}.{kind.__name__}, not a frozen nn.Linear")
    return Linear(weight.detach(), None if module.bias is None else module.bias.detach())


@torch.no_grad()
def _norm(module: Any, name: str) -> Norm:
    weight = None if module is None else module._parameters.get("weight")
    if module is None or weight is None or len(module._parameters) != 1 or module._modules:
        raise UnsupportedStack(f"{name} is no RMS norm but {type(module).__name__}")
    _plain(module, name)
    found = [module.__dict__[key] for key in ("variance_epsilon", "eps") if isinstance(module.__dict__.get(key), float)]
    if len(found) != 1:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has no epsilon")
    offset = norm_offset(module, found[0])
    if offset is None:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) does not give what an RMS norm gives")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return Norm(wide + offset if offset else wide, found[0])


@torch.no_grad()
def _activation(function: Any, name: str) -> str:
    x = torch.linspace(-4, 4, 33)
    for kind, wanted in (("silu", nn.functional.silu(x)), ("gelu_tanh", nn.functional.gelu(x, approximate="tanh"))):
        if isinstance(function, nn.Module | Callable) and torch.allclose(function(x), wanted, atol=1e-6):
            return kind
    raise UnsupportedStack(f"{name} has the activation {type(function).__name__}; a stack runs SiLU and GELU (tanh)")


def _plain(module: Any, name: str) -> Any:
    """`module`, which has no hooks and runs its class's forward, or our lean one that stands for it."""
    own = module.__dict__.get("forward")
    if hooks_on(module) or not (own is None or is_ours(own)):
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has hooks or a forward that is not its class's")
    return module
