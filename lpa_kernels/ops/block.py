"""The ops of a frozen decoder block, forward and backward by the inputs alone: norms, gate and packed attention.

T tokens, H width, F feed-forward width, D width of a head. Nothing here is differentiated by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block_reference import ACTIVATIONS
from .functional import expect, run

Low = tuple[Tensor, Tensor]


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    lora: Low | None = None,
    delta: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows a branch of a block, in one pass: LoRA's second product, perturbation, residual sum, RMS norm.

        r = residual + scale * (x + low up^T + delta[rows]),   normed = r rstd weight,   rstd = (mean(r^2) + eps)^-1/2

    r is summed in float32 and rounded once; the norm is that of the rounded r, and rounded once.

    Args:
        x: [T, H], any float dtype, the branch's product without LoRA.
        residual: [T, H] in x's dtype, or None.
        weight: [H] float32, or None for no norm.
        lora: (low [T, K], up [H, K]) in x's dtype: the scaled product with LoRA's first factor, and its second one.
        delta: [R, H] float32, and
        rows: [T] int64, the row of delta of each token, -1 for none.
        scale: of all that is added to the residual.
        eps: added to the mean square.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        r [T, H] (x itself where nothing is added to it), normed [T, H] and rstd [T] float32 (both empty without a
        weight).

    Raises:
        ValueError: the shapes do not fit, or a scale comes without a residual.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> r, normed, rstd = add_norm(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]]), torch.ones(2), eps=0.0)
    >>> r.tolist(), normed.tolist(), rstd.tolist()
    ([[3.0, 4.0]], [[0.848..., 1.131...]], [0.282...])
    """
    expect("x", x, (-1, -1))
    tokens, width = x.shape
    expect("residual", residual, (tokens, width))
    expect("weight", weight, (width,))
    expect("delta", delta, (-1, width))
    expect("rows", rows, (tokens,))
    if (delta is None) != (rows is None):
        raise ValueError("delta and rows come together; one of them is None")
    if residual is None and scale != 1:
        raise ValueError(f"scale={scale} without a residual; scale x itself")
    low, up = lora or (None, None)
    if low is not None and up is not None:
        expect("low", low, (tokens, up.shape[-1]))
        expect("up", up, (width, -1))
        if x.device.type == "cpu":  # the product of a library is faster here
            x, low, up = torch.addmm(x, low, up.t()), None, None
    args = (x, residual, low, up, delta, rows, weight, scale, eps)
    r, normed, rstd = run("add_norm", backend, args)
    return r if r.numel() else x, normed, rstd


def add_norm_backward(
    grad: Tensor, r: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The gradient of the residual stream before a norm: the norm's own plus the one that passes it by.

        residual + rstd (weight grad - r rstd^2 mean(weight grad r))

    Args:
        grad: [T, H], the gradient of the normed rows.
        r: [T, H], rstd: [T] float32, weight: [H] float32: as in `add_norm`.
        residual: [T, H], the gradient of r from all that follows, or None.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        [T, H] in r's dtype, a new tensor. At a perturbed site it is delta's gradient, by token.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> r, weight = torch.tensor([[3.0, 4.0]]), torch.ones(2)
    >>> add_norm_backward(torch.tensor([[1.0, 0.0]]), r, torch.tensor([0.08]).sqrt(), weight).tolist()
    [[0.181..., -0.135...]]
    """
    expect("r", r, (-1, -1))
    for name, tensor in (("grad", grad), ("residual", residual)):
        expect(name, tensor, r.shape)
    expect("rstd", rstd, r.shape[:1])
    expect("weight", weight, r.shape[1:])
    return run("add_norm_backward", backend, (grad, r, rstd, weight, residual))


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return name


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str = "auto") -> Tensor:
    """activation(gate) * up, computed in float32 and rounded once.

    Args:
        gate, up: [T, F], any float dtype; halves of one product may be given as views.
        activation: "silu", or "gelu_tanh" for GELU's approximation by tanh.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        [T, F] in gate's dtype.

    Raises:
        ValueError: the shapes do not fit, or the activation is unknown.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> swiglu(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 2.0]])).tolist()
    [[0.0, 1.462...]]
    """
    expect("gate", gate, (-1, -1))
    expect("up", up, gate.shape)
    return run("swiglu", backend, (gate, up, _activation(activation)))


def swiglu_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str = "silu", *, backend: str = "auto"
) -> None:
    """Overwrite gate and up by their gradients.

    Args:
        gate, up, activation, backend: as in `swiglu`.
        grad: [T, F], the gradient of its result.

    Raises:
        ValueError: the shapes do not fit, or the activation is unknown.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> gate, up = torch.tensor([[0.0]]), torch.tensor([[5.0]])
    >>> swiglu_backward_(gate, up, torch.tensor([[1.0]]))
    >>> gate.tolist(), up.tolist()
    ([[2.5]], [[0.0]])
    """
    expect("gate", gate, (-1, -1))
    for name, tensor in (("up", up), ("grad", grad)):
        expect(name, tensor, gate.shape)
    run("swiglu_backward_", backend, (gate, up, grad, _activation(activation)), written=(gate, up))


class Stream(NamedTuple):
    """Where the tokens of several rows stand in one line, and what each may see.

    A query sees a key of its own row and branch, or of branch 0 of its row, at its own position or before. A token
    of branch -1 is padding: it sees nothing and nothing sees it.

    Attributes:
        places: [T, 2] int32, branch and position of each token.
        starts: [B + 1] int32, ascending from 0 to T: row i is the tokens starts[i] to starts[i + 1].
        longest: tokens of the longest row.
    """

    places: Tensor
    starts: Tensor
    longest: int


def _expect_rotation(rotation: tuple[Tensor, Tensor], width: int) -> None:
    cos, sin = rotation
    expect("cos", cos, (-1, -1))
    expect("sin", sin, cos.shape)
    if 2 * cos.shape[1] > width:
        raise ValueError(f"cos is {cos.shape[1]} wide; a head of {width} has {width // 2} pairs to rotate")


def rotate_(
    q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor], q_places: Tensor, k_places: Tensor, *, back: bool = False,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Rotate queries and keys by their positions, where they are: once for all that reads them.

    The first 2R entries of each head, (a, b), become (a cos - b sin, b cos + a sin), in float32 and rounded once.

    Args:
        q: [Tq, heads, D], k: [Tk, kv heads, D], any float dtype; views of one product may be given. They are written.
        rotation: cos and sin, [P, R] float32 by position, R at most D / 2.
        q_places, k_places: [T, 2] int32, branch and position of each token, as in `Stream`.
        back: the other way round, which is the gradient's way.
        backend: "auto", "reference", "triton" or "native".

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> q, k, places = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[0, 1]]).int()
    >>> rotate_(q, k, (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])), places, places)
    >>> q.tolist(), k.tolist()
    ([[[0.0, 1.0]]], [[[-2.0, 0.0]]])
    """
    expect("q", q, (-1, -1, -1))
    expect("k", k, (-1, -1, q.shape[2]))
    _expect_rotation(rotation, q.shape[2])
    for name, tensor, places in (("q", q, q_places), ("k", k, k_places)):
        expect(f"the places of {name}", places, (len(tensor), 2))
    run("rotate_", backend, (q, k, *rotation, q_places, k_places, back), written=(q, k))


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, queries: Stream, keys: Stream
) -> tuple[Tensor | int | None, ...]:
    expect("q", q, (-1, -1, -1))
    expect("k", k, (-1, -1, q.shape[2]))
    expect("v", v, k.shape)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected a multiple")
    for name, tensor, stream in (("q", q, queries), ("k", k, keys)):
        expect(f"the places of {name}", stream.places, (tensor.shape[0], 2))
        expect(f"the starts of {name}", stream.starts, queries.starts.shape)
    cos, sin = rotation or (None, None)
    if rotation is not None:
        _expect_rotation(rotation, q.shape[2])
    return (cos, sin, queries.places, keys.places, queries.starts, keys.starts, queries.longest, keys.longest)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    queries: Stream,
    keys: Stream,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention within rows and branches, with the rotation inside and no mask in memory.

    Scores are scale * q' k', or softcap * tanh(scale * q' k' / softcap); products are summed and the softmax taken in
    float32. q' and k' are q and k with the first 2R entries of each head rotated: (a, b) becomes
    (a cos - b sin, b cos + a sin) by the row of its position.

    Args:
        q: [Tq, heads, D], k, v: [Tk, kv heads, D], any float dtype; views of one product may be given. `heads` is a
            multiple of `kv heads`, which groups of neighbouring heads share.
        rotation: cos and sin, [P, R] float32 by position, R at most D / 2; None where nothing is rotated.
        queries, keys: the streams of q and of k and v, of as many rows. Queries may be fewer, as in a last block.
        scale: of the scores.
        softcap: 0 for none.
        window: how many positions back a query sees, its own among them; 0 for all.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        out [Tq, heads, D] in q's dtype, 0 for a query that sees nothing; and the logsumexp of each query's scores,
        [heads, Tq] float32.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: the named backend cannot take this call; the message says why.

    >>> stream = Stream(torch.tensor([[0, 0], [1, 1], [2, 1]]).int(), torch.tensor([0, 3]).int(), 3)
    >>> zeros, v = torch.zeros(3, 1, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[4.0, 4.0]]])
    >>> attention(zeros, zeros, v, None, stream, stream, scale=1.0)[0].tolist()
    [[[1.0, 0.0]], [[0.5, 1.0]], [[2.5, 2.0]]]
    """
    layout = _attention_arguments(q, k, v, rotation, queries, keys)
    return run("attention", backend, (q, k, v, *layout, scale, softcap, window))


def attention_backward_(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    rotation: tuple[Tensor, Tensor] | None,
    queries: Stream,
    keys: Stream,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    backend: str = "auto",
) -> None:
    """Write the gradients of attention's q, k and v.

    Args:
        grad: [Tq, heads, D], the gradient of `out`.
        q, k, v, rotation, queries, keys, scale, softcap, window, backend: as `attention` got them.
        out, lse: what it gave.
        into: where the gradients go, tensors of the shapes of q, k and v; views of one buffer may be given.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: the named backend cannot take this call; the message says why.
    """
    layout = _attention_arguments(q, k, v, rotation, queries, keys)
    for name, tensor, like in zip(
        ("grad", "out", "d_q", "d_k", "d_v"), (grad, out, *into), (q, q, q, k, v), strict=True
    ):
        expect(name, tensor, like.shape)
    expect("lse", lse, q.shape[1::-1])
    args = (grad, q, k, v, out, lse, *into, *layout, scale, softcap, window)
    run("attention_backward_", backend, args, written=into)
