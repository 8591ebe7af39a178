"""The op benchmarks: each op beside what a user would write otherwise, as functions that do the same work.

A way is made from a group's data and gives the function to time: `called` calls a function on the data, `compiled`
does so by torch.compile, `backward` times the gradient of a graph that stands, `through` forward and backward.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Run, device
from lpa_kernels import linear_token_loss, perturb, pgd_update_, token_loss_
from lpa_kernels.ops import (
    Stream,
    add_norm,
    add_norm_backward,
    attention,
    attention_backward_,
    native,
    registry,
    rotate_,
    swiglu,
    swiglu_backward_,
)

LR, EPSILON, BETAS, EPS, DECAY = 1e-3, 6.0, (0.9, 0.999), 1e-8, 0.01
Way = Callable[..., Run]  # from a group's data


@dataclass(frozen=True)
class Case:
    """One way of doing one thing.

    Attributes:
        group: what is done, with its shape: cases of one group do the same work.
        name: how.
        make: allocates, and returns the function to time.
        moved: bytes that this work must read and write at the least, in whichever way (0: not counted).
        operations: floating-point operations of its matrix products (0: not counted).
    """

    group: str
    name: str
    make: Callable[[], Run]
    moved: int = 0
    operations: int = 0


def cases(
    group: str, data: Callable[[], tuple[Any, ...]], ways: Mapping[str, Way], moved: int = 0, operations: int = 0
) -> list[Case]:
    """The ways of one group, each on data of its own."""
    return [Case(group, name, lambda way=way: way(*data()), moved, operations) for name, way in ways.items()]


def called(function: Callable[..., object]) -> Way:
    return lambda *data: partial(function, *data)


def compiled(function: Callable[..., object]) -> Way:
    return lambda *data: partial(torch.compile(function, dynamic=False), *data)


def through(function: Callable[..., Tensor]) -> Way:
    """Forward and backward, for the first of the data."""
    return lambda first, *rest: lambda: torch.autograd.grad(function(first, *rest), first)


def backward(function: Callable[..., Any], inputs: int) -> Way:
    """The backward pass for the first `inputs` of the data, again and again."""

    def make(*data: Any) -> Run:
        leaves = [t.detach().requires_grad_() for t in data[:inputs]]
        out = function(*leaves, *data[inputs:])
        outs = list(out) if isinstance(out, tuple) else [out]
        grads = [torch.randn_like(o) for o in outs]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return make


def own_backends(op: str) -> list[str]:
    """The fast backends that can run an op on this device; the reference where there is none: it is far slower."""
    fast = ("triton", "native") if device() == "cuda" else ("native",)
    there = [b for b in fast if (op, b) in registry.table()]
    return [b for b in there if b != "native" or native.built_for(op, device())] or ["reference"]


def ours(op: str, way: Callable[[str], Way], what: str = "") -> dict[str, Way]:
    """A way of this package on each backend."""
    return {f"ours{what} ({backend})": way(backend) for backend in own_backends(op)}


def liger(name: str, function: Callable[[Any], Way]) -> dict[str, Way]:
    """A way by Liger's functions, which need a GPU; none where Liger is not installed."""
    if device() != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional

    return {name: function(functional)}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device()).to(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the perturbations' update ---------------------------------------------------------------------------------------


def project_eagerly(delta: Tensor) -> None:
    """The projection of the public code: norms, then a division by the clamped scale."""
    norms = torch.norm(delta, dim=-1, keepdim=True)
    delta.div_(torch.clamp(norms / EPSILON, min=1))


def adamw_and_projection(delta: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor) -> None:
    """One AdamW step and the projection in plain operations; torch.compile's input."""
    g = torch.where(grad.isnan(), 0, grad).float()
    delta.mul_(1 - LR * DECAY)
    m.lerp_(g, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    denominator = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    delta.sub_(LR * (m / (1 - BETAS[0] ** step)) / denominator)
    delta.div_((torch.linalg.vector_norm(delta, dim=-1, keepdim=True) / EPSILON).clamp(min=1))


def update_cases(sites: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """pgd_update_ on float32 delta [sites, rows, width]; gradients of `dtype`, which torch's optimisers get cast."""
    where, shape = device(), (sites, rows, width)
    size = sites * rows * width * 4

    def data() -> tuple[Any, ...]:
        delta, m, v = (torch.zeros(shape, device=where) for _ in range(3))
        return delta, m, v, normal(*shape, dtype=dtype), torch.tensor(3.0, device=where)

    def fused(backend: str) -> Way:
        def make(delta: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor) -> Run:
            tokens = torch.arange(rows, device=where)[:, None]
            lr, epsilon = (torch.tensor(x, device=where) for x in (LR, EPSILON))
            counts = torch.zeros(shape[:2], device=where), torch.zeros(sites, dtype=torch.int32, device=where)
            return lambda: pgd_update_(
                delta, list(grad), tokens, exp_avg=m, exp_avg_sq=v, step=step, step_size=lr, epsilon=epsilon,
                norms=counts[0], clipped=counts[1], backend=backend,
            )  # fmt: skip

        return make

    def optimizer(**options: bool) -> Way:
        def make(delta: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor) -> Run:
            params = [d.requires_grad_() for d in delta]
            adamw = torch.optim.AdamW(params, lr=LR, **options)

            @torch.no_grad()
            def run() -> None:
                for p, g in zip(params, grad, strict=True):
                    p.grad = g.float()  # the same tensor where it is float32
                adamw.step()
                for p in params:
                    project_eagerly(p)

            return run

        return make

    ways = ours("pgd_update_", fused) | {
        "torch AdamW foreach + projection": optimizer(foreach=True),
        "torch AdamW fused + projection": optimizer(fused=True),
        "torch.compile": compiled(adamw_and_projection),
    }
    # reads delta, m, v and the gradient, and writes delta, m, v
    group = f"pgd_update_ [{sites}, {rows}, {width}] {short(dtype)}"
    return cases(group, data, ways, 6 * size + size // 4 * dtype.itemsize)


# ---- losses ----------------------------------------------------------------------------------------------------------


def public_away(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p) as two logsumexps and a masked copy, the way LAT code bases compute it; mean over rows."""
    everything = torch.logsumexp(logits, dim=-1)
    mask = torch.zeros_like(logits).scatter_(-1, labels.unsqueeze(-1), 1.0)
    rest = torch.logsumexp(logits * (1 - mask) + mask * -1e10, dim=-1)
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = everything - rest
    return torch.where(own - everything < -5.0, 0.0, loss).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def loss_cases(rows: int, vocabulary: int, dtype: torch.dtype) -> list[Case]:
    """Token losses of logits [rows, vocabulary], forward and backward."""
    where = device()

    def data() -> tuple[Tensor, Tensor]:
        logits = normal(rows, vocabulary, dtype=dtype).requires_grad_()
        return logits, torch.randint(0, vocabulary, (rows,), device=where)

    def fused(away: bool) -> Callable[[str], Way]:
        def make(backend: str, logits: Tensor, labels: Tensor) -> Run:
            kinds, weight = torch.full((rows,), away, device=where), torch.full((rows,), 1 / rows, device=where)
            own = logits.detach()
            # no threshold: the labels are unlikely, and a row that "away" leaves alone would cost next to nothing
            return lambda: token_loss_(own, labels, kinds, weight, -math.inf, backend=backend)

        return lambda backend: partial(make, backend)

    ways = {
        **ours("token_loss_", fused(False), ", toward"),
        **ours("token_loss_", fused(True), ", away"),
        "eager F.cross_entropy": through(cross_entropy),
        "torch.compile of F.cross_entropy": through(torch.compile(cross_entropy, dynamic=False)),
        "eager away, two logsumexps": through(public_away),
        **liger("Liger's cross entropy", lambda f: through(lambda z, y: f.liger_cross_entropy(z, y))),
    }
    group = f"token_loss_ [{rows}, {vocabulary}] {short(dtype)}, forward and backward"
    # read and written; a GPU's L2 keeps a row for the second reading
    return cases(group, data, ways, (2 if where == "cuda" else 3) * rows * vocabulary * dtype.itemsize)


def linear_loss_cases(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """The loss straight from hidden states [rows, width] and a frozen head [vocabulary, width]."""
    where = device()

    def data() -> tuple[Tensor, Tensor, Tensor]:
        head = (torch.randn(vocabulary, width, device=where) / width**0.5).to(dtype)
        labels = torch.randint(0, vocabulary, (rows,), device=where)
        return normal(rows, width, dtype=dtype).requires_grad_(), head, labels

    def fused(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return linear_token_loss(hidden, head, labels, torch.zeros_like(labels, dtype=torch.bool))[0].mean()

    ways = {
        "ours": through(fused),
        "eager F.linear and F.cross_entropy": through(lambda h, w, y: F.cross_entropy(h @ w.T, y)),
    }
    if torchs := getattr(F, "linear_cross_entropy", None):
        ways["F.linear_cross_entropy"] = through(torchs)
    ways |= liger("Liger", lambda f: through(lambda h, w, y: f.liger_fused_linear_cross_entropy(h, w, y)))
    kind = "" if dtype == torch.float32 else f" {short(dtype)}"
    group = f"linear_token_loss [{rows}, {width}] x [{vocabulary}, {width}]{kind}, forward and backward"
    return cases(group, data, ways)


def perturb_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Adding delta to every second token of hidden [tokens, width]."""
    rows = tokens // 2

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = torch.full((tokens,), -1, device=device())
        index[::2] = torch.arange(rows, device=device())
        return normal(tokens, width, dtype=dtype), normal(rows, width), index, index >= 0

    def eager(hidden: Tensor, delta: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        out = hidden.clone()
        out[mask] = out[mask] + delta.to(dtype)
        return out

    def selected(hidden: Tensor, delta: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        added = torch.where(mask[:, None], delta[index.clamp(min=0)], 0)
        return (hidden.float() + added).to(dtype)

    ways = ours("perturb", lambda b: called(lambda hidden, delta, index, _: perturb(hidden, delta, index, backend=b)))
    ways |= {"eager, masked": called(eager), "torch.compile": compiled(selected)}
    moved = 2 * tokens * width * dtype.itemsize + rows * width * 4
    return cases(f"perturb [{tokens}, {width}] {short(dtype)}", data, ways, moved)


# ---- a frozen block's ----------------------------------------------------------------------------------------------


def norm_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """The residual sum and RMS norm of [tokens, width], and the gradient of both."""
    shape, size = f"[{tokens}, {width}] {short(dtype)}", tokens * width * dtype.itemsize

    def data() -> tuple[Tensor, Tensor, Tensor]:
        x, residual = (normal(tokens, width, dtype=dtype) for _ in range(2))
        return x, residual, torch.rand(width, device=device())

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = residual + x
        return r, F.rms_norm(r, (width,), weight.to(dtype), 1e-6)

    def back(backend: str) -> Way:
        def make(x: Tensor, residual: Tensor, weight: Tensor) -> Run:
            r, normed, rstd = add_norm(x, residual, weight)
            return lambda: add_norm_backward(normed, r, rstd, weight, x, backend=backend)

        return make

    def ligers(f: Any) -> Callable[..., Any]:
        return lambda x, residual, weight: f.liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)

    forward = {
        **ours("add_norm", lambda b: called(partial(add_norm, backend=b))),
        "eager sum and F.rms_norm": called(plain),
        "torch.compile": compiled(plain),
        **liger("Liger", lambda f: called(ligers(f))),
    }
    gradient = {
        **ours("add_norm_backward", back),
        "autograd of eager": backward(plain, 1),
        "autograd of torch.compile": backward(torch.compile(plain, dynamic=False), 1),
        **liger("Liger", lambda f: backward(ligers(f), 1)),
    }
    return [*cases(f"add_norm {shape}", data, forward, 4 * size),
            *cases(f"add_norm_backward {shape}", data, gradient, 4 * size)]  # fmt: skip


def gate_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """SwiGLU of halves of [tokens, 2 width], and its gradient."""
    shape, size = f"[{tokens}, {width}] {short(dtype)}", tokens * width * dtype.itemsize

    def data() -> tuple[Tensor, Tensor, Tensor]:
        gate, up = normal(tokens, 2 * width, dtype=dtype).chunk(2, 1)
        return gate, up, normal(tokens, width, dtype=dtype) * 1e-3  # gradients written over and over stay finite

    def plain(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
        return F.silu(gate) * up

    def ligers(f: Any) -> Callable[..., Any]:
        return lambda gate, up, grad: f.liger_swiglu(gate.contiguous(), up.contiguous())

    forward = {
        **ours("swiglu", lambda b: called(lambda gate, up, grad: swiglu(gate, up, backend=b))),
        "eager F.silu and product": called(plain),
        "torch.compile": compiled(plain),
        **liger("Liger", lambda f: called(ligers(f))),
    }
    gradient = {
        **ours(
            "swiglu_backward_", lambda b: called(lambda gate, up, grad: swiglu_backward_(gate, up, grad, backend=b))
        ),
        "autograd of eager": backward(plain, 2),
        "autograd of torch.compile": backward(torch.compile(plain, dynamic=False), 2),
        **liger("Liger", lambda f: backward(ligers(f), 2)),
    }
    return [*cases(f"swiglu {shape}", data, forward, 3 * size),
            *cases(f"swiglu_backward_ {shape}", data, gradient, 5 * size)]  # fmt: skip


def packed_places(pairs: int, prompt: int = 130, rejected: int = 6, chosen: int = 8) -> Tensor:
    """[pairs * length, 2] int32: branch (0 for the prompt, 1 and 2 for the completions) and position of every token."""
    row = [(0, i) for i in range(prompt)]
    row += [(branch, prompt + i) for branch, count in ((1, rejected), (2, chosen)) for i in range(count)]
    return torch.tensor(row * pairs, dtype=torch.int32, device=device())


def packed_mask(places: Tensor) -> Tensor:
    """[length, length] bool: the keys that each token of one row sees."""
    branch, position = places.T
    return ((branch[:, None] == branch) | (branch == 0)) & (position <= position[:, None])


def attention_cases(pairs: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Attention of packed pairs, prompt 130 and completions 6 and 8, and its gradient; sdpa gets a mask."""
    where, length = device(), 144
    shape = f"{pairs} x {length}, {heads} heads of {width}, {kv_heads} of keys, {short(dtype)}"
    places = packed_places(pairs)
    stream = Stream(places, torch.arange(pairs + 1, dtype=torch.int32, device=where) * length, length)
    angles = torch.outer(torch.arange(length, device=where), torch.logspace(0, -4, width // 2, device=where))
    rotation, mask = (angles.cos(), angles.sin()), packed_mask(places[:length])
    options: dict[str, Any] = {"scale": width**-0.5}

    def data() -> tuple[Tensor, ...]:
        counts = heads, kv_heads, kv_heads
        return normal(pairs * length, sum(counts), width, dtype=dtype).split(counts, 1)

    def forward(backend: str) -> Way:
        return called(lambda q, k, v: attention(q, k, v, rotation, stream, stream, **options, backend=backend))

    def back(backend: str) -> Way:
        def make(q: Tensor, k: Tensor, v: Tensor) -> Run:
            out, lse = attention(q, k, v, rotation, stream, stream, **options, backend=backend)
            into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            return lambda: attention_backward_(
                out, q, k, v, out, lse, into, rotation, stream, stream, **options, backend=backend
            )

        return make

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = (torch.cat([t, t], -1).to(dtype) for t in rotation)
        return x * c + torch.cat([-b, a], -1) * s

    def turn(backend: str) -> Way:
        return called(lambda q, k, v: rotate_(q, k, rotation, places, places, backend=backend))

    def both_turned(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(turned(t.reshape(pairs, length, -1, width).transpose(1, 2)) for t in tensors[:2])

    def sdpa(*tensors: Tensor) -> Tensor:
        q, k, v = (t.reshape(pairs, length, -1, width).transpose(1, 2) for t in tensors)
        return F.scaled_dot_product_attention(turned(q), turned(k), v, mask, enable_gqa=heads != kv_heads)

    first = {**ours("attention", forward), "eager rotation and sdpa": called(sdpa), "torch.compile": compiled(sdpa)}
    second = {**ours("attention_backward_", back), "eager rotation and sdpa": backward(sdpa, 3),
              "torch.compile": backward(torch.compile(sdpa, dynamic=False), 3)}  # fmt: skip
    third = {**ours("rotate_", turn), "eager": called(both_turned), "torch.compile": compiled(both_turned)}
    moved = (
        2 * (heads + kv_heads) * pairs * length * width * dtype.itemsize
    )  # q, k, v and out; then their gradients too
    work = 2 * pairs * heads * width * int(mask.sum())  # of one product: queries with the keys that they see
    return [*cases(f"attention of {shape}", data, first, moved, 2 * work),
            *cases(f"attention backward of {shape}", data, second, 2 * moved, 5 * work),
            *cases(f"rotate_ [{shape}]", data, third, moved)]  # fmt: skip


# ---- which -----------------------------------------------------------------------------------------------------------

F32, BF16 = torch.float32, torch.bfloat16
Sizes = dict[Callable[..., list[Case]], list[tuple[Any, ...]]]
ALL: Sizes = {  # large and small; the update of [5, 4, 8] is nothing but the cost of a call
    update_cases: [(5, 2304, 4096), (5, 220, 576), (5, 4, 8)],
    loss_cases: [(256, 128256, F32), (256, 128256, BF16), (56, 49152, F32)],
    linear_loss_cases: [(512, 576, 128256)],
    perturb_cases: [(4096, 4096, BF16), (300, 576, F32)],
    norm_cases: [(576, 576, F32), (576, 576, BF16)],
    gate_cases: [(576, 1536, F32), (576, 1536, BF16)],
    attention_cases: [(4, 9, 3, 64, F32), (4, 9, 3, 64, BF16)],
}
GPU: Sizes = {  # those that a GPU needs beside: tensors beyond any L2, and the shapes of an 8B model's inner step
    update_cases: [(5, 2304, 4096, BF16)],
    loss_cases: [(2048, 128256, BF16), (1024, 128256, F32), (224, 128256, BF16), (28, 128256, BF16)],
    linear_loss_cases: [(224, 4096, 128256, BF16)],
    perturb_cases: [(32768, 4096, BF16), (2304, 4096, BF16), (288, 4096, BF16)],
    norm_cases: [(32768, 4096, BF16), (2304, 4096, BF16), (288, 4096, BF16)],
    gate_cases: [(2304, 14336, BF16), (288, 14336, BF16)],
    attention_cases: [(16, 32, 8, 128, BF16), (2, 32, 8, 128, BF16)],
}
TINY: Sizes = {  # to try what runs them
    update_cases: [(2, 4, 8, BF16)],
    loss_cases: [(4, 96, F32)],
    linear_loss_cases: [(4, 8, 96)],
    perturb_cases: [(6, 8, F32)],
    norm_cases: [(6, 8, F32)],
    gate_cases: [(6, 8, F32)],
    attention_cases: [(1, 2, 1, 4, F32)],
}


def all_cases(sizes: Sizes = ALL) -> list[Case]:
    """Every op's cases at these sizes."""
    return [case for make, those in sizes.items() for size in those for case in make(*size)]
