"""The promises of the compiled kernels alone, on every instruction set of this CPU.

`test_backends.py` compares them with the oracle. Without the extension these tests are skipped; with
LPA_KERNELS_REQUIRE_NATIVE=1 they fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpa_kernels.ops import functional, native, reference, registry
from tests.support.block_cases import attention_case, norm_case
from tests.support.op_cases import assert_near, copied, implementation, loss_case, perturb_case, update_case

ROOT = Path(__file__).resolve().parents[3]
HEADERS = Path(torch.__file__).parent / "include"  # not through cpp_extension, whose import wants setuptools first
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.cpp") if "cuda" not in path.name)
REQUIRED = os.environ.get("LPA_KERNELS_REQUIRE_NATIVE") == "1"
CAPABILITIES = ("default", "avx2", "avx512")  # PyTorch's names, of which ATEN_CPU_CAPABILITY takes one

built = pytest.mark.skipif(not native.BUILT, reason="the native backend is not built (see setup.py)")


@pytest.mark.skipif(not REQUIRED, reason="LPA_KERNELS_REQUIRE_NATIVE=1 requires it")
def test_is_built():
    assert native.BUILT, registry.backends()


@built
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("one instruction set is chosen already")
    best = torch.ops.lpa_kernels_native.cpu_kernels()
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"this process runs {best}")
    grid = "unlike or layouts or bitwise or leaves_float32 or once or sure or infinite or 576 or nan_in"
    grid += " or heads or rows or attention"
    chosen = f"follow_the or 16_bit or exponential or rounded or native-cpu and ({grid})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/lpa_kernels/ops", "-k", chosen],
        cwd=ROOT, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 60, done.stdout


@built
def test_the_kernels_follow_the_request():
    """PyTorch reads the same variable, and knows no CPU capability but these three that x86-64 has."""
    theirs = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    assert torch.ops.lpa_kernels_native.cpu_kernels() == theirs


# ---- pgd_update_ ----


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_read_exactly(dtype):
    """With beta1 = 0 the first moment is the gradient; a non-finite entry counts as 0."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    delta, zeros = torch.zeros(1, 64, 1024), torch.zeros(1, 64, 1024)
    first = torch.full_like(delta, 7.0)
    case = update_case(1, 64, 1024, 64, 1, masked=0.0)
    tokens, one = torch.arange(64)[:, None], torch.tensor(1.0)
    case = (delta, first, zeros, [grad], tokens, one, one, one, *case[8:13], 0.0, *case[14:])
    implementation("pgd_update_", "native", case)(*case)
    expected = grad.float()
    assert torch.equal(first[0], torch.where(expected.isfinite(), expected, 0.0))


@built
def test_update_offsets_beyond_2_to_the_31():
    """The rows of a gradient that lie 2^31 elements apart; only the pages that are touched take memory."""
    apart = 2**31 + 8
    grad = torch.empty(apart + 40, dtype=torch.float16).as_strided((2, 33), (apart, 1))
    case = update_case(1, 2, 33, 2, 1, torch.float16, masked=0.0)
    grad.copy_(case[3][0])
    case[3][0] = grad
    expected = copied((*case[:3], [grad.clone()], *case[4:]))
    implementation("pgd_update_", "native", case)(*case)
    reference.pgd_update_(*expected)
    assert_near(case[0], expected[0], 1e-6)


# ---- token_loss_ ----


@built
def test_exponential_within_two_units():
    """The gradient of logit j over that of the largest one is exp(z_j): float32's last place is 6e-8 to 1.2e-7."""
    z = torch.cat([torch.linspace(-87, 0, 100001), torch.tensor([-88.0, -200.0, -float("inf"), 0.0])])
    logits = z[None].clone()
    label = torch.tensor([100001])
    functional.token_loss_(logits, label, torch.tensor([False]), torch.ones(1), backend="native")
    ratio = logits[0, :100001].double() / logits[0, -1].double()
    expected = z[:100001].double().exp()
    normal = logits[0, :100001].abs() > 1.2e-38
    assert normal.sum() > 80000
    assert ((ratio - expected) / expected)[normal].abs().max() < 2.4e-7
    assert logits[0, 100002:100004].tolist() == [0, 0]


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once_to_nearest(dtype):
    """To the bit what the float32 call gives, then rounded by torch; float16's subnormal numbers are among them."""
    case = loss_case(20, 3000, dtype)
    wide = (case[0].float(), *case[1:])
    implementation("token_loss_", "native", case)(*case)
    implementation("token_loss_", "native", wide)(*wide)
    assert torch.equal(case[0], wide[0].to(dtype))


@built
def test_loss_offsets_beyond_2_to_the_31():
    apart = 2**31 + 8
    case = loss_case(2, 100, torch.bfloat16, ignored=0.0)
    logits = torch.empty(apart + 100, dtype=torch.bfloat16).as_strided((2, 100), (apart, 1))
    logits.copy_(case[0])
    far = (logits, *case[1:])
    losses, _ = implementation("token_loss_", "native", far)(*far)
    expected, _ = implementation("token_loss_", "native", case)(*case)
    assert torch.equal(losses, expected)
    assert torch.equal(logits, case[0])


# ---- both ----


@built
@pytest.mark.parametrize("op", ["perturb", "pgd_update_", "token_loss_", "attention", "attention_backward_"])
def test_same_bits_on_any_number_of_threads(op):
    case = {
        "perturb": perturb_case(300, 200, 576),
        "pgd_update_": update_case(3, 200, 576, 300),
        "token_loss_": loss_case(40, 5000),
        "attention": attention_case(),
        "attention_backward_": attention_case(backward=True),
    }[op]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            args = copied(case)
            returned = implementation(op, "native", args)(*args)
            returned = [returned] if isinstance(returned, torch.Tensor) else returned or []
            results.append([t for t in (*args, *returned) if isinstance(t, torch.Tensor)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
def test_the_front_door_of_the_ops_follows_the_environment(monkeypatch):
    """torch.ops.lpa_kernels.* is never taken over by the compiled kernel: the table of backends decides."""
    case, calls = loss_case(4, 9), []
    real = registry.select("token_loss_", "reference", case)
    impl = registry.Impl(lambda *args: calls.append(1) or real(*args), lambda *args: None, lambda device: True)
    monkeypatch.setitem(registry._table, ("token_loss_", "reference"), impl)
    torch.ops.lpa_kernels.token_loss_(*case)
    assert not calls
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    torch.ops.lpa_kernels.token_loss_(*case)
    assert calls


@built
def test_calls_that_a_backend_cannot_take_go_to_the_reference():
    double = copied(update_case(2, 3, 10, 4), torch.float64)
    for case in (update_case(2, 3, 10, 4, rule="adam"), double, update_case(2, 3, 10, 4, 3)):
        assert implementation("pgd_update_", "auto", case) is reference.pgd_update_
        with pytest.raises(RuntimeError, match="'native' cannot run pgd_update_"):
            implementation("pgd_update_", "native", case)
    transposed = loss_case(4, 9)
    transposed = (transposed[0].t().contiguous().t(), *transposed[1:])
    assert implementation("token_loss_", "auto", transposed) is reference.token_loss_


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({10: "adam"}, "rule='adam'"),
        ({11: "l2_sequence"}, "norm='l2_sequence'"),
        ({1: None}, "needs exp_avg"),
        ({4: torch.full((3, 2), 4)}, "token 4 of a gradient of 4"),
        ({4: torch.zeros(3, 3, dtype=torch.int64)}, "3 columns"),
        ({5: torch.tensor(1)}, "step has the wrong dtype"),
        ({8: torch.zeros(3, 2).t()}, "norms is not contiguous"),
        ({9: torch.zeros(5, dtype=torch.int32)}, "clipped has 5 entries"),
        ({3: [torch.zeros(4, 10)]}, "1 grads and 2 sites"),
        ({3: [torch.zeros(4, 9)] * 2}, "gradient is not"),
        ({3: [torch.zeros(4, 10, dtype=torch.float64)] * 2}, "none of float32"),
    ],
)
def test_a_direct_call_is_checked(change, message):
    case = update_case(2, 3, 10, 4)
    args = [change.get(i, argument) for i, argument in enumerate(case)]
    before = copied(case)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lpa_kernels_native.pgd_update_(*args)
    assert torch.equal(case[0], before[0])


@built
def test_a_row_out_of_range_is_refused():
    hidden, delta, rows = perturb_case(6, 3, 5)
    rows[4] = 3
    with pytest.raises(RuntimeError, match="row 3 of a delta of 3 rows"):
        implementation("perturb", "native", (hidden, delta, rows))(hidden, delta, rows)


@built
def test_what_a_block_cannot_take_is_refused():
    native_ops = torch.ops.lpa_kernels_native
    case = norm_case(6, 5)
    case[5][3] = 3
    with pytest.raises(RuntimeError, match="row 3 of a delta of 3 rows"):
        native_ops.add_norm(*case)
    x, weight = torch.zeros(6, 5), torch.ones(5)
    for call, words in (
        (lambda: native_ops.add_norm(x, x, x, x, None, None, weight, 1.0, 1e-5), "LoRA's product"),
        (
            lambda: native_ops.add_norm(x, x[:5], None, None, None, None, weight, 1.0, 1e-5),
            "residual has another shape",
        ),
        (lambda: native_ops.add_norm_backward(x, x, torch.zeros(5), weight, None), "rstd has 5 entries; expected 6"),
        (lambda: native_ops.swiglu(x, x.bfloat16(), "silu"), "up has another shape or dtype"),
        (lambda: native_ops.swiglu(x, x, "relu"), "activation='relu'"),
        (lambda: native_ops.swiglu(x.t(), x.t(), "silu"), "last stride of gate is not 1"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(3, 2, 16)}, "v has 3 entries in dimension 0; expected 36"),
        ({5: torch.full((36, 2), 128, dtype=torch.int32)}, "q_places has position 128 at token 0; expected 0 to 127"),
        ({6: torch.full((36, 2), -1, dtype=torch.int32)}, "k_places has position -1 at token 0"),
        ({7: torch.tensor([0, 9, 8, 20, 36], dtype=torch.int32)}, "q_starts does not ascend at row 1"),
        ({8: torch.tensor([0, 9, 18, 20, 35], dtype=torch.int32)}, "k_starts goes from 0 to 35; expected 0 to 36"),
        ({8: torch.tensor([0, 36], dtype=torch.int32)}, "k_starts has 2 entries; expected 5"),
        ({4: None}, "one of cos and sin is given without the other"),
        ({13: -1}, "window is -1; expected 0"),
        ({3: torch.zeros(128, 9), 4: torch.zeros(128, 9)}, r"cos is not \[positions, 8\]"),
        ({1: torch.zeros(36, 3, 16), 2: torch.zeros(36, 3, 16)}, "heads of q, 4 x 16, do not fit"),
    ],
)
def test_attention_out_of_range_is_refused(change, message):
    args = [change.get(i, argument) for i, argument in enumerate(attention_case())]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lpa_kernels_native.attention(*args)


@built
@pytest.mark.parametrize("label", [-1, 9])
def test_a_label_out_of_range_is_refused(label):
    case = loss_case(4, 9)
    case[1][2] = label
    with pytest.raises(RuntimeError, match=rf"labels\[2\] is {label}; expected -100 or 0 to 8"):
        implementation("token_loss_", "native", case)(*case)


# ---- the sources ----


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_compiler_has_nothing_to_say(source):
    includes = [f"-isystem{path}" for path in (HEADERS, HEADERS / "torch/csrc/api/include")]
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes, str(source)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
