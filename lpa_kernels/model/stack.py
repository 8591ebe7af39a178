"""Run a frozen Llama-like decoder forward and backward by hand: its inputs' gradients are all that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .blocks import Decoder, Mlp, Norm, UnsupportedStack
from .hooks import forwards
from .linear import Low
from .sites import decoder_layers

ROTATED_INSIDE = {"cpu"}  # devices whose attention rotates queries and keys as it reads them
EMBEDDING = -1  # the half block that a perturbation of the embedding follows


@dataclass(frozen=True)
class Tokens:
    """The tokens of padded rows in one line, row after row, without padding.

    Attributes:
        ids: [T] int64. rows: [T] int64, the row of the perturbation of each token, -1 for none.
        places: [T] int64, where each stands in the padded rows, row * L + index.
        scored: [n] int64, the numbers of the tokens that predict a label, distinct and in order.
        line: the stream of all of them. few: of those that are scored.
        keys: of all that they may see, which is those kept of each row and then its own.
        own: [T] int64, where they stand among the keys; None where there are no others.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    scored: Tensor
    line: ops.Stream
    few: ops.Stream
    keys: ops.Stream
    own: Tensor | None = None


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
        given.append(Given(mask, *turn))
        return hidden

    with forwards((layer, look) for layer in decoder_layers(model)):
        yield given, inputs


class Rule(NamedTuple):
    """Attention's rule in a block: `window` as in `ops.attention`, and cos and sin, [P, R] by position."""

    window: int
    rotation: tuple[Tensor, Tensor]


def rules_of(given: Sequence[Given], branch: Tensor, position: Tensor, embedded: Tensor | None = None) -> list[Rule]:
    """The rules of a model's blocks, read from what it gives them for rows of known branches and positions, [B, L].

    A mask is causal by position, within branches and what comes before them, and perhaps within a window; a rotation
    goes by position alone. Waits for the device once.

    Args:
        embedded: [] bool, whether the first block is given the embeddings, to be read along.

    Raises:
        UnsupportedStack: a mask or a rotation is another, or the first block is given something else.
    """
    masks = {id(each.mask): each.mask for each in given}
    turns = {id(each.cos): (each.cos, each.sin) for each in given}
    there = branch >= 0
    apart = position[:, :, None] - position[:, None, :]
    causal = ops.seen_by(branch[:, :, None], position[:, :, None], branch[:, None], position[:, None], 0)
    reach = torch.where(causal, apart, 0).amax()
    facts = []
    for mask in masks.values():
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        far = torch.where(seen & causal, apart, 0).amax()
        right = ((seen == (causal & (apart <= far))) | ~there[:, :, None]).all()
        facts.append(torch.stack([right.long(), torch.where(far < reach, far + 1, 0)]))
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    for name, (cos, sin) in turns.items():
        tables[name] = _by_position(cos, position, there), _by_position(sin, position, there)
        whole = (torch.cat([t, t], -1)[position] == turn for t, turn in zip(tables[name], (cos, sin), strict=True))
        right = torch.stack([(same.all(-1) | ~there).all() for same in whole]).all().long()
        facts.append(torch.stack([right, right]))
    right = torch.ones((), dtype=torch.bool, device=branch.device) if embedded is None else embedded
    *found, (plain, _) = torch.stack([*facts, right.long().expand(2)]).tolist()  # the one time that this waits
    if not plain:
        raise UnsupportedStack("the first block is given other than the embeddings")
    if not all(right for right, _ in found[: len(masks)]):
        raise UnsupportedStack("a block's mask is neither causal nor a window of positions")
    if not all(right for right, _ in found[len(masks) :]):
        raise UnsupportedStack("a block's rotation does not go by position, in two halves alike")
    windows = {name: window for name, (_, window) in zip(masks, found, strict=False)}
    return [Rule(windows[id(each.mask)], tables[id(each.cos)]) for each in given]


def _by_position(turn: Tensor, position: Tensor, there: Tensor) -> Tensor:
    """[P, R], the first half of `turn` [B or 1, L, 2R] by position, in float32 or wider."""
    half = turn.shape[-1] // 2
    table = turn.new_zeros(position.shape[1] + 1, half)  # the last row is the bin, for padding
    table[torch.where(there, position, -1)] = turn.expand(*position.shape, -1)[..., :half]
    return table.to(torch.promote_types(turn.dtype, torch.float32))


class FrozenStack:
    """A frozen decoder on one stream of tokens: `forward` from perturbations to hidden states, `backward` to gradients.

    Saved between the two: the residual stream (twice a block) and the factors of its norms, queries, keys, values,
    attention's output and its logsumexp, gate and up. The last block runs queries and feed-forward for scored tokens
    alone. Whatever stands before the lowest site is run once, here. Neither waits for the device.

    Args:
        decoder: the weights.
        sites: names as in `Site.name`: "embedding", "attn:3", "mlp:3" or "block:3".
        tokens: what is run.
        rules: of attention in each block.
        before: a stack on the tokens before each row's first in `tokens`, whose keys and values are kept; None where
            there are none.
        backend: of the ops.
    """

    def __init__(
        self, decoder: Decoder, sites: Sequence[str], tokens: Tokens, rules: Sequence[Rule],
        before: FrozenStack | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        self.decoder, self.tokens, self.rules, self.backend = decoder, tokens, rules, backend
        self.last = 2 * len(decoder.blocks) - 1  # half blocks are numbered: 2i the attention of block i, 2i + 1 its MLP
        self.outputs = {_half(name): name for name in sites if not name.startswith("block:")}
        self.streams = {_half(name): name for name in sites if name.startswith("block:")}
        self.first = min([*self.outputs, *self.streams], default=self.last + 1)
        self.scored_rows = tokens.rows[tokens.scored]
        self.rotates_apart = tokens.ids.device.type not in ROTATED_INSIDE
        self.saved: dict[Any, Any] = {}
        self.keys: list[tuple[Tensor, Tensor]] = []  # of each block, where nothing here is perturbed
        self.kept = [] if before is None else [self._with_room(k, v) for k, v in before.keys]
        residual: Tensor | None = None
        output: tuple[Tensor, Low | None] = decoder.embed(tokens.ids), None
        for half in range(EMBEDDING, min(self.first, self.last)):
            residual, normed = self._join(half, residual, output, {}, keep=False)
            output = self._branch(half + 1, normed, keep=False)
        self.start = residual, output

    def _with_room(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Kept keys and values among those of all tokens, the others' yet to be written."""
        own = self.tokens.own
        assert own is not None
        room = torch.ones(len(self.tokens.keys.places), dtype=torch.uint8, device=own.device).index_fill_(0, own, 0)
        kept = room.argsort(stable=True, descending=True)[: len(k)]  # the places that are no own ones, in order
        k, v = (t.new_zeros(len(room), *t.shape[1:]).index_copy_(0, kept, t) for t in (k, v))
        return k, v

    # ---- forward ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """[n, H]: what the head gets for the scored tokens, under perturbations [R, H] float32 by site."""
        residual, output = self.start
        self.saved = {}  # by forward passes that no backward pass has followed
        for half in range(self.first, self.last + 1):
            residual, normed = self._join(half, residual, output, deltas)
            if half < self.last:
                output = self._branch(half + 1, normed)
        return normed

    def _is_few(self, half: int) -> bool:
        """Whether the output of a half block is there for the scored tokens alone."""
        return half >= self.last - 1

    def _join(
        self, half: int, residual: Tensor | None, output: tuple[Tensor, Low | None], deltas: Mapping[str, Tensor],
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The residual stream after a half block, whose output is perturbed, normed, and added; and its next norm."""
        x, lora = output
        rows = self.scored_rows if self._is_few(half) else self.tokens.rows
        own, through = (deltas.get(names.get(half, "")) for names in (self.outputs, self.streams))
        scale = 1.0 if residual is None else self.decoder.blocks[half // 2].scale
        if residual is None and self.decoder.embedding_scale != 1:
            x = x if own is None else ops.perturb(x, own, rows, backend=self.backend)
            x, own = x * self.decoder.embedding_scale, None
        if (post := self._post(half)) is not None:
            given, x, rstd = self._add_norm(x, None, post, lora, own, rows)
            own = lora = None
            if keep:
                self.saved[half, "post"] = given, rstd
        if half == self.last - 1 and residual is not None:
            residual = residual[self.tokens.scored]
        if through is not None and (own is not None or scale != 1):  # two sums that one pass cannot make
            x, residual = self._add_norm(x, residual, None, lora, own, rows, scale)[0], None
            own, lora, scale = None, None, 1.0
        r, normed, rstd = self._add_norm(x, residual, self._pre(half + 1), lora, through if own is None else own,
                                         rows, scale)  # fmt: skip
        if keep and self._pre(half + 1) is not None:
            self.saved[half + 1, "pre"] = r, rstd
        return r, normed

    def _add_norm(
        self, x: Tensor, residual: Tensor | None, norm: Norm | None, lora: Low | None, delta: Tensor | None,
        rows: Tensor, scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`ops.add_norm`; without a norm the sum takes its place."""
        r, normed, rstd = ops.add_norm(
            x, residual, None if norm is None else norm.weight, lora=lora, delta=delta,
            rows=None if delta is None else rows, scale=scale, eps=0.0 if norm is None else norm.eps,
            backend=self.backend,
        )  # fmt: skip
        return r, r if norm is None else normed, rstd

    def _branch(self, half: int, x: Tensor, keep: bool = True) -> tuple[Tensor, Low | None]:
        """What a half block adds to the residual stream, from the norm of it: a product, and LoRA's to come."""
        block = self.decoder.blocks[half // 2]
        if half % 2:
            kept: Any = block.mlp.gate_up(x)
            gate, up = block.mlp.gate_up.parts(kept)
            output = block.mlp.down.ahead(ops.swiglu(gate, up, block.mlp.act, backend=self.backend))
        else:
            kept = self._attention(half // 2, x)
            output = block.attention.o.ahead(kept[3].flatten(1))
        if keep:
            self.saved[half] = kept
        return output

    def _lines(self, half: int) -> tuple[ops.Stream, ops.Stream]:
        """The streams of a block's queries and keys."""
        return self.tokens.few if self._is_few(half) else self.tokens.line, self.tokens.keys

    def _options(self, index: int) -> dict[str, Any]:
        """How `ops.attention` is called in a block."""
        part = self.decoder.blocks[index].attention
        return {"scale": part.scaling, "softcap": part.softcap or 0.0, "window": self.rules[index].window,
                "rotation": self.rules[index].rotation if part.rotates and not self.rotates_apart else None,
                "backend": self.backend}  # fmt: skip

    def _rotate(self, index: int, q: Tensor, k: Tensor, back: bool = False) -> None:
        """Rotate queries and keys of a block's tokens where they are, once for all that reads them, or back."""
        if self.rotates_apart and self.decoder.blocks[index].attention.rotates:
            queries, own = self._lines(2 * index)[0].places, self.tokens.line.places
            ops.rotate_(q, k, self.rules[index].rotation, queries, own, back=back, backend=self.backend)

    def _attention(self, index: int, x: Tensor) -> tuple[Any, ...]:
        """(q, k, v, out, lse) of a block, and what the norms of its queries and keys leave."""
        part, few = self.decoder.blocks[index].attention, self._is_few(2 * index)
        if few:
            q, k, v = (one(rows) for one, rows in zip(part.qkv.each, (x[self.tokens.scored], x, x), strict=True))
        else:
            q, k, v = part.qkv.parts(part.qkv(x))
        normed: Any = None
        if part.q_norm is not None and part.k_norm is not None:
            (q, *q_kept), (k, *k_kept) = self._head_norm(q, part.q_norm), self._head_norm(k, part.k_norm)
            normed = q_kept, k_kept
            if part.qkv.joined and not few and len(part.q_norm.weight) == part.head_dim:
                v = v.clone()  # norms of heads are of copies: the product need not stay
        q, k, v = (t.unflatten(1, (-1, part.head_dim)) for t in (q, k, v))
        self._rotate(index, q, k)
        if self.first > self.last:  # nothing here is perturbed: it is for the stack on the tokens that follow
            self.keys.append((k.contiguous(), v.contiguous()))
        own = self.tokens.own
        if own is not None:
            k, v = (old.index_copy_(0, own, new) for old, new in zip(self.kept[index], (k, v), strict=True))
        queries, keys = self._lines(2 * index)
        return q, k, v, *ops.attention(q, k, v, queries=queries, keys=keys, **self._options(index)), normed

    def _head_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """The norm of x [T, heads * D] over parts as wide as its weight; those parts and their factors."""
        parts, normed, rstd = ops.add_norm(
            x.reshape(-1, norm.weight.shape[0]), None, norm.weight, eps=norm.eps, backend=self.backend
        )
        return normed.view(x.shape), parts, rstd

    # ---- backward --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """[T, H] gradients by site, from `grad` [n, H], that of what `forward` gave. Once a forward."""
        found: dict[str, Tensor] = {}
        passing = self._norm_backward(grad, (self.last + 1, "pre"), self.decoder.norm)
        for half in range(self.last, self.first - 1, -1):
            if half == EMBEDDING:
                scale = self.decoder.embedding_scale
                found[self.outputs[half]] = passing if scale == 1 else passing * scale
                break
            block, few = self.decoder.blocks[half // 2], self._is_few(half)
            if half in self.streams:
                found[self.streams[half]] = self._spread(passing) if few else passing
            into = passing if block.scale == 1 else passing * block.scale
            if (post := self._post(half)) is not None:
                into = self._norm_backward(into, (half, "post"), post)
            if half in self.outputs:
                found[self.outputs[half]] = self._spread(into) if few else into
            if half == self.first:
                break
            kept = self.saved.pop(half)
            if half % 2:
                into = self._mlp_backward(block.mlp, into, kept)
            else:
                into = self._attention_backward(half // 2, into, kept)
                passing = self._spread(passing) if few else passing
            pre = self._pre(half)
            passing = into + passing if pre is None else self._norm_backward(into, (half, "pre"), pre, passing)
        return found

    def _norm_backward(self, grad: Tensor, key: Any, norm: Norm, passing: Tensor | None = None) -> Tensor:
        """The gradient of what a norm was given, from that of its output; `key` of what it saved."""
        given, rstd = self.saved.pop(key)
        return ops.add_norm_backward(grad, given, rstd, norm.weight, passing, backend=self.backend)

    def _spread(self, few: Tensor) -> Tensor:
        """[T, H]: gradients [n, H] of the scored tokens, and 0 for the others."""
        return few.new_zeros(len(self.tokens.places), few.shape[1]).index_copy_(0, self.tokens.scored, few)

    def _mlp_backward(self, mlp: Mlp, grad: Tensor, kept: Any) -> Tensor:
        gate, up = mlp.gate_up.parts(kept)
        ops.swiglu_backward_(gate, up, mlp.down.back(grad), mlp.act, backend=self.backend)
        return mlp.gate_up.back(kept)

    def _attention_backward(self, index: int, grad: Tensor, kept: Any) -> Tensor:
        part, few = self.decoder.blocks[index].attention, self._is_few(2 * index)
        q, k, v, out, lse, normed = kept
        queries, keys = self._lines(2 * index)
        own, room = self.tokens.own, part.qkv.room(grad)
        places = part.qkv.parts(room)
        norms = (None, None, None) if normed is None else (part.q_norm, part.k_norm, None)
        ready = [norm is None and own is None and not few for norm in norms]  # to be multiplied as attention leaves it
        d_q, d_k, d_v = (
            place.view(x.shape) if last else x.new_empty(x.shape)
            for place, x, last in zip(places, (q, k, v), ready, strict=True)
        )
        ops.attention_backward_(
            part.o.back(grad).view(q.shape), q, k, v, out, lse, (d_q, d_k, d_v), queries=queries, keys=keys,
            **self._options(index),
        )  # fmt: skip
        if own is not None:
            d_k, d_v = d_k[own], d_v[own]
        self._rotate(index, d_q, d_k, back=True)
        dq, dk, dv = (t.flatten(1) for t in (d_q, d_k, d_v))
        if part.q_norm is not None and part.k_norm is not None:
            dq = self._head_norm_backward(dq, part.q_norm, *normed[0])
            dk = self._head_norm_backward(dk, part.k_norm, *normed[1])
        if few:
            q_map, k_map, v_map = part.qkv.each
            return v_map.back(dv, k_map.back(dk)).index_add_(0, self.tokens.scored, q_map.back(dq))
        return part.qkv.back(part.qkv.filled(room, (dq, dk, dv)))

    def _head_norm_backward(self, grad: Tensor, norm: Norm, parts: Tensor, rstd: Tensor) -> Tensor:
        return ops.add_norm_backward(
            grad.reshape(parts.shape), parts, rstd, norm.weight, backend=self.backend
        ).view(grad.shape)  # fmt: skip

    def _pre(self, half: int) -> Norm | None:
        """The norm before a half block; the model's last one after all of them."""
        if half > self.last:
            return self.decoder.norm
        block = self.decoder.blocks[half // 2]
        return block.pre_mlp if half % 2 else block.pre_attention

    def _post(self, half: int) -> Norm | None:
        if half == EMBEDDING:
            return None
        block = self.decoder.blocks[half // 2]
        return block.post_mlp if half % 2 else block.post_attention


def _half(name: str) -> int:
    """The half block that a site follows: `EMBEDDING`, 2i for the attention of block i, 2i + 1 for its feed-forward."""
    kind, _, index = name.partition(":")
    if name == "embedding":
        return EMBEDDING
    if kind not in ("attn", "mlp", "block") or not index.isdigit():
        raise UnsupportedStack(f"the site {name!r} is neither the embedding nor at a block or one of its halves")
    return 2 * int(index) + (kind != "attn")
