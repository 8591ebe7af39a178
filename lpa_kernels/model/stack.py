"""Run a frozen Llama-like decoder forward and backward by hand: its inputs' gradients are all that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import perturb
from .blocks import Block, Decoder, Mlp, Norm, UnsupportedStack
from .hooks import forwards
from .sites import decoder_layers

EMBEDDING = -1  # the half block that a perturbation of the embedding follows


@dataclass(frozen=True)
class Span:
    """The tokens of one row in a stream: numbers `start` to `start + count`, after `kept` tokens that stand still.

    `scored_start`, `scored`: the same of the tokens that predict labels, among all of those.
    """

    start: int
    count: int
    kept: int
    scored_start: int
    scored: int


@dataclass(frozen=True)
class Stream:
    """The tokens of padded rows in one line, row after row, without padding.

    Attributes:
        ids: [T] int64. rows: [T] int64, the row of the perturbation of each token, -1 for none.
        places: [T] int64, where each stands in the padded rows, row * L + index.
        scored: [n] int64, the numbers of the tokens that predict a label, distinct and in order.
        spans: of each padded row.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    scored: Tensor
    spans: Sequence[Span]


class Given(NamedTuple):
    """What a model gives a block beside hidden states: a mask [B, 1, L, L] bool, cos and sin [B or 1, L, D]."""

    mask: Tensor
    cos: Tensor
    sin: Tensor


@contextmanager
def observed(model: nn.Module) -> Iterator[tuple[list[Given], list[Tensor]]]:
    """Within it, a pass of the model skips its blocks; yields what each was given, and the hidden states, as lists."""
    given: list[Given] = []
    inputs: list[Tensor] = []

    def look(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask, turn = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if not isinstance(mask, Tensor) or not isinstance(turn, tuple) or len(turn) != 2:
            raise UnsupportedStack(f"{type(model).__name__} gives its blocks no mask and rotation")
        inputs.append(hidden)
        given.append(Given(mask if mask.dtype == torch.bool else mask == 0, *turn))
        return hidden

    with forwards((layer, look) for layer in decoder_layers(model)):
        yield given, inputs


# ---- the arithmetic: a function is one fused kernel on a GPU ---------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """x in float32; in float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def norm_forward(r: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of r [T, H], in its dtype, and 1 / sqrt(mean(r^2) + eps), [T, 1] float32."""
    values = _wide(r)
    rstd = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(r.shape[-1]).add_(norm.eps).rsqrt_()
    return (values * rstd).mul_(norm.weight).to(r.dtype), rstd


def norm_backward(grad: Tensor, r: Tensor, rstd: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """The gradient of r [T, H] from that of its norm [T, H], plus `residual` [T, H], the gradient that passes by."""
    scaled, values = _wide(grad) * norm.weight, _wide(r)
    along = torch.linalg.vecdot(scaled, values).unsqueeze(-1).mul_(rstd**3).div_(-r.shape[-1])
    out = scaled.mul_(rstd).addcmul_(values, along)
    return (out if residual is None else out.add_(residual)).to(r.dtype)


def head_norm_forward(x: Tensor, norm: Norm) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The norm of x [T, heads * D] over parts as wide as its weight, and what its backward reads."""
    parts = x.reshape(-1, norm.weight.shape[0])
    out, rstd = norm_forward(parts, norm)
    return out.view(x.shape), (parts, rstd)


def head_norm_backward(grad: Tensor, norm: Norm, kept: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of `head_norm_forward`'s x from that of its norm, both [T, heads * D]."""
    parts, rstd = kept
    return norm_backward(grad.reshape(parts.shape), parts, rstd, norm).view(grad.shape)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first entries of each head of x [T, heads, D] in place. cos, sin: [T, 1, at most D], halves alike."""
    half = cos.shape[-1] // 2
    a, b, c, s = x[..., :half], x[..., half : 2 * half], cos[..., :half], sin[..., :half]
    turned = torch.addcmul(a * c, b, s, value=-1)
    b.mul_(c).addcmul_(a, s)
    a.copy_(turned)


def gate_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, all [T, F]."""
    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def gate_backward_(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> None:
    """Overwrite gate and up [T, F] by their gradients, from `grad` [T, F], that of act(gate) * up."""
    if act == "silu":
        active, slope = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
    else:
        active, slope = F.gelu(gate, approximate="tanh"), torch.ops.aten.gelu_backward(
            grad * up, gate, approximate="tanh"
        )  # fmt: skip
    torch.mul(grad, active, out=up)
    gate.copy_(slope)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Attention of q [B, heads, m, D] to k, v [B, kv_heads, n, D]; bias [B, 1, m, n] is 0 where seen, else -inf."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scaling, enable_gqa=grouped)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (scaling / softcap)) * softcap + bias
    return _wide(scores).softmax(-1).to(q.dtype) @ v


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows of one length: one call of attention.

    Attributes:
        count: rows. queries, keys, kept: slices of the queries, of the stream's tokens and of the kept ones.
        bias: by mask, [count, 1, queries, kept + keys a row] of 0 and -inf.
    """

    count: int
    queries: slice
    keys: slice
    kept: slice
    bias: dict[int, Tensor]


def _groups(stream: Stream, biases: dict[int, Tensor], scored: bool) -> list[_Group]:
    """The groups of a stream. scored: its scored tokens alone are queries. biases: by mask, [B, 1, L, L]."""
    found: list[_Group] = []
    first = 0
    kept_start = 0
    spans = stream.spans
    while first < len(spans):
        span, last = spans[first], first
        alike = (span.count, span.kept, span.scored if scored else 0)
        while last + 1 < len(spans) and alike == (
            spans[last + 1].count, spans[last + 1].kept, spans[last + 1].scored if scored else 0
        ):  # fmt: skip
            last += 1
        count = last + 1 - first
        keys = slice(span.start, span.start + count * span.count)
        queries = slice(span.scored_start, span.scored_start + count * span.scored) if scored else keys
        places = stream.places[stream.scored[queries]] if scored else stream.places[keys]
        bias = {}
        for name, whole in biases.items() if queries.start < queries.stop else ():
            part = whole[first : last + 1, :, :, : span.kept + span.count]
            index = (places % whole.shape[2]).view(count, 1, -1, 1).expand(-1, 1, -1, part.shape[3])
            bias[name] = part.gather(2, index)
        if queries.start < queries.stop:
            found.append(_Group(count, queries, keys, slice(kept_start, kept_start + count * span.kept), bias))
        kept_start += count * span.kept
        first = last + 1
    return found


# ---- the stack -------------------------------------------------------------------------------------------------------


class FrozenStack:
    """A frozen decoder on one stream of tokens: `forward` from perturbations to hidden states, `backward` to gradients.

    Saved between the two: the residual stream (twice a block) and the factors of its norms, queries, keys, values,
    attention's output and its logsumexp, gate and up. The last block runs queries and feed-forward for scored tokens
    alone. Whatever stands before the lowest site is run once, here. Neither waits for the device.

    Args:
        decoder: the weights.
        sites: names as in `Site.name`: "embedding", "attn:3", "mlp:3" or "block:3".
        stream: the tokens.
        given: what the model gives each block, for the padded rows.
        hidden: [T, H], what the model gives its first block.
        before: a stack on the tokens before each row's first in `stream`, whose keys and values are kept; None where
            there are none.
        backend: of `perturb`.

    Raises:
        UnsupportedStack: a site is elsewhere, or the first block is given other than its embeddings.
    """

    def __init__(
        self, decoder: Decoder, sites: Sequence[str], stream: Stream, given: Sequence[Given], hidden: Tensor,
        before: FrozenStack | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        self.decoder, self.stream, self.before, self.backend = decoder, stream, before, backend
        self.last = 2 * len(decoder.blocks) - 1  # half blocks are numbered: 2i the attention of block i, 2i + 1 its MLP
        self.outputs = {_half(name): name for name in sites if not name.startswith("block:")}
        self.streams = {_half(name): name for name in sites if name.startswith("block:")}
        self.first = min([*self.outputs, *self.streams], default=self.last + 1)
        self.scored_rows = stream.rows[stream.scored]
        self.saved: dict[Any, Any] = {}
        self.keys: list[tuple[Tensor, Tensor]] = []
        self._cut(given)
        embedded = decoder.embed(stream.ids)
        if not torch.equal(embedded * decoder.embedding_scale, hidden):
            raise UnsupportedStack("the first block is given other than the embeddings")
        residual: Tensor | None = None
        output = embedded
        for half in range(EMBEDDING, min(self.first, self.last)):
            residual = self._join(half, residual, output, {}, keep=False)
            output = self._branch(half + 1, residual, keep=False)
        self.start = residual, output

    def _cut(self, given: Sequence[Given]) -> None:
        """Masks and rotations of the stream's tokens, each made once however many blocks share it."""
        stream, size = self.stream, given[0].mask.shape[0]
        dtype = self.decoder.blocks[0].attention.q.weight.dtype
        biases: dict[int, Tensor] = {}
        turns: dict[int, tuple[Tensor, ...]] = {}
        for each in given:
            if id(each.mask) not in biases:
                zeros = torch.zeros(each.mask.shape, dtype=dtype, device=each.mask.device)
                biases[id(each.mask)] = zeros.masked_fill_(~each.mask, float("-inf"))
            if id(each.cos) not in turns:
                flat = [t.expand(size, -1, -1).reshape(-1, 1, t.shape[-1]) for t in (each.cos, each.sin)]
                turns[id(each.cos)] = tuple(t[p] for p in (stream.places, stream.places[stream.scored]) for t in flat)
        self.bias_of = [id(each.mask) for each in given]
        self.turns = [turns[id(each.cos)] for each in given]
        self.groups, self.scored_groups = _groups(stream, biases, False), _groups(stream, biases, True)

    # ---- forward ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """[n, H]: what the head gets for the scored tokens, under perturbations [R, H] float32 by site."""
        residual, output = self.start
        self.saved = {}  # what a forward pass leaves that no backward pass followed
        for half in range(self.first, self.last + 1):
            residual = self._join(half, residual, output, deltas)
            if half < self.last:
                output = self._branch(half + 1, residual)
        assert residual is not None
        normed, rstd = norm_forward(residual, self.decoder.norm)
        self.saved["norm"] = residual, rstd
        return normed

    def _is_few(self, half: int) -> bool:
        """Whether the output of a half block is there for the scored tokens alone."""
        return half >= self.last - 1

    def _join(
        self, half: int, residual: Tensor | None, output: Tensor, deltas: Mapping[str, Tensor], keep: bool = True
    ) -> Tensor:
        """The residual stream after a half block: its output is perturbed, normed, and added."""
        rows = self.scored_rows if self._is_few(half) else self.stream.rows
        if deltas and half in self.outputs:
            output = perturb(output, deltas[self.outputs[half]], rows, backend=self.backend)
        if residual is None:
            return output if self.decoder.embedding_scale == 1 else output * self.decoder.embedding_scale
        block = self.decoder.blocks[half // 2]
        if (post := _post(block, half)) is not None:
            before = output
            output, rstd = norm_forward(output, post)
            if keep:
                self.saved[half, "post"] = before, rstd
        if half == self.last - 1:
            residual = residual[self.stream.scored]
        residual = torch.add(residual, output, alpha=block.scale)
        if deltas and half in self.streams:
            residual = perturb(residual, deltas[self.streams[half]], rows, backend=self.backend)
        return residual

    def _branch(self, half: int, residual: Tensor, keep: bool = True) -> Tensor:
        """What a half block adds to the residual stream, from it."""
        block = self.decoder.blocks[half // 2]
        pre = _pre(block, half)
        normed, rstd = (residual, None) if pre is None else norm_forward(residual, pre)
        if half % 2:
            output, kept = self._mlp(block.mlp, normed)
        else:
            output, kept = self._attention(half // 2, normed)
        if keep:
            self.saved[half] = residual, rstd, kept
        return output

    def _mlp(self, mlp: Mlp, x: Tensor) -> tuple[Tensor, Any]:
        gate, up = mlp.gate(x), mlp.up(x)
        return mlp.down(gate_forward(gate, up, mlp.act)), (gate, up)

    def _attention(self, index: int, x: Tensor) -> tuple[Tensor, Any]:
        part, few = self.decoder.blocks[index].attention, self._is_few(2 * index)
        cos, sin, scored_cos, scored_sin = self.turns[index]
        q, k, v = part.q(x[self.stream.scored] if few else x), part.k(x), part.v(x)
        normed: Any = None
        if part.q_norm is not None and part.k_norm is not None:
            (q, q_kept), (k, k_kept) = head_norm_forward(q, part.q_norm), head_norm_forward(k, part.k_norm)
            normed = q_kept, k_kept
        q = q.view(-1, part.heads, part.head_dim)
        k, v = (t.view(-1, part.kv_heads, part.head_dim) for t in (k, v))
        if part.rotates:
            rotate_(q, scored_cos if few else cos, scored_sin if few else sin)
            rotate_(k, cos, sin)
        if self.first > self.last:  # nothing here is perturbed: it is for the stack on the tokens that follow
            self.keys.append((k, v))
        out = torch.empty_like(q)
        graphs = []
        for group in self.scored_groups if few else self.groups:
            parts = [_heads(t[s], group.count) for t, s in ((q, group.queries), (k, group.keys), (v, group.keys))]
            with torch.enable_grad():  # of this one operation, which knows best what its backward reads
                parts = [t.requires_grad_() for t in parts]
                keys, values = parts[1], parts[2]
                if self.before is not None and group.kept.start < group.kept.stop:
                    old = [_heads(t[group.kept], group.count) for t in self.before.keys[index]]
                    keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
                o = attend(parts[0], keys, values, group.bias[self.bias_of[index]], part.scaling, part.softcap)
            out[group.queries] = _tokens(o.detach())
            graphs.append((o, parts, group))
        return part.o(out.flatten(1)), (graphs, normed)

    # ---- backward --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """[T, H] gradients by site, from `grad` [n, H], that of what `forward` gave. Once a forward."""
        found: dict[str, Tensor] = {}
        passing = self._normed_back(grad, "norm", self.decoder.norm)
        for half in range(self.last, self.first - 1, -1):
            if half == EMBEDDING:
                scale = self.decoder.embedding_scale
                found[self.outputs[half]] = passing if scale == 1 else passing * scale
                break
            block, few = self.decoder.blocks[half // 2], self._is_few(half)
            if half in self.streams:
                found[self.streams[half]] = self._spread(passing) if few else passing
            into = passing if block.scale == 1 else passing * block.scale
            if (post := _post(block, half)) is not None:
                into = self._normed_back(into, (half, "post"), post)
            if half in self.outputs:
                found[self.outputs[half]] = self._spread(into) if few else into
            if half == self.first:
                break
            residual, rstd, kept = self.saved.pop(half)
            if half % 2:
                into = self._mlp_backward(block.mlp, into, kept)
            else:
                into = self._attention_backward(half // 2, into, kept)
                passing = self._spread(passing) if few else passing
            pre = _pre(block, half)
            passing = into + passing if pre is None else norm_backward(into, residual, rstd, pre, passing)
        return found

    def _normed_back(self, grad: Tensor, key: Any, norm: Norm) -> Tensor:
        """The gradient of what a norm was given, from that of its output; `key` of what it saved."""
        given, rstd = self.saved.pop(key)
        return norm_backward(grad, given, rstd, norm)

    def _spread(self, few: Tensor) -> Tensor:
        """[T, H]: gradients [n, H] of the scored tokens, and 0 for the others."""
        return few.new_zeros(self.stream.places.shape[0], few.shape[1]).index_copy_(0, self.stream.scored, few)

    def _mlp_backward(self, mlp: Mlp, grad: Tensor, kept: Any) -> Tensor:
        gate, up = kept
        gate_backward_(mlp.down.back(grad), gate, up, mlp.act)
        return mlp.up.back(up, mlp.gate.back(gate))

    def _attention_backward(self, index: int, grad: Tensor, kept: Any) -> Tensor:
        part, few = self.decoder.blocks[index].attention, self._is_few(2 * index)
        cos, sin, scored_cos, scored_sin = self.turns[index]
        graphs, normed = kept
        grad = part.o.back(grad).view(-1, part.heads, part.head_dim)
        dq = torch.empty_like(grad)
        dk = grad.new_zeros(self.stream.places.shape[0], part.kv_heads, part.head_dim)
        dv = torch.zeros_like(dk)  # rows without a query take no part
        for o, parts, group in graphs:
            each = torch.autograd.grad(o, parts, _heads(grad[group.queries], group.count))
            for whole, span, values in zip((dq, dk, dv), (group.queries, group.keys, group.keys), each, strict=True):
                whole[span] = _tokens(values)
        if part.rotates:
            rotate_(dq, scored_cos if few else cos, -(scored_sin if few else sin))
            rotate_(dk, cos, -sin)
        dq, dk, dv = dq.flatten(1), dk.flatten(1), dv.flatten(1)
        if part.q_norm is not None and part.k_norm is not None:
            dq = head_norm_backward(dq, part.q_norm, normed[0])
            dk = head_norm_backward(dk, part.k_norm, normed[1])
        into = part.v.back(dv, part.k.back(dk))
        if few:
            return into.index_add_(0, self.stream.scored, part.q.back(dq))
        return part.q.back(dq, into)


def _pre(block: Block, half: int) -> Norm | None:
    return block.pre_mlp if half % 2 else block.pre_attention


def _post(block: Block, half: int) -> Norm | None:
    return block.post_mlp if half % 2 else block.post_attention


def _heads(x: Tensor, rows: int) -> Tensor:
    """[rows, heads, tokens, D] of x [rows * tokens, heads, D]."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """The reverse of `_heads`."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _half(name: str) -> int:
    """The half block that a site follows: `EMBEDDING`, 2i for the attention of block i, 2i + 1 for its feed-forward."""
    kind, _, index = name.partition(":")
    if name == "embedding":
        return EMBEDDING
    if kind not in ("attn", "mlp", "block") or not index.isdigit():
        raise UnsupportedStack(f"the site {name!r} is neither the embedding nor at a block or one of its halves")
    return 2 * int(index) + (kind != "attn")
