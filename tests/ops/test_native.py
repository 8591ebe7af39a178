"""The compiled kernels against the oracle, on every instruction set that this CPU has; csrc's CUDA through nvcc.

Without the extension these tests are skipped, or fail where LPA_KERNELS_REQUIRE_NATIVE=1.
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
from tests.ops.cases import (
    LAYOUTS,
    PROBABILITIES,
    assert_near,
    copied,
    implementation,
    loss_case,
    run_against_oracle,
    update_case,
)

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path(torch.__file__).parent / "include"  # not through cpp_extension, whose import wants setuptools first
REQUIRED = os.environ.get("LPA_KERNELS_REQUIRE_NATIVE") == "1"
WIDTHS = (1, 33, 576, 3584, 4096, 8192, 16384)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = ("default", "avx2", "avx512")  # PyTorch's names, of which ATEN_CPU_CAPABILITY takes one

built = pytest.mark.skipif(not native.BUILT, reason="the native backend is not built (see setup.py)")


@pytest.mark.skipif(not REQUIRED, reason="asked for by LPA_KERNELS_REQUIRE_NATIVE=1")
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
    chosen = (
        "follow_the or layouts or mixed or 16_bit or keep or normalized or exponential or rounded or sure or infinite"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=ROOT, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 35, done.stdout


@built
def test_the_kernels_follow_the_request():
    """PyTorch reads the same variable, and knows no CPU capability but these three that x86-64 has."""
    theirs = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    assert torch.ops.lpa_kernels_native.cpu_kernels() == theirs


# ---- pgd_update_ ----


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_update(width, dtype):
    for rule in native.RULES:
        for norm in native.NORMS:
            run_against_oracle("pgd_update_", "native", update_case(2, 5, width, 7, dtype=dtype, rule=rule, norm=norm))


@built
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_update_rows(rows):
    for shares in (1, 2):
        run_against_oracle("pgd_update_", "native", update_case(3, rows, 40, 50, shares, per_row_epsilon=True))


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_layouts(layout):
    for dtype in DTYPES:
        for rule in native.RULES:
            case = update_case(2, 6, 1030, 9, 2, dtype, rule=rule, layout=layout, maximize=True)
            run_against_oracle("pgd_update_", "native", case)


@built
def test_update_mixed_dtypes():
    case = update_case(3, 5, 100, 6)
    case[3][1] = case[3][1].bfloat16()
    case[3][2] = case[3][2].half()
    run_against_oracle("pgd_update_", "native", case)


@built
@pytest.mark.parametrize("norm", native.NORMS)
def test_rows_without_tokens_keep_every_bit(norm):
    case = update_case(2, 6, 700, 5, norm=norm, masked=1.0, epsilon=1e-3)
    before = copied(case)
    implementation("pgd_update_", "native", case)(*case)
    for i in (0, 1, 2, 9):
        assert torch.equal(case[i], before[i])
    assert_near(case[8], reference.row_norm(case[0].double(), norm), 1e-6)


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_read_exactly(dtype):
    """With beta1 = 0 the first moment is the gradient; what is not finite counts as 0."""
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
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1.0, 1e25])
def test_normalized_by_a_norm_whose_square_leaves_float32(magnitude):
    case = update_case(1, 3, 65, 4, 1, rule="normalized", norm="none", masked=0.0, bad=False)
    case[3][0].mul_(magnitude * 1e3)
    run_against_oracle("pgd_update_", "native", case)


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


@built
def test_nan_in_delta_shows_in_the_norm():
    for norm in native.NORMS:
        case = update_case(1, 4, 100, 4, norm=norm, masked=0.0)
        case[0][0, 2, 50] = float("nan")
        implementation("pgd_update_", "native", case)(*case)
        assert case[8].isnan().tolist() == [[False, False, True, False]]


# ---- token_loss_ ----


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 33, 1000, 50257])
def test_loss(vocabulary, dtype):
    for weighted in (True, False):
        for gap in (0, 5):
            case = loss_case(9, vocabulary, dtype, weighted=weighted, gap=gap)
            run_against_oracle("token_loss_", "native", case)


@built
@pytest.mark.parametrize("rows", [0, 1, 400])
def test_loss_rows(rows):
    run_against_oracle("token_loss_", "native", loss_case(rows, 50))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("away", [True, False])
def test_loss_of_sure_and_unsure_labels(probability, dtype, away):
    case = loss_case(8, 1000, dtype, probability=probability, away=away, ignored=0.0)
    want = reference.token_loss_(*copied(case, torch.float64))
    losses, _ = implementation("token_loss_", "native", case)(*copied(case))
    counted = want[0] != 0  # in bf16 some of the rows at p = .007 fall below the threshold
    assert counted.any()
    assert ((losses - want[0]) / want[0])[counted].abs().max() < 1e-6
    run_against_oracle("token_loss_", "native", case)


@built
def test_threshold():
    """A label a little above the threshold counts, one a little below does not."""
    p = torch.tensor([-5.0 + 1e-4, -5.0 - 1e-4], dtype=torch.float64).exp()
    logits = torch.stack([p.logit(), torch.zeros(2)], 1).float()
    labels, away, weight = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.ones(2)
    losses, _ = functional.token_loss_(logits, labels, away, weight, backend="native")
    assert losses[0] == pytest.approx(-torch.log1p(-p[0]).item())
    assert losses[1] == 0
    assert (logits[0] != 0).all()
    assert (logits[1] == 0).all()


@built
def test_hits_and_infinite_logits():
    inf = float("inf")
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0], [-inf, 0.0, -inf], [0.0, -inf, -inf]])
    labels, away = torch.zeros(4, dtype=torch.int64), torch.tensor([False, False, False, False])
    want = reference.token_loss_(logits.clone().double(), labels, away, torch.ones(4), -5.0)
    losses, hits = functional.token_loss_(logits, labels, away, torch.ones(4), backend="native")
    assert hits.tolist() == [True, False, False, True]
    assert torch.allclose(losses.double(), want[0])
    assert logits[3].tolist() == [0, 0, 0]


@built
def test_nan_in_the_logits_is_not_hidden():
    for column in (1, 700):
        logits = torch.zeros(1, 1000)
        logits[0, column] = float("nan")
        losses, _ = functional.token_loss_(
            logits, torch.tensor([3]), torch.tensor([False]), torch.ones(1), backend="native"
        )
        assert losses.isnan().all()
        assert logits.isnan().any()


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
@pytest.mark.parametrize("op", native.OPS)
def test_same_bits_on_any_number_of_threads(op):
    case = update_case(3, 200, 576, 300) if op == "pgd_update_" else loss_case(40, 5000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            args = copied(case)
            returned = implementation(op, "native", args)(*args)
            results.append([t for t in (*args, *(returned or ())) if isinstance(t, torch.Tensor)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
@pytest.mark.parametrize("op", native.OPS)
def test_opcheck(op):
    case = update_case(2, 3, 10, 4) if op == "pgd_update_" else loss_case(4, 9)
    assert implementation(op, "auto", case) is implementation(op, "native", case)
    torch.library.opcheck(getattr(torch.ops.lpa_kernels, op), case)
    torch.library.opcheck(getattr(torch.ops.lpa_kernels_native, op), case, test_utils="test_schema")


@built
def test_the_front_door_of_the_ops_follows_the_environment(monkeypatch):
    """torch.ops.lpa_kernels.* is never taken over by the compiled kernel: the table of backends decides."""
    case, calls = loss_case(4, 9), []
    real = registry.select("token_loss_", "reference", case)
    impl = registry.Impl(lambda *args: calls.append(1) or real(*args), lambda *args: None)
    monkeypatch.setitem(registry._table, ("token_loss_", "reference"), impl)
    torch.ops.lpa_kernels.token_loss_(*case)
    assert not calls
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    torch.ops.lpa_kernels.token_loss_(*case)
    assert calls


@built
def test_what_it_cannot_take_goes_to_the_reference():
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
@pytest.mark.parametrize("label", [-1, 9])
def test_a_label_out_of_range_is_refused(label):
    case = loss_case(4, 9)
    case[1][2] = label
    with pytest.raises(RuntimeError, match=rf"labels\[2\] is {label}; expected -100 or 0 to 8"):
        implementation("token_loss_", "native", case)(*case)


# ---- CUDA, without a GPU ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_nvcc_spills_nothing(target, tmp_path):
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-c", "csrc/cuda/update.cu",
         "-o", str(tmp_path / "update.o")],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stdout)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stdout)]
    print(f"{target}: registers {registers}, spilled bytes {spills}")
    assert len(registers) == 9, done.stdout  # 3 rules, and rows held in registers, read again, or not aligned
    assert spills == [0] * 18, done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("c++") is None, reason="no nvcc or no C++ compiler")
def test_the_cuda_binding_compiles_where_nvcc_is():
    found = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], text=True, capture_output=True).stderr
    toolkit = re.search(r"INCLUDES=\"?-I([^\s\"]+)", found)[1]
    paths = [f"-I{path}" for path in (HEADERS, HEADERS / "torch/csrc/api/include", toolkit)]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-Wall", *macros, *paths, "csrc/ops_cuda.cpp"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
