"""A frozen block's ops: the oracle against autograd, and every backend and device of this process against the oracle.

What holds of all ops is in `test_backends.py`. Without a GPU Triton's part of the grid runs in the process that
`test_triton.py` starts.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lpa_kernels.ops import (
    Stream,
    add_norm,
    add_norm_backward,
    attention,
    attention_backward_,
    block_reference,
    rotate_,
    swiglu,
    swiglu_backward_,
)
from tests.support.backends import everywhere, need
from tests.support.block_cases import (
    attention_case,
    gate_case,
    norm_backward_case,
    norm_case,
    rotate_case,
    run_against_oracle,
)
from tests.support.op_cases import copied, implementation

WIDTHS = (1, 33, 64, 576, 4096, 8192, 9000)  # in Triton: many rows a program, one, and in chunks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = block_reference.ACTIVATIONS
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_the_formulas_of_a_norm_are_autograds():
    torch.manual_seed(0)
    x, residual, low, up, delta, weight = (
        double(5, 7), double(5, 7), double(5, 2), double(7, 2), double(2, 7), double(7).detach(),
    )  # fmt: skip
    rows = torch.tensor([1, -1, 0, 1, -1])
    r, normed, rstd = add_norm(
        x, residual, weight, lora=(low, up), delta=delta, rows=rows, scale=0.5, eps=0.1, backend="reference"
    )
    added = x + low @ up.T + torch.where((rows >= 0)[:, None], delta[rows.clamp(min=0)], 0)
    want = residual + 0.5 * added
    torch.testing.assert_close(r, want)
    torch.testing.assert_close(normed, F.rms_norm(want, (7,), weight, 0.1))
    torch.testing.assert_close(rstd, (want.square().mean(1) + 0.1).rsqrt())

    stream, passing = want.detach().requires_grad_(), torch.randn(5, 7, dtype=torch.double)
    grad = torch.randn(5, 7, dtype=torch.double)
    (right,) = torch.autograd.grad(F.rms_norm(stream, (7,), weight, 0.1), stream, grad)
    found = add_norm_backward(grad, r.detach(), rstd.detach(), weight, backend="reference")
    torch.testing.assert_close(found, right)
    found = add_norm_backward(grad, r.detach(), rstd.detach(), weight, passing, backend="reference")
    torch.testing.assert_close(found, right + passing)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm(width, dtype, place):
    backend, device = need("add_norm", place)
    for residual, attacked, normed in ((1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1), (1, 1, 0)):
        case = norm_case(5, width, dtype, residual=residual, attacked=attacked, normed=normed, device=device)
        run_against_oracle("add_norm", backend, case)
    run_against_oracle("add_norm", backend, norm_case(3, width, dtype, scale=0.22, layout="rows", device=device))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "rank"), [(3, 33, 1), (17, 64, 16), (20, 576, 24), (33, 300, 64)])
def test_add_norm_with_lora(tokens, width, rank, dtype, place):
    backend, device = need("add_norm", place)
    if backend == "native":
        pytest.skip("on a CPU a library takes the product")
    for residual, normed in ((1, 1), (0, 1), (1, 0)):
        case = norm_case(tokens, width, dtype, residual=residual, rank=rank, normed=normed, device=device)
        run_against_oracle("add_norm", backend, case, tolerance=4e-6)


@everywhere
@pytest.mark.parametrize("tokens", [0, 1, 133])
def test_numbers_of_tokens(tokens, place):
    backend, device = need("add_norm", place)
    run_against_oracle("add_norm", backend, norm_case(tokens, 65, torch.bfloat16, device=device))
    run_against_oracle("add_norm_backward", backend, norm_backward_case(tokens, 65, torch.bfloat16, device=device))
    run_against_oracle("swiglu", backend, gate_case(tokens, 65, torch.bfloat16, device=device))
    run_against_oracle("swiglu_backward_", backend, gate_case(tokens, 65, backward=True, device=device))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm_backward(width, dtype, place):
    backend, device = need("add_norm_backward", place)
    for residual, layout in ((1, "contiguous"), (0, "contiguous"), (1, "rows")):
        if residual or width > 1:  # of one entry the norm's own gradient is 0: nothing but rounding
            case = norm_backward_case(5, width, dtype, residual=residual, layout=layout, device=device)
            run_against_oracle("add_norm_backward", backend, case)


def test_a_norm_alone_returns_its_input_as_the_stream():
    x = torch.randn(4, 6)
    r, normed, rstd = add_norm(x, weight=torch.ones(6))
    assert r is x
    torch.testing.assert_close(normed, F.rms_norm(x, (6,), eps=1e-6))
    r, normed, rstd = add_norm(x, torch.ones(4, 6))
    torch.testing.assert_close(r, x + 1)
    assert normed.numel() == rstd.numel() == 0


def test_lora_is_the_same_product_on_a_cpu():
    x, residual, low, up, *_ = norm_case(6, 9, rank=3)
    for backend in ("auto", "reference"):
        r, _, _ = add_norm(x, residual, lora=(low, up), scale=0.5, backend=backend)
        torch.testing.assert_close(r, residual + 0.5 * (x + low @ up.T))


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_formulas_of_the_gate_are_autograds(activation):
    torch.manual_seed(0)
    gate, up, grad = double(4, 6), double(4, 6), torch.randn(4, 6, dtype=torch.double)
    out = swiglu(gate, up, activation, backend="reference")
    want = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    torch.testing.assert_close(out, want)
    right = torch.autograd.grad(want, (gate, up), grad)
    found = gate.detach().clone(), up.detach().clone()
    swiglu_backward_(*found, grad, activation, backend="reference")
    torch.testing.assert_close(found, right)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 576, 1100, 4096])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu(activation, width, dtype, place):
    backend, device = need("swiglu", place)
    for layout in ("contiguous", "rows"):
        options = {"activation": activation, "layout": layout, "device": device}
        run_against_oracle("swiglu", backend, gate_case(5, width, dtype, **options))
        run_against_oracle("swiglu_backward_", backend, gate_case(5, width, dtype, backward=True, **options))


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_out(activation, place):
    """Where an exponential could overflow."""
    backend, device = need("swiglu", place)
    gate = torch.tensor([[-200.0, -90.0, -30.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 30.0, 90.0, 200.0]], device=device)
    up, grad = torch.full_like(gate, 1.5), torch.full_like(gate, 0.5)
    want = copied((gate, up), torch.float64)
    right = block_reference.swiglu(*want, activation)
    found = implementation("swiglu", backend, (gate, up, activation))(gate, up, activation)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    block_reference.swiglu_backward_(*want, grad.double(), activation)
    implementation("swiglu_backward_", backend, (gate, up, grad, activation))(gate, up, grad, activation)
    for own, correct in zip((gate, up), want, strict=True):
        torch.testing.assert_close(own.double(), correct, rtol=1e-5, atol=1e-6)


# ---- attention -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "all heads alike": {"heads": 2, "kv_heads": 2},
    "one group": {"heads": 3, "kv_heads": 1, "width": 32},
    "no rotation": {"rotated": 0},
    "soft cap and window": {"softcap": 2.0, "window": 4},
    "a window of one": {"window": 1},
    "few queries": {"few": True, "rows": ((5, 3, 2), (9, 1, 1), (3, 2, 6))},
    "padding": {"padding": 3},
    "a wide head": {"width": 96},
    "long rows": {"rows": ((70, 5, 9), (1, 40, 33)), "heads": 2, "kv_heads": 1},
    "one token": {"rows": ((1, 0, 0),)},
}


def plain_attention(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, _, __, scale, softcap, window):
    """Row by row, with a mask and in the words of transformers' eager attention."""

    def turned(x, places):
        if cos is None:
            return x
        c, s = (torch.cat([t[places[:, 1].long()]] * 2, 1)[:, None] for t in (cos, sin))
        turn, rest = x[..., : c.shape[-1]], x[..., c.shape[-1] :]
        a, b = turn.chunk(2, -1)
        return torch.cat([turn * c + torch.cat([-b, a], -1) * s, rest], -1)

    q, k = turned(q, q_places), turned(k, k_places)
    out = torch.zeros_like(q)
    for row in range(len(q_starts) - 1):
        ours, theirs = (slice(int(s[row]), int(s[row + 1])) for s in (q_starts, k_starts))
        queries, keys = (
            q[ours].transpose(0, 1),
            k[theirs].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1),
        )
        values = v[theirs].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
        (b, p), (kb, kp) = q_places[ours].T[:, :, None], k_places[theirs].T[:, None]
        seen = ((b == kb) | (kb == 0)) & (b >= 0) & (kb >= 0) & (kp <= p)
        if window:
            seen &= kp > p - window
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
        out[ours] = (weights @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("variant", [*VARIANTS, "part of a rotation"])
def test_the_formulas_of_attention_are_autograds(variant):
    case = attention_case(torch.float64, **VARIANTS.get(variant, {"rotated": 12}))
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
    want = plain_attention(*leaves, *case[3:])
    out, lse = block_reference.attention(*case)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(want)
    right = torch.autograd.grad(want, leaves, grad)
    into = [torch.full_like(t, float("nan")) for t in leaves]
    block_reference.attention_backward_(grad, *case[:3], out, lse, *into, *case[3:])
    for own, correct in zip(into, right, strict=True):
        torch.testing.assert_close(own, correct)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention(variant, dtype, place):
    backend, device = need("attention", place)
    run_against_oracle("attention", backend, attention_case(dtype, device=device, **VARIANTS[variant]))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_backward(variant, dtype, place):
    backend, device = need("attention_backward_", place)
    case = attention_case(dtype, backward=True, device=device, **VARIANTS[variant])
    run_against_oracle("attention_backward_", backend, case)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "few queries", "part of a rotation"])
def test_rotate(variant, dtype, place):
    backend, device = need("rotate_", place)
    if variant == "part of a rotation" and backend == "triton":
        pytest.skip("it rotates heads as a whole")
    options = {"few queries": {"few": True}, "part of a rotation": {"rotated": 12}}.get(variant, {})
    for back in (False, True):
        run_against_oracle("rotate_", backend, rotate_case(dtype, back=back, device=device, **options))


@pytest.mark.parametrize("rotated", [None, 12])
def test_attention_of_what_was_rotated_is_attention_that_rotates(rotated):
    case = attention_case(torch.float64, rotated=rotated)
    wanted, _ = block_reference.attention(*case)
    q, k, v, cos, sin, q_places, k_places, *rest = copied(case)
    rotate_(q, k, (cos, sin), q_places, k_places)
    found, _ = block_reference.attention(q, k, v, None, None, q_places, k_places, *rest)
    torch.testing.assert_close(found, wanted)
    rotate_(q, k, (cos, sin), q_places, k_places, back=True)
    torch.testing.assert_close(q, case[0])
    torch.testing.assert_close(k, case[1])
    with pytest.raises(ValueError, match="a head of 16 has 8 pairs to rotate"):
        rotate_(q, k, (torch.cat([cos, cos, cos], 1),) * 2, q_places, k_places)
    with pytest.raises(ValueError, match="the places of k has shape"):
        rotate_(q, k, (cos, sin), q_places, k_places[1:])


def test_the_faces_of_attention():
    q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, longest_q, longest_k, scale, *_ = attention_case()
    queries, keys = Stream(q_places, q_starts, longest_q), Stream(k_places, k_starts, longest_k)
    out, lse = attention(q, k, v, (cos, sin), queries, keys, scale=scale)
    torch.testing.assert_close(out, block_reference.attention(*attention_case())[0])
    into = tuple(torch.full_like(t, float("nan")) for t in (q, k, v))
    attention_backward_(out, q, k, v, out, lse, into, (cos, sin), queries, keys, scale=scale)
    assert all(t.isfinite().all() for t in into)
    for change, words in (
        ({"k": k[:, :1].expand(-1, 3, -1), "v": v[:, :1].expand(-1, 3, -1)}, "q has 4 heads and k has 3"),
        ({"v": v[:3]}, "v has shape"),
        ({"rotation": (cos[:, :2], sin)}, "sin has shape"),
        ({"rotation": (torch.cat([cos, cos], 1),) * 2}, "a head of 16 has 8 pairs to rotate"),
        ({"keys": Stream(k_places[1:], k_starts, longest_k)}, "the places of k has shape"),
    ):
        arguments = {"q": q, "k": k, "v": v, "rotation": (cos, sin), "queries": queries, "keys": keys} | change
        with pytest.raises(ValueError, match=words):
            attention(**arguments, scale=scale)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_the_faces_refuse():
    x = torch.zeros(2, 3)
    for call, words in (
        (lambda: add_norm(x, torch.zeros(2, 4)), r"residual has shape \[2, 4\]; expected \[2, 3\]"),
        (lambda: add_norm(x, x, delta=x), "delta and rows come together"),
        (lambda: add_norm(x, scale=2.0), "scale=2.0 without a residual"),
        (lambda: add_norm(x, x, lora=(torch.zeros(2, 4), torch.zeros(3, 5))), "low has shape"),
        (lambda: add_norm_backward(x, x, torch.zeros(3), torch.ones(3)), "rstd has shape"),
        (lambda: swiglu(x, torch.zeros(2, 4)), "up has shape"),
        (lambda: swiglu(x, x, "relu"), "activation='relu' is unknown; use one of silu, gelu_tanh"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
