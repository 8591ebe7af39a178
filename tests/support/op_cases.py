"""Random calls of each op and their comparison with the oracle, for the tests of every backend.

A case is a tuple of the op's arguments in the schema's order. `run_against_oracle` runs a backend on a copy of it with
NaN-poisoned outputs, runs the reference in float64 on another copy, and compares everything that the op writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpa_kernels.ops import reference, registry

Args = tuple[Any, ...]
# Of the label; at the last one bf16 and log(1 - p) give up.
PROBABILITIES = (0.007, 0.9, 0.99, 0.999, 1 - 1e-7)
LAYOUTS = ("contiguous", "rows", "columns", "transposed", "expanded")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` [A, B] with other strides: gaps between rows, or between columns, transposed; "expanded" is one
    number everywhere, strides (0, 0)."""
    a, b = values.shape
    if layout == "contiguous":
        return values
    if layout == "rows":
        out = values.new_full((a, b + 8), float("nan"))[:, :b]
    elif layout == "columns":
        out = values.new_full((a, 2 * b), float("nan"))[:, ::2]
    elif layout == "transposed":
        out = values.new_empty((b, a)).t()
    elif layout == "expanded":
        return values.new_full((), 0.5).expand(a, b)
    else:
        raise ValueError(f"layout={layout!r} is unknown; use one of {LAYOUTS}")
    out.copy_(values)
    return out


def perturb_case(
    tokens: int,
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    touched: float = 0.6,
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """hidden [tokens, width], delta [rows, width], rows [tokens]; a share `touched` of the tokens is attacked."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g).to(dtype).to(device)
    delta = torch.randn(rows, width, generator=g).to(device)
    index = torch.randint(0, max(rows, 1), (tokens,), generator=g)
    index[torch.rand(tokens, generator=g) >= (touched if rows else 0.0)] = -1
    return laid_out(hidden, layout), delta, index.to(device)


def update_case(
    sites: int,
    rows: int,
    width: int,
    tokens: int,
    shares: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    rule: str = "adamw",
    norm: str = "l2",
    maximize: bool = False,
    layout: str = "contiguous",
    masked: float = 0.25,
    bad: bool = True,
    step: int = 3,
    step_size: float = 0.05,
    epsilon: float | None = None,
    per_row_epsilon: bool = False,
    weight_decay: float = 0.01,
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of pgd_update_ in the middle of an attack: S = sites, R = rows, H = width, T = tokens, K = shares.

    A share `masked` of the entries of `tokens` is -1 (and row 0 has none at all, where there are two rows or more);
    `bad` puts NaN, inf and -inf into the gradients. epsilon defaults to a radius that clips about half of the rows.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    delta, first, second = (normal(sites, rows, width) for _ in range(3))
    grads = []
    for _ in range(sites):
        grad = normal(tokens, width) * 1e-3
        if bad and grad.numel():
            spots = torch.randint(0, grad.numel(), (3,), generator=g)
            grad.view(-1)[spots] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        grads.append(laid_out(grad.to(dtype).to(device), layout))
    where = torch.randint(0, max(tokens, 1), (rows, shares), generator=g)
    where[torch.rand(rows, shares, generator=g) < (masked if tokens else 1.0)] = -1
    if rows > 1:
        where[0] = -1
    if epsilon is None:
        epsilon = math.sqrt(2 * math.log(2 * width) if norm == "linf" else width)
    radius = torch.tensor(epsilon)
    if per_row_epsilon:
        radius = radius * (0.5 + 1.5 * torch.rand(sites, rows, generator=g))
    stateful = rule in ("adamw", "adam", "rmsprop")
    return (
        delta.to(device),
        (first * 1e-3).to(device) if stateful and rule != "rmsprop" else None,
        (second.square() * 1e-6).to(device) if stateful else None,
        grads,
        where.to(device),
        torch.tensor(float(step), device=device),
        torch.tensor(step_size, device=device),
        radius.to(device),
        torch.full((sites, rows), float("nan"), device=device),
        torch.arange(sites, dtype=torch.int32, device=device),  # not zeros: the op adds to what is there
        rule,
        norm,
        maximize,
        0.9,
        0.999,
        1e-8,
        weight_decay,
    )


def loss_case(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    weighted: bool = True,
    ignored: float = 0.2,
    probability: float | None = None,
    away: bool | None = None,
    threshold: float = -5.0,
    gap: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Args:
    """A call of token_loss_ on logits [rows, vocabulary], with `gap` unused columns between rows.

    The probability of the label is `probability`, or spread over 1e-4 .. 0.9999 from row to row; `away` is the kind
    of every row, or mixed. A share `ignored` of the labels is -100 (row 0 for sure, where there are two or more).
    """
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=g)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    if rows:
        p = torch.full((rows,), probability or 0.5, dtype=torch.float64)
        if probability is None:
            p = torch.rand(rows, generator=g).double().mul(18).sub(9).sigmoid()
        others = logits.double().scatter(1, labels[:, None], float("-inf"))
        own = others.logsumexp(1) + p.logit()
        logits.scatter_(1, labels[:, None], own.float()[:, None])
    buffer = torch.full((rows, vocabulary + gap), float("nan"), dtype=dtype)
    buffer[:, :vocabulary] = logits.to(dtype)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    if rows > 1 and ignored:
        labels[0] = -100
    kinds = torch.rand(rows, generator=g) < 0.5 if away is None else torch.full((rows,), away)
    weight = torch.rand(rows, generator=g) + 0.5 if weighted else None
    return (
        buffer.to(device)[:, :vocabulary],
        labels.to(device),
        kinds.to(device),
        weight if weight is None else weight.to(device),
        threshold,
    )


def copied(args: Args, dtype: torch.dtype | None = None) -> Args:
    """A deep copy of a case that keeps strides; with `dtype`, its float tensors are converted."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        if dtype is not None and value.is_floating_point():
            return value.to(dtype)
        if 0 in value.stride() and value.numel():
            return value  # expanded, and only ever read
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return out.copy_(value)

    return tuple(one(value) for value in args)


def implementation(op: str, backend: str, args: Args) -> Callable[..., Any]:
    """The function of `backend` for this call. Raises RuntimeError where the backend cannot take it."""
    return registry.select(op, backend, args)


def assert_near(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
    name: str = "result",
    rounded_to: torch.dtype = torch.float64,
) -> None:
    """|actual - expected| <= tolerance * max |expected| everywhere, plus one unit in the last place of `rounded_to`
    (for a value rounded, or by Triton's interpreter truncated, to that dtype once). NaN never passes."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    a, e = actual.double().cpu(), expected.double().cpu()
    error = (a - e).abs()
    unit = torch.finfo(rounded_to)
    allowed = tolerance * e.abs().max() + unit.eps * e.abs().clamp(min=unit.smallest_normal)
    wrong = ~(error <= allowed)
    worst = torch.where(error.isnan(), torch.inf, error - allowed).argmax()
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {e.numel()} entries are off; the worst is {a.flatten()[worst]:.9g} where "
        f"{e.flatten()[worst]:.9g} is right (allowed {allowed.flatten()[worst]:.3g})"
    )


def called_on_poison(op: str, backend: str, args: Args) -> Any:
    """What `op` returns on `backend` where all that torch.empty gives a kernel starts as NaN."""
    run = implementation(op, backend, args)
    torch.use_deterministic_algorithms(backend != "reference")
    try:
        return run(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def run_against_oracle(op: str, backend: str, args: Args, tolerance: float = 2e-6) -> None:
    """Run `op` on `backend` and compare all that it returns and writes with the reference in float64.

    Results in a narrow dtype may be off by one unit in their last place besides. The case itself is not changed.
    """
    got, want = copied(args), copied(args, torch.float64)
    returned = called_on_poison(op, backend, got)
    expected = getattr(reference, op)(*want)
    if op == "perturb":
        assert returned.dtype == args[0].dtype
        assert_near(returned, expected, 0.0, "out", args[0].dtype)
    elif op == "pgd_update_":
        for i, name in ((0, "delta"), (1, "exp_avg"), (2, "exp_avg_sq"), (8, "norms")):
            if got[i] is not None:
                assert_near(got[i], want[i], tolerance, name)
        assert got[9].tolist() == want[9].tolist(), f"clipped is {got[9].tolist()}, not {want[9].tolist()}"
    else:
        losses, hits = returned
        assert losses.dtype == torch.float32
        assert hits.dtype == torch.bool
        assert_near(losses, expected[0], tolerance, "losses")
        assert hits.tolist() == expected[1].tolist(), "hits"
        if args[3] is None:
            assert torch.equal(got[0], args[0]), "logits changed without a weight"
        else:
            assert_near(got[0], want[0], tolerance, "logits", args[0].dtype)


def assert_losses_exact(
    backend: str, dtype: torch.dtype, away: bool, *, rows: int, vocabulary: int, threshold: float, device: str
) -> None:
    """Each row's own relative error, in float64's eyes, however sure the model is of the label or of the rest.

    Args:
        rows: of each of the `PROBABILITIES`.
    """
    options: dict[str, Any] = {"away": away, "ignored": 0.0, "device": device}
    cases = [loss_case(rows, vocabulary, dtype, probability=p, seed=i, **options) for i, p in enumerate(PROBABILITIES)]
    case = (*(torch.cat(parts) for parts in list(zip(*cases, strict=True))[:4]), threshold)
    got, want = copied(case), copied(case, torch.float64)
    losses, _ = implementation("token_loss_", backend, got)(*got)
    right, _ = reference.token_loss_(*want)
    assert (right > 0).all()
    # one float32 rounding of s = z_y - M moves a loss of exp(-|s|) by eps |s| of itself
    assert_near(losses / right, torch.ones_like(right), 3e-6, "losses / right")
    for row in range(len(right)):
        assert_near(got[0][row], want[0][row], 3e-6, f"gradient at p={PROBABILITIES[row // rows]}", dtype)
