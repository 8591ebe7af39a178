"""The oracle of a frozen block's ops in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry

ACTIVATIONS = ("silu", "gelu_tanh")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    added = x.new_empty(0) if r is x else r
    if weight is None:
        return added, x.new_empty(0), _wide(x.new_empty(0))
    values = _wide(r)
    rstd = torch.linalg.vector_norm(values, dim=-1).square_().div_(max(x.shape[1], 1)).add_(eps).rsqrt_()
    return added, (values * rstd[:, None]).mul_(weight).to(x.dtype), rstd


def add_norm_backward(grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of r [T, H] from that of its norm, plus `residual`, the gradient that passes the norm by."""
    scaled, values, factor = _wide(grad) * weight, _wide(r), rstd[:, None]
    along = torch.linalg.vecdot(scaled, values)[:, None].mul_(factor**3).div_(-max(r.shape[1], 1))
    out = scaled.mul_(factor).addcmul_(values, along)
    return (out if residual is None else out.add_(residual)).to(r.dtype)


# ---- the gate --------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, all [T, F]."""
    x = _wide(gate)
    return (F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")).mul_(up).to(gate.dtype)


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    """Overwrite gate and up [T, F] by their gradients, from `grad` [T, F], that of activation(gate) * up."""
    x, g = _wide(gate), _wide(grad)
    if activation == "silu":
        active, slope = F.silu(x), torch.ops.aten.silu_backward(g * up, x)
    else:
        active = F.gelu(x, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(g * up, x, approximate="tanh")
    up.copy_(active.mul_(g))
    gate.copy_(slope)


# ---- attention -------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor) -> Tensor:
    """x [T, heads, D], the first 2R entries of each head rotated by the row of cos and sin [P, R] of its position."""
    if cos is None or sin is None:
        return x
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b, rest = x.split([c.shape[-1], c.shape[-1], x.shape[-1] - 2 * c.shape[-1]], -1)
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


class _Rows(NamedTuple):
    """Queries and keys of the rows of a stream side by side, padded to the longest row.

    Attributes:
        q: [B, kv heads, m * queries, D], the m heads of a group one after the other. k, v: [B, kv heads, keys, D].
        seen: [B, 1, queries, keys] bool. tokens: [B, queries] and [B, keys], their numbers in the streams.
        real: [B, queries] and [B, keys] bool, False where a row is shorter than the longest.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    tokens: tuple[Tensor, Tensor]
    real: tuple[Tensor, Tensor]


def _padded(starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """[B, longest]: the number of each token of each row, and whether the row has it."""
    index = starts[:-1, None] + torch.arange(longest, device=starts.device)
    real = index < starts[1:, None]
    return torch.where(real, index, 0), real


def _rows(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, window: int,
) -> _Rows:  # fmt: skip
    queries, keys = _padded(q_starts, longest_q), _padded(k_starts, longest_k)
    q_branch, q_position = q_places[queries[0]].unbind(-1)
    k_branch, k_position = k_places[keys[0]].unbind(-1)
    seen = seen_by(q_branch[:, :, None], q_position[:, :, None], k_branch[:, None], k_position[:, None], window)
    seen &= queries[1][:, :, None] & keys[1][:, None]
    size, groups, width = len(seen), q.shape[1] // k.shape[1], q.shape[2]
    q = rotated(_wide(q), cos, sin, q_places[:, 1])[queries[0]].transpose(1, 2)
    k = rotated(_wide(k), cos, sin, k_places[:, 1])[keys[0]].transpose(1, 2)
    v = _wide(v)[keys[0]].transpose(1, 2)
    q = q.reshape(size, -1, groups * longest_q, width)
    return _Rows(q, k, v, seen[:, None], (queries[0], keys[0]), (queries[1], keys[1]))


def seen_by(q_branch: Tensor, q_position: Tensor, k_branch: Tensor, k_position: Tensor, window: int) -> Tensor:
    """Whether a query sees a key: of its own branch or of the shared prefix (0), not later, and within the window."""
    allowed = (k_branch >= 0) & (q_branch >= 0) & ((k_branch == q_branch) | (k_branch == 0))
    allowed &= k_position <= q_position
    return allowed & (q_position - k_position < window) if window else allowed


def _scores(rows: _Rows, scale: float, softcap: float) -> Tensor:
    """[B, kv heads, m, queries, keys], before the mask."""
    scores = (rows.q @ rows.k.transpose(-1, -2)).mul_(scale)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores.unflatten(2, (-1, rows.seen.shape[2]))


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within the rows of a stream, as `lpa_kernels.ops.attention`."""
    rows = _rows(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, longest_q, longest_k, window)
    scores = _scores(rows, scale, softcap).masked_fill_(~rows.seen[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    lse = torch.where(lse == float("-inf"), 0, lse)  # of a query that sees nothing
    found = scores.sub_(lse[..., None]).exp_().flatten(2, 3) @ rows.v
    index, real = rows.tokens[0], rows.real[0]
    out = q.new_zeros(q.shape)
    out[index[real]] = found.unflatten(2, lse.shape[2:]).flatten(1, 2).transpose(1, 2)[real].to(q.dtype)
    logsums = lse.new_zeros(q.shape[1::-1])
    logsums[:, index[real]] = lse.flatten(1, 2).transpose(0, 1)[:, real]
    return out, logsums


def attention_backward_(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_places: Tensor, k_places: Tensor, q_starts: Tensor, k_starts: Tensor,
    longest_q: int, longest_k: int, scale: float, softcap: float, window: int,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, as `lpa_kernels.ops.attention_backward_`."""
    rows = _rows(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, longest_q, longest_k, window)
    scores = _scores(rows, scale, softcap)
    (index, keys), (real, real_keys) = rows.tokens, rows.real

    def by_head(x: Tensor) -> Tensor:
        return _wide(x)[index].masked_fill_(~real[..., None, None], 0).transpose(1, 2).reshape(rows.q.shape)

    d_out = by_head(grad)
    own = (d_out * by_head(out)).sum(-1).unflatten(2, scores.shape[2:4])
    stored = lse[:, index].transpose(0, 1).reshape(own.shape)
    p = (scores - stored[..., None]).exp_().masked_fill_(~rows.seen[:, None], 0)
    slope = p * ((d_out @ rows.v.transpose(-1, -2)).view(p.shape) - own[..., None])
    if softcap:
        slope *= 1 - (scores / softcap).square()
    slope, p = slope.mul_(scale).flatten(2, 3), p.flatten(2, 3)

    def turned_back(x: Tensor, positions: Tensor) -> Tensor:
        return rotated(x, cos, None if sin is None else -sin, positions)

    found_q = (slope @ rows.k).unflatten(2, scores.shape[2:4]).flatten(1, 2).transpose(1, 2)[real]
    d_q[index[real]] = turned_back(found_q, q_places[index[real], 1]).to(d_q.dtype)
    found_k = (slope.transpose(-1, -2) @ rows.q).transpose(1, 2)[real_keys]
    d_k[keys[real_keys]] = turned_back(found_k, k_places[keys[real_keys], 1]).to(d_k.dtype)
    d_v[keys[real_keys]] = (p.transpose(-1, -2) @ d_out).transpose(1, 2)[real_keys].to(d_v.dtype)


def _takes(*args: object) -> str | None:
    return None


for _op in (add_norm, add_norm_backward, swiglu, swiglu_backward_, attention, attention_backward_):
    registry.register(_op.__name__, "reference", _op, _takes)
