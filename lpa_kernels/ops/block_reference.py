"""The oracle of a frozen block's ops in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import registry

T = TypeVar("T")
ACTIVATIONS = ("silu", "gelu_tanh")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ---- norms -----------------------------------------------------------------------------------------------------------


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    delta: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream after a branch, its RMS norm and that norm's factor, as `lpa_kernels.ops.add_norm`.

    The first result is empty where nothing is added to x, the other two where there is no weight.
    """
    y = x
    if low is not None and up is not None:
        y = torch.addmm(_wide(y), _wide(low), _wide(up).t())
    if delta is not None and rows is not None and len(delta):
        y = torch.where((rows >= 0)[:, None], _wide(y) + delta[rows.clamp(min=0)], _wide(y))
    if residual is not None:
        y = torch.add(_wide(residual), _wide(y), alpha=scale)
    r = y.to(x.dtype) if y is not x else x
    added = x.new_empty(0) if r is x else r.contiguous()
    if weight is None:
        return added, x.new_empty(0), _wide(x.new_empty(0))
    values = _wide(r)
    rstd = torch.linalg.vector_norm(values, dim=-1).square_().div_(max(x.shape[1], 1)).add_(eps).rsqrt_()
    return added, (values * rstd[:, None]).mul_(weight).to(x.dtype).contiguous(), rstd


def add_norm_backward(grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of r [T, H] from that of its norm, plus `residual`, the gradient that passes the norm by."""
    scaled, values, factor = _wide(grad) * weight, _wide(r), rstd[:, None]
    along = torch.linalg.vecdot(scaled, values)[:, None].mul_(factor**3).div_(-max(r.shape[1], 1))
    out = scaled.mul_(factor).addcmul_(values, along)
    return (out if residual is None else out.add_(residual)).to(r.dtype).contiguous()


# ---- the gate --------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, all [T, F]."""
    x = _wide(gate)
    return (F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")).mul_(up).to(gate.dtype).contiguous()


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    """Overwrite gate and up [T, F] by their gradients, from `grad` [T, F], that of activation(gate) * up."""
    x, g = _wide(gate), _wide(grad)
    if activation == "silu":
        active, slope = F.silu(x), torch.ops.aten.silu_backward(g * up, x)
    else:
        active = F.gelu(x, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(g * up, x, approximate="tanh")
    torch.mul(active, g, out=up)
    gate.copy_(slope)


# ---- attention -------------------------------------------------------------------------------------------------------


_kept = WeakTensorKeyDictionary()


def _kept_with(first: Tensor, others: Sequence[Tensor], key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives of these tensors: made once for as long as `first` lives and none is another or written to."""
    if any(t.is_inference() for t in (first, *others)):
        return make()
    made: dict[Hashable, Any] = _kept.setdefault(first, {})
    versions = [t._version for t in (first, *others)]
    refs, before, found = made.get(key, ((), None, None))
    if before != versions or any(ref() is not t for ref, t in zip(refs, others, strict=True)):
        found = make()
        made[key] = [weakref.ref(t) for t in others], versions, found
    return cast(T, found)


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, places: Tensor, back: bool = False) -> Tensor:
    """x [T, heads, D], the first 2R entries of each head rotated by the row of cos and sin [P, R] of its position.

    Args:
        places: [T, 2], branch and position of each token. back: the other way round.
    """
    if cos is None or sin is None:
        return x
    turns = partial(_turns, cos, sin, places, back)
    own, other = _kept_with(places, (cos, sin), ("turns", id(cos), back), turns)
    width = own.shape[-1]
    part = x[..., :width]
    turned = (part * own).addcmul_(part.roll(width // 2, -1), other)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def rotate_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_places: Tensor, k_places: Tensor, back: bool
) -> None:  # fmt: skip
    """Rotate q and k where they are, as `lpa_kernels.ops.rotate_`."""
    for x, places in ((q, q_places), (k, k_places)):
        x.copy_(rotated(_wide(x), cos, sin, places, back))


def _turns(cos: Tensor, sin: Tensor, places: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """[T, 1, 2R] each: what an entry is multiplied by, and what its partner in the other half is."""
    c, s = cos[places[:, 1]][:, None], sin[places[:, 1]][:, None]
    return torch.cat([c, c], -1), torch.cat([s, -s] if back else [-s, s], -1)


class _Side(NamedTuple):
    """The rows of one stream side by side, padded to the longest.

    Attributes:
        tokens: [B, n], their numbers in the stream. real: [B, n] bool, False past the end of a row; None where every
            row is as long as the longest, so that padding is a view.
        places: [T], where each token of the stream stands in [B * n].
    """

    tokens: Tensor
    real: Tensor | None
    places: Tensor

    def padded(self, x: Tensor) -> Tensor:
        """[B, heads, n, D] of x [T, heads, D]."""
        rows = x.view(*self.tokens.shape, *x.shape[1:]) if self.real is None else x[self.tokens]
        return rows.transpose(1, 2)

    def write(self, x: Tensor, into: Tensor) -> None:
        """x [B, n, ...] into `into` [T, ...], without its padding."""
        if self.real is None:
            into.copy_(x.flatten(0, 1))
        else:
            into.copy_(x.flatten(0, 1)[self.places])  # a mask as an index would wait for a GPU


def _side(starts: Tensor, longest: int, tokens: int) -> _Side:
    index = starts[:-1, None] + torch.arange(longest, device=starts.device)
    real = index < starts[1:, None]
    number = torch.arange(tokens, device=starts.device)
    row = torch.bucketize(number, starts[1:], right=True)
    whole = index.numel() == tokens
    places = row * longest + number - starts[row]
    return _Side(index if whole else torch.where(real, index, 0), None if whole else real, places)


class _Seen(NamedTuple):
    """What the queries of the rows of a stream see, side by side and padded to the longest row.

    Attributes:
        bias: [B, 1, m * queries, keys], 0 where a key is seen, else -inf; 0 in all of a query that sees nothing.
        blind: [B, 1, m * queries, 1], which queries see nothing, past the end of a row among them; None for none.
        queries, keys: where they stand in their streams.
    """

    bias: Tensor
    blind: Tensor | None
    queries: _Side
    keys: _Side


class _Rows(NamedTuple):
    """Queries and keys of the rows of a stream, as `seen` has them.

    Attributes:
        q: [B, kv heads, m * queries, D], the m heads of a group one after the other.
        k, v: [B, kv heads, keys, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: _Seen

    def sighted(self, x: Tensor) -> Tensor:
        """x as q is, 0 for queries that see nothing."""
        return x if self.seen.blind is None else x.masked_fill(self.seen.blind, 0)

    def by_head(self, x: Tensor) -> Tensor:
        """x [Tq, heads, ...] as q is, 0 for queries that see nothing."""
        return self.sighted(self.seen.queries.padded(_wide(x)).reshape(*self.q.shape[:3], -1))

    def by_token(self, x: Tensor) -> Tensor:
        """[B, queries, heads, D] of x as q is."""
        return x.reshape(len(x), -1, self.seen.queries.tokens.shape[1], x.shape[3]).transpose(1, 2)

    def scores(self, scale: float, softcap: float) -> Tensor:
        """[B, kv heads, m * queries, keys], before the mask."""
        scores = (self.q @ self.k.transpose(-1, -2)).mul_(scale)
        return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _rows(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, window: int,
) -> _Rows:  # fmt: skip
    q, k, v = rotated(_wide(q), cos, sin, q_places), rotated(_wide(k), cos, sin, k_places), _wide(v)
    group = q.shape[1] // k.shape[1]
    seen = _kept_with(
        q_places, (k_places, q_starts, k_starts), (longest_q, longest_k, window, group, q.dtype),
        partial(_seen, q_places, k_places, q_starts, k_starts, longest_q, longest_k, window, group, q.dtype),
    )  # fmt: skip
    q, k, v = seen.queries.padded(q), seen.keys.padded(k), seen.keys.padded(v)
    return _Rows(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, seen)


def _seen(
    q_places: Tensor, k_places: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, window: int,
    group: int, dtype: torch.dtype,
) -> _Seen:  # fmt: skip
    queries, keys = _side(q_starts, longest_q, len(q_places)), _side(k_starts, longest_k, len(k_places))
    q_branch, q_position = q_places[queries.tokens].unbind(-1)
    k_branch, k_position = k_places[keys.tokens].unbind(-1)
    seen = seen_by(q_branch[:, :, None], q_position[:, :, None], k_branch[:, None], k_position[:, None], window)
    for side, real in ((queries, queries.real), (keys, keys.real)):
        if real is not None:
            seen &= real[:, :, None] if side is queries else real[:, None]
    seen = seen.repeat(1, group, 1)[:, None]
    blind = ~seen.any(-1, keepdim=True)
    bias = torch.zeros_like(seen, dtype=dtype).masked_fill_(~(seen | blind), float("-inf"))
    none = blind.device.type == "cpu" and not bool(blind.any())  # a GPU would be waited for
    return _Seen(bias, None if none else blind, queries, keys)


def seen_by(q_branch: Tensor, q_position: Tensor, k_branch: Tensor, k_position: Tensor, window: int) -> Tensor:
    """Whether a query sees a key: of its own branch or of the shared prefix (0), not later, and within the window."""
    allowed = (k_branch >= 0) & (q_branch >= 0) & ((k_branch == q_branch) | (k_branch == 0))
    allowed &= k_position <= q_position
    return allowed & (q_position - k_position < window) if window else allowed


def _in_torch(rows: _Rows, softcap: float) -> bool:
    """Whether torch's own kernels for a CPU do it, tile by tile in the caches. (Their softmax takes -inf as it is.)"""
    return rows.q.device.type == "cpu" and rows.q.dtype == torch.float32 and not softcap


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within the rows of a stream, as `lpa_kernels.ops.attention`."""
    out, logsums = torch.empty_like(q, memory_format=torch.contiguous_format), _wide(q.new_zeros(q.shape[1::-1]))
    if not q.numel() or not len(k):
        return out.zero_(), logsums
    rows = _rows(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, longest_q, longest_k, window)
    if _in_torch(rows, softcap):
        found, lse = _flash(rows.q, rows.k, rows.v, attn_mask=rows.seen.bias, scale=scale)
    else:
        scores = rows.scores(scale, softcap).add_(rows.seen.bias)
        found, lse = scores.softmax(-1) @ rows.v, scores.logsumexp(-1)
    rows.seen.queries.write(rows.by_token(rows.sighted(found)), out)
    rows.seen.queries.write(rows.by_token(rows.sighted(lse[..., None]))[..., 0], logsums.t())
    return out, logsums


def attention_backward_(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor, q_starts: Tensor, k_starts: Tensor,
    longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, as `lpa_kernels.ops.attention_backward_`."""
    if not q.numel() or not len(k):
        for into in (d_q, d_k, d_v):
            into.zero_()
        return
    rows = _rows(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, longest_q, longest_k, window)
    seen, d_out, o = rows.seen, rows.by_head(grad), rows.by_head(out)
    stored = rows.by_head(lse.t()[..., None])
    if _in_torch(rows, softcap):
        found = _flash_backward(
            d_out, rows.q, rows.k, rows.v, o, stored[..., 0].contiguous(), 0.0, False, attn_mask=seen.bias, scale=scale
        )
    else:
        scores = rows.scores(scale, softcap)
        p = (scores + seen.bias).sub_(stored).exp_()
        slope = (d_out @ rows.v.transpose(-1, -2)).sub_(torch.linalg.vecdot(d_out, o)[..., None]).mul_(p).mul_(scale)
        if softcap:
            slope *= 1 - (scores / softcap).square()
        found = slope @ rows.k, slope.transpose(-1, -2) @ rows.q, p.transpose(-1, -2) @ d_out
    by_token = rows.by_token(found[0]), found[1].transpose(1, 2), found[2].transpose(1, 2)
    for x, side, places, into in zip(
        by_token, (seen.queries, seen.keys, seen.keys), (q_places, k_places, None), (d_q, d_k, d_v), strict=True
    ):
        if places is None or cos is None:
            side.write(x, into)
        else:
            whole = x.new_empty(into.shape)
            side.write(x, whole)
            into.copy_(rotated(whole, cos, sin, places, back=True))


def _takes(*args: object) -> str | None:
    return None


for _op in (add_norm, add_norm_backward, swiglu, swiglu_backward_, rotate_, attention, attention_backward_):
    registry.register(_op.__name__, "reference", _op, _takes)
