"""Every op on every backend and device of this process, against the oracle in float64, over one grid.

Those of a block are compared in `test_block.py`; what holds of all ops is here. Triton decides at its import whether it
interprets: without a GPU its part of the grid runs in the process that `test_triton.py` starts.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lpa_kernels import linear_token_loss, perturb, pgd_update_, token_loss, token_loss_
from lpa_kernels.ops import block_reference, reference, registry
from tests.support.backends import everywhere, need
from tests.support.block_cases import attention_case, gate_case, norm_backward_case, norm_case, rotate_case
from tests.support.op_cases import (
    LAYOUTS,
    assert_losses_exact,
    assert_near,
    copied,
    implementation,
    laid_out,
    loss_case,
    perturb_case,
    run_against_oracle,
    update_case,
)

WIDTHS = (1, 33, 576, 3584, 4096, 8192, 16384)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_RULES = ("adamw", "normalised", "sign")  # of Triton and native; the reference has more

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log(0), in the interpreter


# ---- perturb ----


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_perturb(width, dtype, place):
    backend, device = need("perturb", place)
    for layout in ("contiguous", "rows"):
        run_against_oracle("perturb", backend, perturb_case(9, 4, width, dtype, layout=layout, device=device))


@everywhere
@pytest.mark.parametrize(("tokens", "rows"), [(0, 3), (1, 1), (5, 0), (133, 21)])
def test_perturb_sizes(tokens, rows, place):
    backend, device = need("perturb", place)
    run_against_oracle("perturb", backend, perturb_case(tokens, rows, 65, torch.bfloat16, device=device))


@everywhere
def test_perturb_leaves_untouched_tokens_bitwise(place):
    backend, device = need("perturb", place)
    hidden, delta, rows = perturb_case(64, 9, 64, torch.bfloat16, device=device)
    hidden[:, 0], hidden[:, 1] = -0.0, float("inf")
    out = implementation("perturb", backend, (hidden, delta, rows))(hidden, delta, rows)
    still = rows < 0
    assert torch.equal(out[still].view(torch.int16), hidden[still].view(torch.int16))
    assert not torch.equal(out[~still], hidden[~still])


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturb_rounds_once(dtype, place):
    backend, device = need("perturb", place)
    if place == ("triton", "cpu"):
        pytest.skip("the interpreter truncates")
    args = perturb_case(300, 50, 576, dtype, device=device)
    once = args[0].double()
    once[args[2] >= 0] += args[1].double()[args[2][args[2] >= 0]]
    assert torch.equal(implementation("perturb", backend, args)(*args), once.float().to(dtype))


# ---- pgd_update_ ----


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_update(width, dtype, place):
    backend, device = need("pgd_update_", place)
    rules = reference.RULES if backend == "reference" else KERNEL_RULES
    for rule, norm in product(rules, reference.NORMS):
        case = update_case(1, 4, width, 5, dtype=dtype, rule=rule, norm=norm, device=device)
        run_against_oracle("pgd_update_", backend, case)


@everywhere
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_update_up_and_down(rule, norm, place):
    """With rows clipped and rows not; ascent under one radius, descent under one a row."""
    backend, device = need("pgd_update_", place)
    for width, up in product((33, 4100), (False, True)):  # in Triton: in registers and in chunks
        case = update_case(2, 5, width, 9, rule=rule, norm=norm, maximize=up, per_row_epsilon=not up, device=device)
        want = copied(case)
        reference.pgd_update_(*want)
        assert up or norm == "none" or 0 < int((want[9] - case[9]).sum()) < 8, "the radius should clip some rows"
        run_against_oracle("pgd_update_", backend, case)


@everywhere
@pytest.mark.parametrize(("rows", "tokens", "shares"), [(0, 5, 2), (1, 1, 1), (1, 0, 2), (300, 64, 1), (300, 64, 2)])
def test_update_sizes(rows, tokens, shares, place):
    backend, device = need("pgd_update_", place)
    run_against_oracle("pgd_update_", backend, update_case(3, rows, 20, tokens, shares, device=device))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_layouts(layout, dtype, place):
    backend, device = need("pgd_update_", place)
    for rule, width in product(("adamw", "normalised"), (33, 64)):
        case = update_case(3, 8, width, 9, dtype=dtype, rule=rule, layout=layout, device=device)
        run_against_oracle("pgd_update_", backend, case)


@everywhere
@pytest.mark.parametrize("step", [1, 2, 100, 5000])
@pytest.mark.parametrize("beta2", [0.0, 0.01, 0.5, 0.999, 0.9999])
def test_update_bias_correction(step, beta2, place):
    backend, device = need("pgd_update_", place)
    case = list(update_case(1, 5, 16, 9, step=step, norm="none", device=device))
    case[14] = beta2
    case[0].zero_()  # so that the step itself is compared, not the sum with something larger
    run_against_oracle("pgd_update_", backend, tuple(case), tolerance=1e-6)


@everywhere
def test_update_of_unlike_sites_and_more_than_one_launch_holds(place):
    backend, device = need("pgd_update_", place)
    case = list(update_case(67, 3, 24, 9, device=device))
    grads = case[3]
    grads[2] = grads[2].bfloat16()
    grads[5] = torch.zeros((), device=device).expand(9, 24)  # a site that the loss does not depend on
    grads[6] = grads[6].t().contiguous().t()
    grads[-1] = grads[-1].half()
    run_against_oracle("pgd_update_", backend, tuple(case))


@everywhere
@pytest.mark.parametrize("width", [33, 4100])
@pytest.mark.parametrize("norm", reference.NORMS)
def test_update_leaves_rows_without_tokens_bitwise(norm, width, place):
    backend, device = need("pgd_update_", place)
    case = update_case(2, 6, width, 9, norm=norm, masked=0.4, epsilon=0.1, device=device)
    got = copied(case)
    implementation("pgd_update_", backend, got)(*got)
    dead = (case[4] < 0).all(1)
    assert 0 < int(dead.sum()) < 6
    for i in (0, 1, 2):
        assert torch.equal(got[i][:, dead], case[i][:, dead])
        assert not torch.equal(got[i][:, ~dead], case[i][:, ~dead])
    assert (got[9] - case[9]).tolist() == [0 if norm == "none" else int((~dead).sum())] * 2
    assert_near(got[8][:, dead], reference.row_norm(case[0][:, dead].double(), norm), 1e-6)


@everywhere
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1.0, 1e25])
@pytest.mark.parametrize("width", [20, 4100])
def test_normalised_by_a_norm_whose_square_leaves_float32(width, magnitude, place):
    backend, device = need("pgd_update_", place)
    case = update_case(1, 3, width, 4, 1, rule="normalised", norm="none", masked=0.0, bad=False, device=device)
    case[3][0].mul_(magnitude * 1e3)
    run_against_oracle("pgd_update_", backend, case)


@everywhere
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_radius_of_zero_gives_zero(norm, place):
    backend, device = need("pgd_update_", place)
    case = update_case(1, 4, 33, 9, epsilon=0.0, norm=norm, masked=0.0, device=device)
    case[0][0, 1] = 0.0
    implementation("pgd_update_", backend, case)(*case)
    assert (case[0][0, 1:] == 0).all()


@everywhere
@pytest.mark.parametrize("width", [100, 4100])
@pytest.mark.parametrize("norm", reference.NORMS)
def test_nan_in_delta_shows_in_the_norm(norm, width, place):
    backend, device = need("pgd_update_", place)
    case = update_case(1, 4, width, 4, norm=norm, masked=0.0, device=device)
    case[4][:] = 0
    case[0][0, 2, 50] = float("nan")
    implementation("pgd_update_", backend, case)(*case)
    assert case[8].isnan().tolist() == [[False, False, True, False]]
    assert int(case[0].isnan().sum()) == 1


def test_bf16_state_on_the_reference():
    """Computed in float32 and rounded once a step: the state differs from float32's by one rounding."""
    for rule in ("adamw", "adam", "rmsprop", "normalised", "sign", "sgd"):
        case = update_case(2, 5, 64, 9, rule=rule, epsilon=8.0)
        got = list(copied(case))
        for i in range(3):
            got[i] = got[i] if got[i] is None else got[i].bfloat16()
        want = copied(tuple(got), torch.float64)
        assert implementation("pgd_update_", "auto", tuple(got)) is reference.pgd_update_
        reference.pgd_update_(*got)
        reference.pgd_update_(*want)
        for i in range(3):
            if got[i] is not None:
                assert got[i].dtype == torch.bfloat16
                assert_near(got[i], want[i], 2e-6, ("delta", "exp_avg", "exp_avg_sq")[i], torch.bfloat16)


# ---- token_loss_ ----


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, *WIDTHS[1:], 50257])
def test_loss(vocabulary, dtype, place):
    backend, device = need("token_loss_", place)
    for weighted, gap in ((True, 0), (True, 5), (False, 0)):
        case = loss_case(5, vocabulary, dtype, weighted=weighted, gap=gap, device=device)
        run_against_oracle("token_loss_", backend, case)


@everywhere
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_loss_rows(rows, place):
    backend, device = need("token_loss_", place)
    run_against_oracle("token_loss_", backend, loss_case(rows, 50, device=device))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("away", [True, False])
def test_loss_of_sure_and_unsure_labels(away, dtype, place):
    backend, device = need("token_loss_", place)
    # -6: in bf16 a logit is rounded, and with it p = .007 = exp(-4.96)
    assert_losses_exact(backend, dtype, away, rows=2, vocabulary=1000, threshold=-6.0, device=device)


@everywhere
def test_the_threshold(place):
    """A label a little above it counts, one a little below does not."""
    backend, device = need("token_loss_", place)
    p = torch.tensor([-5.0 + 1e-4, -5.0 - 1e-4], dtype=torch.float64).exp()
    logits = torch.stack([p.logit(), torch.zeros(2)], 1).float().to(device)
    labels, away = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, dtype=torch.bool, device=device)
    losses, hits = token_loss_(logits, labels, away, torch.ones(2, device=device), backend=backend)
    assert losses[0].item() == pytest.approx(-math.log1p(-p[0].item()))
    assert losses[1] == 0
    assert (logits[0] != 0).all()
    assert (logits[1] == 0).all()
    assert not hits.any()


@everywhere
def test_hits_and_infinite_logits(place):
    backend, device = need("token_loss_", place)
    inf = float("inf")
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0], [-inf, 0.0, -inf], [0.0, -inf, -inf]], device=device)
    labels, away = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    want = reference.token_loss_(logits.double(), labels, away, torch.ones(4, device=device), -5.0)
    losses, hits = token_loss_(logits, labels, away, torch.ones(4, device=device), backend=backend)
    assert hits.tolist() == [True, False, False, True]
    assert torch.allclose(losses.double(), want[0])
    assert logits[3].tolist() == [0, 0, 0]


@everywhere
@pytest.mark.parametrize("column", [1, 700])
def test_nan_in_the_logits_is_not_hidden(column, place):
    backend, device = need("token_loss_", place)
    logits = torch.zeros(1, 1000, device=device)
    logits[0, column] = float("nan")
    one = torch.ones(1, device=device)
    losses, _ = token_loss_(logits, 3 * one.long(), one == 0, one, backend=backend)
    assert losses.isnan().all()
    assert logits.isnan().any()


# ---- all of them ----

SMALL = {
    "perturb": perturb_case(6, 3, 5),
    "pgd_update_": update_case(2, 4, 5, 6),
    "token_loss_": loss_case(5, 7),
    "add_norm": norm_case(6, 5),
    "add_norm_backward": norm_backward_case(6, 5),
    "swiglu": gate_case(6, 5),
    "swiglu_backward_": gate_case(6, 5, backward=True),
    "rotate_": rotate_case(),
    "attention": attention_case(),
    "attention_backward_": attention_case(backward=True),
}


def on_device(op: str, device: str):
    moved = [[t.to(device) for t in x] if isinstance(x, list) else x for x in copied(SMALL[op])]
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in moved)


@everywhere
@pytest.mark.parametrize("op", SMALL)
def test_opcheck(op, place, monkeypatch):
    backend, device = need(op, place)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, backend)
    args = on_device(op, device)
    if op == "perturb":
        args = (args[0].requires_grad_(), args[1].requires_grad_(), args[2])
    torch.library.opcheck(getattr(torch.ops.lpa_kernels, op).default, args)


@pytest.mark.parametrize("op", ["perturb", "add_norm", "add_norm_backward", "swiglu"])
def test_results_lie_in_memory_as_the_fakes_say(op, monkeypatch):
    """Rows side by side, whatever the strides of the arguments: a compiled `view` goes by the fake."""
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    args = [laid_out(x, "transposed") if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in copied(SMALL[op])]
    faked = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    call = getattr(torch.ops.lpa_kernels, op)
    real, fake = (found if isinstance(found, tuple) else (found,) for found in (call(*args), call(*faked)))
    assert [x.stride() for x in real] == [x.stride() for x in fake]


@everywhere
@pytest.mark.parametrize("op", SMALL)
def test_compiles_whole_and_gives_the_same(op, place, monkeypatch):
    """aot_eager: the graph, its fakes and its functionalisation are what is at stake, not the code generator."""
    backend, device = need(op, place)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, backend)
    eager, compiled = on_device(op, device), on_device(op, device)
    call = getattr(torch.ops.lpa_kernels, op)
    first = call(*eager)
    torch.compiler.reset()  # of one place in the code it compiles eight variants and no more
    second = torch.compile(lambda *args: call(*args), fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(eager[0], compiled[0])


@pytest.mark.parametrize("op", SMALL)
def test_float64_goes_to_the_reference(op):
    oracle = getattr(reference, op, None) or getattr(block_reference, op)
    assert implementation(op, "auto", copied(SMALL[op], torch.float64)) is oracle


def test_the_faces_compile_whole_with_their_gradients():
    hidden, delta, rows = perturb_case(6, 3, 8)
    head = torch.randn(11, 8)
    labels, away = torch.randint(0, 11, (6,)), torch.rand(6) < 0.5

    def step(hidden, delta, weight):
        logits = torch.nn.functional.linear(perturb(hidden, delta, rows), head)
        loss = (token_loss(logits, labels, away)[0] * weight).sum()
        return loss + linear_token_loss(perturb(hidden, delta, rows), head, labels, away)[0].sum()

    def update(delta, grad):
        return pgd_update_(
            delta[None], [grad], torch.arange(3)[:, None], step_size=0.1, epsilon=1.0, rule="sign"
        ), delta

    leaves = [hidden.requires_grad_(), delta.requires_grad_()]
    weight = torch.rand(6)
    want = step(*leaves, weight)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, weight)
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(want, leaves)
    for a, b in zip(torch.autograd.grad(got, leaves), gradients, strict=True):
        torch.testing.assert_close(a, b)
    delta = delta.detach()
    first = update(delta.clone(), gradients[0])
    second = torch.compile(update, fullgraph=True, backend="aot_eager")(delta.clone(), gradients[0])
    torch.testing.assert_close(first, second)


@everywhere
@pytest.mark.parametrize("op", ["perturb", "pgd_update_", "token_loss_"])
def test_never_waits_for_the_gpu_and_can_be_captured(op, place):
    backend, device = need(op, place)
    if device != "cuda" or backend == "reference":
        pytest.skip("for kernels on a GPU")
    make = {"perturb": perturb_case, "pgd_update_": update_case, "token_loss_": loss_case}[op]
    size = {"perturb": (90, 40, 576), "pgd_update_": (5, 50, 576, 90), "token_loss_": (9, 40000)}[op]
    case = make(*size, dtype=torch.bfloat16, device=device)
    eager, captured = copied(case), copied(case)
    fn = implementation(op, backend, case)
    fn(*copied(case))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = fn(*eager)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second = fn(*captured)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(first, second, equal_nan=True)
    torch.testing.assert_close(eager[0], captured[0])
