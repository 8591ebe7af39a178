"""Random calls of a frozen block's ops and their comparison with the oracle, as `op_cases` has them for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpa_kernels.ops import block_reference as reference
from tests.support.op_cases import Args, assert_near, called_on_poison, copied, laid_out


def norm_case(
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = True,
    rank: int = 0,
    attacked: bool = True,
    normed: bool = True,
    scale: float = 1.0,
    layout: str = "contiguous",
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of add_norm; `rank` is LoRA's (0 for none), `attacked` whether tokens are perturbed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return laid_out(torch.randn(*shape, generator=g).to(dtype).to(device), layout)

    rows = torch.randint(0, 3, (tokens,), generator=g)
    rows[torch.rand(tokens, generator=g) < 0.4] = -1
    return (
        normal(tokens, width),
        normal(tokens, width) if residual else None,
        normal(tokens, rank) if rank else None,
        normal(width, rank) if rank else None,
        torch.randn(3, width, generator=g).to(device) if attacked else None,
        rows.to(device) if attacked else None,
        (torch.rand(width, generator=g) + 0.5).to(device) if normed else None,
        scale,
        1e-5,
    )


def norm_backward_case(
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = True,
    layout: str = "contiguous",
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of add_norm_backward."""
    g = torch.Generator().manual_seed(seed)
    grad, r, passing = (
        laid_out(torch.randn(tokens, width, generator=g).to(dtype).to(device), layout) for _ in range(3)
    )
    rstd = (r.float().square().mean(1) + 1e-5).rsqrt()
    weight = (torch.rand(width, generator=g) + 0.5).to(device)
    return grad, r, rstd, weight, passing if residual else None


def gate_case(
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "silu",
    backward: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of swiglu or swiglu_backward_."""
    g = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(tokens, width, generator=g).to(dtype).to(device) for _ in range(2 + backward))
    return *(laid_out(t, layout) for t in tensors), activation


# of the largest entry: in narrow dtypes rotated heads and softmaxes are rounded before their products
ATTENTION_TOLERANCES = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ROWS = ((5, 3, 2), (9, 1, 1), (0, 4, 0), (3, 2, 6))  # (prefix, rejected, chosen) tokens of each row


def streams(rows: Sequence[tuple[int, int, int]], few: bool, padding: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(places, starts) of queries and of keys. few: queries are the tokens of completions alone."""
    keys, queries = [], []
    for prefix, rejected, chosen in rows:
        row = [(0, i) for i in range(prefix)]
        row += [(branch, prefix + i) for branch, count in ((1, rejected), (2, chosen)) for i in range(count)]
        row += [(-1, 0)] * padding
        keys.append(row)
        queries.append([place for place in row if not few or place[0] > 0])

    def joined(parts: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        return torch.tensor([place for part in parts for place in part]).view(-1, 2).int(), starts.int()

    return *joined(queries), *joined(keys)


def attention_case(
    dtype: torch.dtype = torch.float32,
    *,
    rows: Sequence[tuple[int, int, int]] = ROWS,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    rotated: int | None = None,
    softcap: float = 0.0,
    window: int = 0,
    few: bool = False,
    padding: int = 0,
    backward: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of attention or attention_backward_ on heads that are views of one buffer.

    Args:
        rotated: entries of each head that are rotated; all by default, 0 for no rotation.
        few: the queries are the completions' tokens alone.
        padding: tokens at the end of each row that see nothing.
    """
    g = torch.Generator().manual_seed(seed)
    q_places, q_starts, k_places, k_starts = (t.to(device) for t in streams(rows, few, padding))

    def heads_of(tokens: int, *counts: int) -> list[Tensor]:
        buffer = torch.randn(tokens, sum(counts) * width + 8, generator=g).to(dtype).to(device)
        return [t.unflatten(1, (-1, width)) for t in buffer[:, 8:].split([n * width for n in counts], 1)]

    own_q, k, v = heads_of(len(k_places), heads, kv_heads, kv_heads)
    q = heads_of(len(q_places), heads)[0] if few else own_q
    half = (width if rotated is None else rotated) // 2
    angles = torch.outer(torch.arange(128.0), torch.rand(half, generator=g)).to(device) if half else None
    longest = [int(starts.diff().max()) for starts in (q_starts, k_starts)]
    tables = (None, None) if angles is None else (angles.cos(), angles.sin())
    layout = (*tables, q_places, k_places, q_starts, k_starts, *longest, width**-0.5, softcap, window)
    if not backward:
        return q, k, v, *layout
    (grad,) = heads_of(len(q), heads)
    wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in (q, k, v, *layout))
    out, lse = reference.attention(*wide)
    into = (torch.full_like(t, float("nan")) for t in (q, k, v))
    return grad, q, k, v, out.to(dtype), lse.float(), *into, *layout


def rotate_case(dtype: torch.dtype = torch.float32, *, back: bool = False, **options: Any) -> Args:
    """A call of rotate_ on the queries and keys of `attention_case`, which says what `options` are."""
    q, k, _, cos, sin, q_places, k_places, *_ = attention_case(dtype, **options)
    return q, k, cos, sin, q_places, k_places, back


def run_against_oracle(op: str, backend: str, args: Args, tolerance: float = 2e-6) -> None:
    """Run `op` on `backend` and compare all that it returns and writes with the reference in float64.

    Results in a narrow dtype may be off by one unit in their last place besides. The case itself is not changed.
    """
    got, want = copied(args), copied(args, torch.float64)
    returned = called_on_poison(op, backend, got)
    dtype: Any = args[0].dtype
    if op == "add_norm":
        _compare_norm(args, returned, getattr(reference, op)(*want), tolerance)
        return
    expected = getattr(reference, op)(*want)
    if op.startswith("attention"):
        # together, since the gradient of a query that sees one key is 0 but for rounding
        pairs = zip(got[6:9], want[6:9], strict=True) if op != "attention" else zip(returned, expected, strict=True)
        ours, right = (torch.cat([t.double().flatten() for t in side]) for side in zip(*pairs, strict=True))
        assert_near(ours, right, ATTENTION_TOLERANCES[dtype], op)
    elif op in ("add_norm_backward", "swiglu"):
        assert returned.dtype == dtype
        assert_near(returned, expected, tolerance, op, dtype)
    else:
        names = ("q", "k") if op == "rotate_" else ("the gradient of gate", "the gradient of up")
        for i, name in enumerate(names):
            assert_near(got[i], want[i], tolerance, name, dtype)


def _compare_norm(args: Args, returned: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    r, normed, rstd = returned
    assert (r.shape, normed.shape, rstd.shape) == tuple(t.shape for t in expected)
    assert r.dtype == normed.dtype == args[0].dtype
    assert_near(r, expected[0], tolerance, "r", args[0].dtype)
    if not normed.numel():
        return
    # the norm of the r that was returned: its own rounding is allowed for above
    stream = (r if r.numel() else args[0]).double()
    _, normed_too, rstd_too = reference.add_norm(stream, *[None] * 5, args[6].double(), 1.0, args[8])
    assert_near(rstd, rstd_too, tolerance, "rstd")
    assert_near(normed, normed_too, tolerance, "normed", args[0].dtype)
