"""The op benchmarks: each op beside what a user would write otherwise, as functions that do the same work."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_kernels import linear_token_loss, perturb, pgd_update_, token_loss_
from lpa_kernels.ops import (
    Stream,
    add_norm,
    add_norm_backward,
    attention,
    attention_backward_,
    native,
    registry,
    swiglu,
    swiglu_backward_,
)

LR, EPSILON, BETAS, EPS, DECAY = 1e-3, 6.0, (0.9, 0.999), 1e-8, 0.01


@dataclass(frozen=True)
class Case:
    """One way of doing one thing.

    Attributes:
        group: what is done, with its shape: cases of one group do the same work.
        name: how.
        make: allocates, and returns the function to time.
        moved: bytes that this way must read and write at the least (0: not counted).
    """

    group: str
    name: str
    make: Callable[[], Callable[[], object]]
    moved: int = 0


def device() -> str:
    """ "cuda" on a machine with a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_backends(op: str) -> list[str]:
    """The fast backends that can run an op on this device; the reference where there is none: it is far slower."""
    fast = ("triton", "native") if device() == "cuda" else ("native",)
    there = [b for b in fast if (op, b) in registry.table()]
    return [b for b in there if b != "native" or native.built_for(op, device())] or ["reference"]


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
    ours_moved = 6 * size + size // 4 * dtype.itemsize
    group = f"pgd_update_ [{sites}, {rows}, {width}] {str(dtype)[6:]}"

    def ours(backend: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            delta, m, v = (torch.zeros(shape, device=where) for _ in range(3))
            grads = list(torch.randn(shape, device=where).to(dtype))
            tokens = torch.arange(rows, device=where)[:, None]
            step, lr, epsilon = (torch.tensor(x, device=where) for x in (3.0, LR, EPSILON))
            norms = torch.zeros(shape[:2], device=where)
            clipped = torch.zeros(sites, dtype=torch.int32, device=where)
            return lambda: pgd_update_(
                delta, grads, tokens, exp_avg=m, exp_avg_sq=v, step=step, step_size=lr, epsilon=epsilon,
                norms=norms, clipped=clipped, backend=backend,
            )  # fmt: skip

        return make

    def optimizer(**options: bool) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            params = [torch.zeros(shape[1:], device=where, requires_grad=True) for _ in range(sites)]
            grads = [torch.randn(shape[1:], device=where).to(dtype) for _ in params]
            adamw = torch.optim.AdamW(params, lr=LR, **options)

            @torch.no_grad()
            def run() -> None:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.float()  # the same tensor where it is float32
                adamw.step()
                for p in params:
                    project_eagerly(p)

            return run

        return make

    def compiled() -> Callable[[], object]:
        delta, m, v = (torch.zeros(shape, device=where) for _ in range(3))
        grad, step = torch.randn(shape, device=where).to(dtype), torch.tensor(3.0, device=where)
        fused = torch.compile(adamw_and_projection)
        return lambda: fused(delta, m, v, grad, step)

    # read delta, m, v, grad and write delta, m, v; the optimisers' projection reads twice and writes once more
    return [
        *(Case(group, f"ours ({b})", ours(b), ours_moved) for b in own_backends("pgd_update_")),
        Case(group, "torch AdamW foreach + projection", optimizer(foreach=True), ours_moved + 3 * size),
        Case(group, "torch AdamW fused + projection", optimizer(fused=True), ours_moved + 3 * size),
        Case(group, "torch.compile", compiled, ours_moved),
    ]


def public_away(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p) as two logsumexps and a masked copy, the way LAT code bases compute it; mean over rows."""
    everything = torch.logsumexp(logits, dim=-1)
    mask = torch.zeros_like(logits).scatter_(-1, labels.unsqueeze(-1), 1.0)
    rest = torch.logsumexp(logits * (1 - mask) + mask * -1e10, dim=-1)
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = everything - rest
    return torch.where(own - everything < -5.0, 0.0, loss).mean()


def loss_cases(rows: int, vocabulary: int, dtype: torch.dtype) -> list[Case]:
    """Token losses of logits [rows, vocabulary], forward and backward."""
    where = device()
    size = rows * vocabulary * dtype.itemsize
    moved = (2 if where == "cuda" else 3) * size  # read and written; a GPU's L2 keeps a row for the second reading
    group = f"token_loss_ [{rows}, {vocabulary}] {str(dtype)[6:]}, forward and backward"

    def data() -> tuple[Tensor, Tensor]:
        logits = torch.randn(rows, vocabulary, device=where).to(dtype)
        return logits, torch.randint(0, vocabulary, (rows,), device=where)

    def ours(backend: str, away: bool) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            logits, labels = data()
            kinds = torch.full((rows,), away, device=where)
            weight = torch.full((rows,), 1 / rows, device=where)
            # no threshold: the labels are unlikely, and a row that "away" leaves alone would cost next to nothing
            return lambda: token_loss_(logits, labels, kinds, weight, -math.inf, backend=backend)

        return make

    def eager(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            logits, labels = data()
            logits.requires_grad_()
            return lambda: torch.autograd.grad(loss(logits, labels), logits)

        return make

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    return [
        *(Case(group, f"ours, toward ({b})", ours(b, False), moved) for b in own_backends("token_loss_")),
        *(Case(group, f"ours, away ({b})", ours(b, True), moved) for b in own_backends("token_loss_")),
        Case(group, "eager F.cross_entropy", eager(cross_entropy)),
        Case(group, "torch.compile of F.cross_entropy", eager(torch.compile(cross_entropy, dynamic=False))),
        Case(group, "eager away, two logsumexps", eager(public_away)),
    ]


def linear_loss_cases(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """The loss straight from hidden states [rows, width] and a frozen head [vocabulary, width]."""
    where = device()
    kind = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
    group = f"linear_token_loss [{rows}, {width}] x [{vocabulary}, {width}]{kind}, forward and backward"

    def data() -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(rows, width, device=where).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=where) / width**0.5).to(dtype)
        return hidden, weight, torch.randint(0, vocabulary, (rows,))

    def ours() -> Callable[[], object]:
        hidden, weight, labels = data()
        away = torch.zeros(rows, dtype=torch.bool, device=where)
        labels = labels.to(where)
        return lambda: torch.autograd.grad(linear_token_loss(hidden, weight, labels, away)[0].mean(), hidden)

    def eager() -> Callable[[], object]:
        hidden, weight, labels = data()
        labels = labels.to(where)
        return lambda: torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), hidden)

    cases = [Case(group, "ours", ours), Case(group, "eager F.linear and F.cross_entropy", eager)]
    if hasattr(F, "linear_cross_entropy"):

        def torchs() -> Callable[[], object]:
            hidden, weight, labels = data()
            labels = labels.to(where)
            return lambda: torch.autograd.grad(F.linear_cross_entropy(hidden, weight, labels), hidden)

        cases.append(Case(group, "F.linear_cross_entropy", torchs))
    if where == "cuda" and importlib.util.find_spec("liger_kernel"):  # Liger's kernels need a GPU

        def liger() -> Callable[[], object]:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            hidden, weight, labels = data()
            labels, loss = labels.to(where), LigerFusedLinearCrossEntropyLoss()
            return lambda: torch.autograd.grad(loss(weight, hidden, labels), hidden)

        cases.append(Case(group, "Liger", liger))
    return cases


def perturb_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Adding delta to every second token of hidden [tokens, width]."""
    where = device()
    group = f"perturb [{tokens}, {width}] {str(dtype)[6:]}"
    rows = tokens // 2
    moved = 2 * tokens * width * dtype.itemsize + rows * width * 4

    def data() -> tuple[Tensor, Tensor, Tensor]:
        index = torch.full((tokens,), -1, device=where)
        index[::2] = torch.arange(rows, device=where)
        hidden = torch.randn(tokens, width, device=where).to(dtype)
        return hidden, torch.randn(rows, width, device=where), index

    def ours(backend: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            hidden, delta, index = data()
            return lambda: perturb(hidden, delta, index, backend=backend)

        return make

    def eager() -> Callable[[], object]:
        hidden, delta, index = data()
        mask = index >= 0

        def run() -> Tensor:
            out = hidden.clone()
            out[mask] = out[mask] + delta.to(dtype)
            return out

        return run

    return [
        *(Case(group, f"ours ({b})", ours(b), moved) for b in own_backends("perturb")),
        Case(group, "eager, masked", eager),
    ]


def norm_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """The residual sum and RMS norm of [tokens, width], and the gradient of both."""
    where, shape = device(), f"[{tokens}, {width}] {str(dtype)[6:]}"
    size = tokens * width * dtype.itemsize

    def data() -> tuple[Tensor, Tensor, Tensor]:
        x, residual = (torch.randn(tokens, width, device=where).to(dtype) for _ in range(2))
        return x, residual, torch.rand(width, device=where)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = residual + x
        return r, F.rms_norm(r, (width,), weight.to(dtype), 1e-6)

    def ours(backend: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            x, residual, weight = data()
            return lambda: add_norm(x, residual, weight, backend=backend)

        return make

    def ours_backward(backend: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            x, residual, weight = data()
            r, normed, rstd = add_norm(x, residual, weight)
            return lambda: add_norm_backward(normed, r, rstd, weight, x, backend=backend)

        return make

    def eager(function: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            tensors = data()
            return lambda: function(*tensors)

        return make

    def autograd() -> Callable[[], object]:
        x, residual, weight = data()
        r, normed = plain(x.requires_grad_(), residual, weight)
        return lambda: torch.autograd.grad((r, normed), x, (residual, residual), retain_graph=True)

    forward, backward = f"add_norm {shape}", f"add_norm_backward {shape}"
    return [
        *(Case(forward, f"ours ({b})", ours(b), 4 * size) for b in own_backends("add_norm")),
        Case(forward, "eager sum and F.rms_norm", eager(plain)),
        Case(forward, "torch.compile", eager(torch.compile(plain, dynamic=False))),
        *(Case(backward, f"ours ({b})", ours_backward(b), 4 * size) for b in own_backends("add_norm_backward")),
        Case(backward, "autograd of eager", autograd),
    ]


def gate_cases(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """SwiGLU of halves of [tokens, 2 width], and its gradient."""
    where, shape = device(), f"[{tokens}, {width}] {str(dtype)[6:]}"
    size = tokens * width * dtype.itemsize

    def data() -> tuple[Tensor, Tensor, Tensor]:
        gate, up = torch.randn(tokens, 2 * width, device=where).to(dtype).chunk(2, 1)
        return gate, up, torch.randn(tokens, width, device=where).to(dtype)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def ours(backend: str, backward: bool) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            gate, up, grad = data()
            grad *= 1e-3  # gradients written over and over stay finite
            if backward:
                return lambda: swiglu_backward_(gate, up, grad, backend=backend)
            return lambda: swiglu(gate, up, backend=backend)

        return make

    def eager(function: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            gate, up, _ = data()
            return lambda: function(gate, up)

        return make

    def autograd() -> Callable[[], object]:
        gate, up, grad = data()
        inputs = gate.requires_grad_(), up.requires_grad_()
        out = plain(*inputs)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    forward, backward = f"swiglu {shape}", f"swiglu_backward_ {shape}"
    return [
        *(Case(forward, f"ours ({b})", ours(b, False), 3 * size) for b in own_backends("swiglu")),
        Case(forward, "eager F.silu and product", eager(plain)),
        Case(forward, "torch.compile", eager(torch.compile(plain, dynamic=False))),
        *(Case(backward, f"ours ({b})", ours(b, True), 5 * size) for b in own_backends("swiglu_backward_")),
        Case(backward, "autograd of eager", autograd),
    ]


def attention_cases(pairs: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Attention of packed pairs, prompt 130 and completions 6 and 8, and its gradient; sdpa gets a mask."""
    where, length = device(), 144
    shape = f"{pairs} x {length}, {heads} heads of {width}, {kv_heads} of keys, {str(dtype)[6:]}"
    place = [(0, i) for i in range(130)] + [(1, 130 + i) for i in range(6)] + [(2, 130 + i) for i in range(8)]
    places = torch.tensor(place * pairs, dtype=torch.int32, device=where)
    stream = Stream(places, torch.arange(pairs + 1, dtype=torch.int32, device=where) * length, length)
    angles = torch.outer(torch.arange(length, device=where), torch.logspace(0, -4, width // 2, device=where))
    rotation = angles.cos(), angles.sin()

    def data() -> tuple[Tensor, Tensor, Tensor]:
        counts = heads, kv_heads, kv_heads
        products = torch.randn(pairs * length, sum(counts), width, device=where).to(dtype)
        return products.split(counts, 1)  # type: ignore[return-value]

    def ours(backend: str, backward: bool) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            q, k, v = data()
            out, lse = attention(q, k, v, rotation, stream, stream, scale=width**-0.5, backend=backend)
            into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            if not backward:
                return lambda: attention(q, k, v, rotation, stream, stream, scale=width**-0.5, backend=backend)
            return lambda: attention_backward_(
                out, q, k, v, out, lse, into, rotation, stream, stream, scale=width**-0.5, backend=backend
            )

        return make

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = (torch.cat([t, t], -1).to(dtype) for t in rotation)
        return x * c + torch.cat([-b, a], -1) * s

    def sdpa(backward: bool) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            branch, position = places[:length].T
            seen = (branch[:, None] == branch) | (branch == 0)
            mask = seen & (position <= position[:, None])
            leaves = [t.contiguous().requires_grad_(backward) for t in data()]

            def run() -> Tensor:
                q, k, v = (t.view(pairs, length, -1, width).transpose(1, 2) for t in leaves)
                return F.scaled_dot_product_attention(turned(q), turned(k), v, mask, enable_gqa=heads != kv_heads)

            if not backward:
                return run
            out = run()
            grad = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return make

    cases = []
    for group, op, back in (("attention", "attention", False), ("attention backward", "attention_backward_", True)):
        cases += [Case(f"{group} of {shape}", f"ours ({b})", ours(b, back)) for b in own_backends(op)]
        cases.append(Case(f"{group} of {shape}", "eager rotation and sdpa", sdpa(back)))
    return cases


@cache
def copy_bandwidth(elements: int = 1 << 27) -> float:
    """Bytes read and written a second by a large copy on this device: the ceiling of whatever moves memory."""
    source = torch.randn(elements, device=device())
    target = torch.zeros_like(source)
    return _bandwidth(lambda: target.copy_(source), source)


@cache
def scale_bandwidth(elements: int = 1 << 27) -> float:
    """The same of a multiplication in place. A CPU's copy reads the lines that it overwrites, and this does not."""
    source = torch.randn(elements, device=device())
    return _bandwidth(lambda: source.mul_(1.0001), source)


def _bandwidth(run: Callable[[], object], tensor: Tensor) -> float:
    return 2 * tensor.nbytes / min(seconds(run) for _ in range(7))  # a ceiling is the best that was seen


@cache
def _larger_than_any_cache() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def cold() -> None:
    """Turn everything else out of a GPU's L2. A CPU's large cases are larger than its caches, or share of them."""
    if device() == "cuda":
        _larger_than_any_cache().zero_()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes, on the device: from cold caches on a GPU, in CPU time on one thread."""
    if device() == "cuda":
        cold()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # CPU time, where it says all
    begin = clock()
    run()
    return clock() - begin


def gpu_cases() -> list[Case]:
    """Those that a GPU needs beside: tensors beyond any L2, and the shapes of an 8B model's inner step."""
    bf16 = torch.bfloat16
    return [
        *update_cases(5, 2304, 4096, bf16),
        *loss_cases(2048, 128256, bf16),
        *loss_cases(1024, 128256, torch.float32),
        *loss_cases(224, 128256, bf16),
        *loss_cases(28, 128256, bf16),
        *linear_loss_cases(224, 4096, 128256, bf16),
        *perturb_cases(32768, 4096, bf16),
        *perturb_cases(2272, 4096, bf16),
        *perturb_cases(284, 4096, bf16),
        *norm_cases(2304, 4096, bf16),
        *gate_cases(2304, 14336, bf16),
        *attention_cases(16, 32, 8, 128, bf16),
        *attention_cases(2, 32, 8, 128, bf16),
    ]


def tiny_cases() -> list[Case]:
    """Cases that take no time, to try what runs them."""
    return [
        *update_cases(2, 4, 8, torch.bfloat16),
        *loss_cases(4, 96, torch.float32),
        *linear_loss_cases(4, 8, 96),
        *perturb_cases(6, 8, torch.float32),
        *norm_cases(6, 8, torch.float32),
        *gate_cases(6, 8, torch.float32),
        *attention_cases(1, 2, 1, 4, torch.float32),
    ]


def all_cases() -> list[Case]:
    """Every op case, large and small."""
    return [
        *update_cases(5, 2304, 4096),
        *update_cases(5, 220, 576),
        *update_cases(5, 4, 8),  # nothing but the cost of a call
        *loss_cases(256, 128256, torch.float32),
        *loss_cases(256, 128256, torch.bfloat16),
        *loss_cases(56, 49152, torch.float32),
        *linear_loss_cases(512, 576, 128256),
        *perturb_cases(4096, 4096, torch.bfloat16),
        *perturb_cases(300, 576, torch.float32),
        *norm_cases(576, 576, torch.float32),
        *norm_cases(576, 576, torch.bfloat16),
        *gate_cases(576, 1536, torch.float32),
        *gate_cases(576, 1536, torch.bfloat16),
        *attention_cases(4, 9, 3, 64, torch.float32),
        *attention_cases(4, 9, 3, 64, torch.bfloat16),
    ]
