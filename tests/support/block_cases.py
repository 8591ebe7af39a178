"""Random calls of a frozen block's ops and their comparison with the oracle, as `op_cases` has them for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpa_kernels.ops import block_reference as reference
from tests.support.op_cases import Args, assert_near, copied, implementation, laid_out


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


def run_against_oracle(op: str, backend: str, args: Args, tolerance: float = 2e-6) -> None:
    """Run `op` on `backend` and compare all that it returns and writes with the reference in float64.

    Results in a narrow dtype may be off by one unit in their last place besides. The case itself is not changed.
    """
    got, want = copied(args), copied(args, torch.float64)
    run = implementation(op, backend, got)
    torch.use_deterministic_algorithms(backend != "reference")  # fills what torch.empty gives a kernel with NaN
    try:
        returned = run(*got)
    finally:
        torch.use_deterministic_algorithms(False)
    dtype: Any = args[0].dtype
    if op == "add_norm":
        _compare_norm(args, returned, getattr(reference, op)(*want), tolerance)
        return
    expected = getattr(reference, op)(*want)
    if op in ("add_norm_backward", "swiglu"):
        assert returned.dtype == dtype
        assert_near(returned, expected, tolerance, op, dtype)
    else:
        for i, name in enumerate(("gate", "up")):
            assert_near(got[i], want[i], tolerance, f"the gradient of {name}", dtype)


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
