"""Read a decoder as frozen weights: what a pass that is written by hand needs of a Llama-like model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .facts import hooks_on, is_ours
from .joined import Groups, Maps
from .lean import _lora_parts, _untouched, norm_offset
from .linear import Linear
from .sites import decoder_layers, unwrapped


class UnsupportedStack(ValueError):
    """A model is not of the kind that a frozen stack runs; the message names the module and why."""


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
        qkv: the maps to queries, keys and values. o: the map of what it gives. heads, kv_heads, head_dim: its shape.
        q_norm, k_norm: norms before the rotation, over each head or over all together; None where there are none.
        scaling: of the scores. softcap: scores s become softcap * tanh(s / softcap); None for none.
        rotates: whether queries and keys are rotated by their positions.
    """

    qkv: Maps
    o: Maps
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

    gate_up: Maps
    down: Maps
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

    @property
    def maps(self) -> list[Maps]:
        """Those of all blocks."""
        return [m for b in self.blocks for m in (b.attention.qkv, b.attention.o, b.mlp.gate_up, b.mlp.down)]

    def join(self, groups: Groups, compared: Mapping[int, str] | None = None) -> None:
        """Make maps of one input one product, where their device and memory allow it (`joined.py`).

        Args:
            compared: by number, why maps were apart when the stack was compared with the model; "" where they were not,
                and these alone may be joined. None for that comparison itself.
        """
        taken: set[int] = set()
        for number, maps in enumerate(self.maps):
            own = {id(one.weight) for one in maps.linears}
            if taken & own:  # another block's weights, with adapters of its own
                maps.apart = "a weight is in two blocks"
            elif compared is None or not compared.get(number, "not compared"):
                maps.join(groups)
            elif maps.can_join:
                maps.apart = compared.get(number, "not compared")
            taken |= own

    @property
    def products(self) -> str:
        """How many products the maps of one input are, in words."""
        joined, apart = [m for m in self.maps if m.joined], [m.apart for m in self.maps if m.apart]
        if not apart:
            return "joined" if joined else "one a weight"
        return f"{len(joined)} of {len(joined) + len(apart)} joined ({'; '.join(dict.fromkeys(apart))})"


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
    wide = [heads * dim, kv_heads * dim, kv_heads * dim]
    if "qkv_proj" in children:
        qkv, o = _maps(module, name, (("qkv_proj",), ("o_proj",)), wide)
    else:
        qkv, o = _maps(module, name, (("q_proj", "k_proj", "v_proj"), ("o_proj",)))
    if qkv.sizes != wide:
        raise UnsupportedStack(f"{name}'s queries are {qkv.sizes[0]} wide, not {heads} heads of {dim}")
    q_norm, k_norm = (
        _norm(children[key], f"{name}.{key}") if key in children else None for key in ("q_norm", "k_norm")
    )
    if (q_norm is None) != (k_norm is None):
        raise UnsupportedStack(f"{name} ({type(module).__name__}) norms one of queries and keys alone")
    softcap = getattr(module, "attn_logit_softcapping", None)
    return Attention(
        qkv, o, heads, kv_heads, dim, q_norm, k_norm, float(module.scaling), softcap,
        bool(getattr(module, "use_rope", True)),
    )  # fmt: skip


def _mlp(module: Any, name: str) -> Mlp:
    module = _plain(unwrapped(module), name)
    act = _activation(getattr(module, "act_fn", None) or getattr(module, "activation_fn", None), name)
    if hasattr(module, "gate_up_proj"):
        wide = [getattr(module.gate_up_proj, "out_features", 0) // 2] * 2
        gate_up, down = _maps(module, name, (("gate_up_proj",), ("down_proj",)), wide)
    else:
        gate_up, down = _maps(module, name, (("gate_proj", "up_proj"), ("down_proj",)))
    return Mlp(gate_up, down, act)


def _maps(
    module: nn.Module, name: str, groups: Sequence[Sequence[str]], sizes: Sequence[int] | None = None
) -> list[Maps]:
    """The maps of one input each, by names, where they are all that `module` has with weights beside norms of heads.

    Args:
        sizes: of the outputs of the first group's only map, which holds several.
    """
    children = dict(module.named_children())
    keys = [key for group in groups for key in group]
    if missing := [key for key in keys if key not in children]:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has no {missing[0]}")
    known = {*keys, "q_norm", "k_norm"}
    others = [key for key, child in children.items() if key not in known and list(child.parameters())]
    others += list(module._parameters)
    if others:
        raise UnsupportedStack(f"{name} ({type(module).__name__}) has {others[0]}, which a stack does not run")
    read = [{key: _linear(children[key], f"{name}.{key}") for key in group} for group in groups]
    return [Maps(list(group.values()), None if number else sizes) for number, group in enumerate(read)]


def _linear(module: Any, name: str) -> Linear:
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        _plain(module, name)
        if (parts := _lora_parts(module)) is not None:
            base, bias, a, b, scaling = parts
            return Linear(base, None if bias is None else bias.detach(), a.detach(), b.detach(), scaling)
        if module.disable_adapters or module.merged or not set(module.active_adapters) & set(module.lora_A):
            module = module.base_layer
    module = unwrapped(module)
    weight = getattr(module, "weight", None)
    if not _untouched(module) or type(weight) is not nn.Parameter or weight.requires_grad:
        base = getattr(module, "base_layer", module)  # that an adapter is on
        kind = type(module if type(base) is nn.Linear else base)
        raise UnsupportedStack(f"{name} is {kind.__module__}.{kind.__name__}, not a frozen nn.Linear")
    return Linear(weight, None if module.bias is None else module.bias.detach())


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
