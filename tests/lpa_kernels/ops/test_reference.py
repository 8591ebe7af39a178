"""The oracle ops against torch's own AdamW, cross entropy and float64 definitions, and the faces built on them."""

import math

import pytest
import torch
import torch.nn.functional as F

from lpa_kernels import PGDOptimizer, linear_token_loss, perturb, pgd_update_, project_, token_loss, token_loss_
from lpa_kernels.ops import reference, registry
from tests.support.op_cases import PROBABILITIES, loss_case, perturb_case, update_case


def scalar(value):
    return torch.tensor(float(value))


def adamw_with_projection(delta, grads, lr, epsilon, weight_decay=0.01):
    """Textbook: torch.optim.AdamW, then every row back into the ball."""
    p = delta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=weight_decay)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        with torch.no_grad():
            p.div_((p.norm(dim=-1, keepdim=True) / epsilon).clamp(min=1))
    return p.detach()


@pytest.mark.parametrize("epsilon", [0.3, 100.0])
def test_adamw_is_torchs(epsilon):
    torch.manual_seed(0)
    start = torch.randn(2, 5, 7)
    grads = [torch.randn(2, 5, 7) * 10.0**-i for i in range(6)]
    want = adamw_with_projection(start.double(), [g.double() for g in grads], 0.05, epsilon)
    delta, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    own = torch.arange(5)[:, None]
    for step, grad in enumerate(grads, 1):
        norms, clipped = pgd_update_(
            delta, list(grad), own, exp_avg=m, exp_avg_sq=v, step=step, step_size=0.05, epsilon=epsilon,
            backend="reference",
        )  # fmt: skip
    torch.testing.assert_close(delta, want.float(), rtol=1e-5, atol=1e-6)
    assert clipped.tolist() == [int((n > epsilon).sum()) for n in norms]
    assert (delta.norm(dim=-1) <= epsilon * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("rule", "optimizer", "options"),
    [
        ("adam", torch.optim.Adam, {"weight_decay": 0.1}),
        ("rmsprop", torch.optim.RMSprop, {"weight_decay": 0.1, "alpha": 0.999}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.1}),
    ],
)
def test_the_wider_rules_are_torchs(rule, optimizer, options):
    torch.manual_seed(1)
    p = torch.randn(4, 6, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    theirs = optimizer([p], lr=0.03, **options)
    ours = PGDOptimizer([q], lr=0.03, rule=rule, norm="none", weight_decay=0.1)
    for _ in range(4):
        for x in (p, q):
            x.grad = None
            (x.sin() ** 2).sum().backward()
        theirs.step()
        ours.step()
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


def test_a_radius_or_a_beta_of_zero():
    delta, own = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.arange(2)[:, None]
    moments = {"exp_avg": torch.zeros_like(delta), "exp_avg_sq": torch.zeros_like(delta)}
    grads = [torch.tensor([[0.0, 0.0], [1.0, -1.0]])]
    pgd_update_(delta, grads, own, **moments, step_size=0.1, betas=(0.0, 0.0), epsilon=0.0, backend="reference")
    assert delta[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_smallest_gradients_still_count():
    delta = torch.zeros(1, 1, 2)
    pgd_update_(delta, [torch.tensor([[3e-30, 4e-30]])], torch.tensor([[0]]), step_size=0.1, rule="normalised",
                backend="reference")  # fmt: skip
    torch.testing.assert_close(delta[0, 0], torch.tensor([-0.06, -0.08]))


def test_a_row_in_which_the_label_alone_is_possible():
    logits = torch.tensor([[1.0, -math.inf, -math.inf]] * 2)
    losses, hits = token_loss_(
        logits, torch.zeros(2, dtype=torch.long), torch.tensor([False, True]), torch.ones(2), backend="reference"
    )
    assert losses[0] == 0
    assert hits.all()
    assert logits[0].tolist() == [0, 0, 0]


def test_normalised_and_sign_steps():
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    for rule, want in (("normalised", [[-0.06, -0.08], [0, 0]]), ("sign", [[-0.1, -0.1], [0, 0]])):
        delta = torch.zeros(1, 2, 2)
        pgd_update_(delta, [grad], torch.tensor([[0], [1]]), step_size=0.1, rule=rule, backend="reference")
        torch.testing.assert_close(delta[0], torch.tensor(want, dtype=torch.float32))


def test_the_american_spelling_of_a_rule_is_an_alias():
    grad = torch.tensor([[3.0, 4.0]])
    delta, parameter = torch.zeros(1, 1, 2), torch.zeros(1, 2, requires_grad=True)
    pgd_update_(delta, [grad], torch.tensor([[0]]), step_size=0.1, rule="normalized")
    optimizer = PGDOptimizer([parameter], lr=0.1, rule="normalized")
    parameter.grad = grad
    optimizer.step()
    assert optimizer.param_groups[0]["rule"] == "normalised"
    for moved in (delta[0], parameter.detach()):
        torch.testing.assert_close(moved, torch.tensor([[-0.06, -0.08]]))


def test_update_sums_tokens_skips_rows_and_zeroes_what_is_not_finite():
    grad = torch.tensor([[1.0, math.nan], [2.0, math.inf], [4.0, 8.0]])
    tokens = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    delta = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]]])
    norms, clipped = pgd_update_(
        delta, [grad], tokens, step_size=1.0, rule="sgd", weight_decay=0.0, epsilon=1e9, backend="reference"
    )
    assert delta[0].tolist() == [[-3.0, 0.0], [-4.0, -8.0], [5.0, 5.0]]
    up = torch.zeros(1, 3, 2)
    pgd_update_(up, [grad], tokens, step_size=1.0, rule="sgd", weight_decay=0.0, maximize=True, backend="reference")
    assert up[0].tolist() == [[3.0, 0.0], [4.0, 8.0], [0.0, 0.0]]
    # a row without tokens keeps even a norm beyond the radius, and is not counted
    norms, clipped = pgd_update_(delta, [grad], tokens, step_size=0.0, rule="sgd", epsilon=1.0, backend="reference")
    assert delta[0, 2].tolist() == [5.0, 5.0]
    assert clipped.tolist() == [2]
    assert norms[0, 2] == pytest.approx(50**0.5)


def test_perturb_rounds_once_and_has_the_gradients_of_a_gather():
    hidden = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    delta = torch.tensor([[1.5, 2.0**-9]])
    out = perturb(hidden, delta, torch.tensor([0]), backend="reference")
    assert out.tolist() == [[258.0, 1.0]]  # 257.5 rounds to even; added in bf16 it would be 256 + 2 or 256
    h = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    d = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    rows = torch.tensor([1, -1, 0, 1, -1])
    assert torch.autograd.gradcheck(lambda h, d: perturb(h, d, rows), (h, d))
    assert torch.autograd.gradcheck(lambda h, d: torch.ops.lpa_kernels.perturb(h, d, rows), (h, d))
    grad = torch.randn(5, 3)
    h32 = torch.zeros(5, 3, requires_grad=True)
    out = perturb(h32, torch.zeros(2, 3), rows)
    (got,) = torch.autograd.grad(out, h32, grad)
    assert got.data_ptr() == grad.data_ptr()  # handed on, not copied


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_token_loss_against_the_definition_in_float64(p, dtype, away):
    args = loss_case(8, 50, dtype, probability=p, away=away, ignored=0, weighted=False, threshold=-100.0)
    logits, labels = args[0], args[1]
    losses, _ = token_loss_(*args, backend="reference")
    rest = logits.double().scatter(1, labels[:, None], -math.inf).logsumexp(1)
    everything = logits.double().logsumexp(1)
    own = logits.double().gather(1, labels[:, None]).squeeze(1)
    want = everything - rest if away else everything - own
    # one float32 rounding of s = z_y - M moves the loss by no more than eps * |s|
    allowed = 4 * torch.finfo(torch.float32).eps * (1 + (own - rest).abs())
    assert ((losses.double() - want).abs() <= allowed).all()


def test_toward_is_cross_entropy_and_away_has_its_threshold():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 11) * 4, torch.randint(0, 11, (9,))
    toward, hits = token_loss(logits, labels, torch.zeros(9, dtype=torch.bool))
    torch.testing.assert_close(toward, F.cross_entropy(logits, labels, reduction="none"))
    assert hits.tolist() == (logits.argmax(1) == labels).tolist()
    away, _ = token_loss(logits, labels, torch.ones(9, dtype=torch.bool))
    log_p = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    want = torch.where(log_p < -5.0, 0.0, -torch.log1p(-log_p.exp()))
    torch.testing.assert_close(away, want, rtol=1e-4, atol=1e-6)
    assert (away == 0).any()
    assert (away > 0).any()


def test_token_loss_gradients():
    torch.manual_seed(0)
    logits = torch.randn(6, 11, dtype=torch.double, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    away = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z: token_loss(z, labels, away)[0], logits)
    weights = torch.randn(6, dtype=torch.double)
    (want,) = torch.autograd.grad((token_loss(logits, labels, away)[0] * weights).sum(), logits)
    z = logits.detach().clone().requires_grad_()
    memory = z * 1  # not a leaf: its memory may be overwritten
    (got,) = torch.autograd.grad((token_loss(memory, labels, away, inplace=True)[0] * weights).sum(), z)
    torch.testing.assert_close(got, want)
    buffer = logits.detach().clone()
    token_loss_(buffer, labels, away, weights)
    torch.testing.assert_close(buffer, want)


def test_linear_token_loss_is_the_loss_of_the_heads_logits_in_chunks():
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    weight, bias = torch.randn(13, 5, dtype=torch.double), torch.randn(13, dtype=torch.double)
    labels, away = torch.randint(0, 13, (7,)), torch.rand(7) < 0.5
    for chunk in (1, 3, 7, None):
        got = linear_token_loss(hidden, weight, labels, away, bias=bias, chunk_rows=chunk)
        want = token_loss(F.linear(hidden, weight, bias), labels, away)
        torch.testing.assert_close(got[0], want[0])
        assert got[1].equal(want[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # bf16 states, a float32 head
        losses, _ = linear_token_loss(hidden.float().bfloat16(), weight.float(), labels, away, bias=bias.float())
        torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(losses, got[0].float(), rtol=3e-2, atol=3e-2)
    assert torch.autograd.gradcheck(
        lambda h: linear_token_loss(h, weight, labels, away, bias=bias, chunk_rows=3)[0], hidden
    )
    with pytest.raises(ValueError, match="frozen head"):
        linear_token_loss(hidden, weight.requires_grad_(), labels, away)
    empty = linear_token_loss(torch.zeros(0, 5), torch.zeros(13, 5), labels[:0], away[:0])
    assert empty[0].shape == (0,)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_project_to_one_radius_a_row(norm):
    radii = torch.tensor([[0.5, 2.0]])
    delta = project_(torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]), radii, norm)
    want = [[0.5, 0.5], [2, 2]] if norm == "linf" else [[0.3, 0.4], [1.2, 1.6]]
    torch.testing.assert_close(delta[0], torch.tensor(want))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_project_(norm):
    torch.manual_seed(0)
    delta = torch.randn(3, 4, 8) * torch.tensor([0.01, 1, 10])[:, None, None]
    want = delta.clamp(-0.5, 0.5) if norm == "linf" else delta / (delta.norm(dim=-1, keepdim=True) / 0.5).clamp(min=1)
    for tensor in (delta.clone(), delta.transpose(0, 1).contiguous().transpose(0, 1)):
        assert project_(tensor, 0.5, norm) is tensor
        torch.testing.assert_close(tensor, want)


def test_pgd_optimizer_is_adamw_with_projection_under_a_scheduler():
    torch.manual_seed(0)
    p = torch.randn(2, 3, 8, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    theirs, ours = torch.optim.AdamW([p], lr=0.1), PGDOptimizer([q], lr=0.1, epsilon=1.0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (theirs, ours)]
    for _ in range(4):
        for x in (p, q):
            x.grad = None
            (x**3).sum().backward()
        theirs.step()
        ours.step()
        with torch.no_grad():
            p.div_(p.norm(dim=-1, keepdim=True).clamp(min=1))
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    restored = PGDOptimizer([q], lr=0.1, epsilon=1.0)
    restored.load_state_dict(ours.state_dict())
    assert restored.state[q]["step"] == 4


def test_pgd_optimizer_refuses():
    x = torch.zeros(3, 4, requires_grad=True)
    for options, words in (({"rule": "adamax"}, "adamax"), ({"norm": "l3"}, "l3"), ({"lr": -1.0}, "negative")):
        with pytest.raises(ValueError, match=words):
            PGDOptimizer([x], **options)
    with pytest.raises(ValueError, match="contiguous"):
        PGDOptimizer([x.detach().t().requires_grad_()])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_autograd_sees_what_a_kernel_overwrites(backend):
    if ("token_loss_", backend) not in registry._table:
        pytest.skip("the native kernels are not built")
    z = torch.randn(3, 5, requires_grad=True)
    logits = z.tanh()  # keeps its output for its backward
    labels, away = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    token_loss_(logits.detach(), labels, away, None, backend=backend)
    logits.sum().backward(retain_graph=True)
    token_loss_(logits.detach(), labels, away, torch.ones(3), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_faces_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="hidden has shape"):
        perturb(torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="rows has shape"):
        perturb(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3, dtype=torch.long))
    delta, own = torch.zeros(1, 2, 3), torch.arange(2)[:, None]
    for change, words in (
        ({"rule": "lion"}, "rule='lion'"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"tokens": own[:1]}, "tokens has shape"),
        ({"grads": []}, "there are 0 grads; expected 1"),
        ({"grads": [torch.zeros(2, 4)]}, "a gradient has shape"),
        ({}, "needs the moments"),
    ):
        arguments = {"grads": [torch.zeros(2, 3)], "tokens": own, "step_size": 1.0} | change
        with pytest.raises(ValueError, match=words):
            pgd_update_(delta, **arguments)
    state = {"exp_avg": torch.zeros_like(delta), "exp_avg_sq": torch.zeros_like(delta)}
    for change, words in (
        ({"exp_avg": torch.zeros(1, 2, 4)}, "exp_avg has shape"),
        ({"norms": torch.zeros(2)}, "norms has shape"),
        ({"clipped": torch.zeros(2, dtype=torch.int32)}, "clipped has shape"),
        ({"clipped": torch.zeros(1)}, "clipped has dtype"),
        ({"epsilon": torch.ones(1)}, "epsilon has shape"),
        ({"step": torch.ones(1)}, "step has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            pgd_update_(delta, [torch.zeros(2, 3)], own, **({"step_size": 1.0} | state | change))
    with pytest.raises(ValueError, match="labels has shape"):
        linear_token_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(1, dtype=torch.long), torch.zeros(1) > 0)
    with pytest.raises(ValueError, match="labels has shape"):
        token_loss_(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="norm='l1' has no projection"):
        project_(delta, 1.0, "l1")


def test_registry(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        perturb(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend="cuda")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "fpga")
    with pytest.raises(ValueError, match="LPA_KERNELS_BACKEND='fpga'"):
        project_(torch.zeros(1, 2), 1.0)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    args = perturb_case(4, 2, 3)
    assert registry.select("perturb", "auto", args) is reference.perturb
    monkeypatch.setattr(
        registry, "_table", {place: registry._table[place] for place in registry._table if "reference" in place}
    )
    monkeypatch.setattr(registry, "_missing", {})
    registry.register("perturb", "native", lambda *a: None, lambda *a: "a reason")
    with pytest.raises(RuntimeError, match="cannot run perturb: a reason"):
        registry.select("perturb", "native", args)
    table = registry.backends()
    assert "pgd_update_" in table
    assert "auto: cuda takes triton" in table


def test_a_named_backend_leaves_ops_that_it_lacks_on_a_device_to_the_others(monkeypatch, caplog):
    """As native on CUDA, which has the update alone; on a device for which it has nothing it raises."""
    args = perturb_case(4, 2, 3)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    monkeypatch.setattr(registry, "_logged", set())
    for op in ("perturb", "pgd_update_", "token_loss_"):
        where = ("cpu", "cuda") if op == "pgd_update_" else ("cuda",)
        registry.register(op, "native", lambda *a: None, lambda *a: "not here", where.__contains__)
    with caplog.at_level("INFO", registry.logger.name):
        assert registry.select("perturb", "native", args) is reference.perturb
    assert "perturb does not run on the native backend: not here" in caplog.text
    with pytest.raises(RuntimeError, match="'native' cannot run pgd_update_: not here"):
        registry.select("pgd_update_", "native", update_case(1, 1, 2, 1))
    with pytest.raises(RuntimeError, match="'native' cannot run perturb: not here"):
        registry.select("perturb", "native", tuple(tensor.to("meta") for tensor in args))


@pytest.mark.parametrize("rule", reference.RULES)
def test_a_row_without_tokens_keeps_every_bit_even_where_nothing_keeps_its_quotient_finite(rule: str) -> None:
    delta, m, v = (torch.randn(1, 3, 5).abs() * 9 for _ in range(3))
    m[0, 1], v[0, 1] = 0.0, 0.0
    before = [t[0, 1].clone() for t in (delta, m, v)]
    tokens = torch.tensor([[0], [-1], [1]])
    pgd_update_(
        delta, [torch.randn(2, 5)], tokens, exp_avg=m, exp_avg_sq=v, step_size=0.1, epsilon=1.0, rule=rule, eps=0.0
    )
    assert all(torch.equal(t[0, 1], b) for t, b in zip((delta, m, v), before, strict=True))
    assert float(delta[0, 0].norm()) == pytest.approx(1.0)
