"""The promises of the Triton kernels alone, on a GPU or under Triton's interpreter, and the cost of compiling them.

Triton decides at its import whether it interprets. Without a GPU and without TRITON_INTERPRET=1 this process skips the
tests of the kernels, here and in `test_backends.py`, and `test_under_the_interpreter` runs them in another.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from lpa_kernels.ops import reference, registry
from tests.support.op_cases import (
    assert_losses_exact,
    assert_near,
    copied,
    implementation,
    loss_case,
    perturb_case,
    run_against_oracle,
    update_case,
)

pytest.importorskip("triton")
import triton

from lpa_kernels.ops.triton import launch, norm, token_loss
from tests.support import compile_triton
from tests.support.block_cases import norm_case

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).resolve().parents[3]
NARROW = (torch.float32, torch.bfloat16)
PARTS, WHOLE = 1000, 1  # multiprocessors: far more than rows, so that a row is shared; or no more than rows

kernels = pytest.mark.skipif(not (CUDA or launch.INTERPRETED), reason="no GPU; runs under the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log(0), in the interpreter


def python(*args: str, **environment: str) -> str:
    """Output of another Python with TRITON_INTERPRET only as given; fails with that output."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", registry.ENVIRONMENT_VARIABLE)}
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CUDA or launch.INTERPRETED, reason="the kernels run in this process")
@pytest.mark.parametrize(("file", "least"), [("test_backends", 165), ("test_block", 150), ("test_triton", 30)])
def test_under_the_interpreter(file, least):
    path = f"tests/lpa_kernels/ops/{file}.py"
    out = python("-m", "pytest", "-p", "no:cacheprovider", path, "-k", "triton", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", out)
    assert passed, out
    assert int(passed[1]) >= least, out


def test_the_table_of_compiled_kernels_is_whole():
    """`.ci/run triton` compiles all kernels and compares them with it."""
    table = compile_triton.RECORD.read_text()
    names = ("_perturb", "_update", "_row", "_scan_part", "_finish_part", "_add_norm", "_add_norm_backward", "_swiglu",
             "_swiglu_backward", "_rotate", "_attention", "_gradient_of_queries", "_gradient_of_keys")  # fmt: skip
    for kernel, target in product(names, compile_triton.TARGETS.keys() - set(compile_triton.ON_REQUEST)):
        assert re.search(rf": {kernel} +{target} +\d+ +\d+", table), f"{kernel} is missing on {target}"
    registers = re.search(r"update adamw l2: _update +sm_90 +\d+ +(\d+)", table)
    assert registers
    assert int(registers[1]) <= 80  # three programs a multiprocessor


@pytest.mark.skipif(launch.INTERPRETED, reason="nothing is compiled under the interpreter")
def test_a_triton_without_a_table_is_said(monkeypatch, capsys):
    monkeypatch.setattr(triton, "__version__", "0.1")
    monkeypatch.setattr(compile_triton, "costs", lambda *args: [])
    assert compile_triton.main([]) == 0
    assert "triton 0.1; only spills are checked" in capsys.readouterr().out


@pytest.mark.skipif(launch.INTERPRETED, reason="compiled by the process that started this one")
def test_odd_shapes_strides_and_dtypes_compile():
    """The interpreter specialises on nothing, a compiled kernel on every 1 and on every multiple of 16."""
    assert "26 kernels compiled" in python("-m", "tests.support.compile_triton", "--corners")


@kernels
@pytest.mark.parametrize(
    ("multiprocessors", "rows", "vocabulary"),
    [
        *((m, *size) for m in (WHOLE, PARTS) for size in ((0, 9), (1, 2), (1, 33), (5, 1000), (2, 4100))),
        (WHOLE, 1, 40000),
    ],
)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float16])
def test_loss(rows, vocabulary, dtype, multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    for weighted, gap in ((True, 0), (True, 24), (False, 3)):
        run_against_oracle(
            "token_loss_",
            "triton",
            loss_case(rows, vocabulary, dtype, weighted=weighted, gap=gap, device=DEVICE),
        )


@kernels
@pytest.mark.parametrize("multiprocessors", [WHOLE, PARTS])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("away", [True, False])
def test_loss_of_sure_and_unsure_labels(away, dtype, multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    assert_losses_exact("triton", dtype, away, rows=1, vocabulary=4100, threshold=-5.0, device=DEVICE)


@kernels
@pytest.mark.parametrize("multiprocessors", [WHOLE, PARTS])
def test_loss_below_the_threshold_is_off(multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    for p, off in ((0.9 * math.exp(-5), True), (1.1 * math.exp(-5), False)):
        case = loss_case(2, 4100, probability=p, away=True, ignored=0.0, device=DEVICE)
        losses, hits = implementation("token_loss_", "triton", case)(*case)
        assert ((losses == 0) & (case[0] == 0).all(1)).tolist() == [off] * 2
        assert not hits.any()


@kernels
@pytest.mark.parametrize("multiprocessors", [WHOLE, PARTS])
def test_loss_of_strange_rows(multiprocessors, monkeypatch):
    """Forbidden tokens (-inf) are exact; a NaN or a label outside the vocabulary shows in its own row alone."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    case = loss_case(6, 4100, ignored=0.0, away=False, device=DEVICE)
    logits, labels = case[:2]
    labels[:] = torch.tensor([5, 5, 4100, -1, 5, 5])
    logits[0, 100:4099] = float("-inf")
    logits[1, 4099] = float("nan")
    logits[5, 4090:] = 200.0
    got, want = copied(case), copied(case, torch.float64)
    want[1][2:4] = 5
    losses, hits = implementation("token_loss_", "triton", got)(*got)
    right, _ = reference.token_loss_(*want)
    assert losses.isnan().tolist() == [False, True, True, True, False, False]
    assert not hits[1:4].any()
    for row in (0, 4, 5):
        assert_near(losses[row], right[row], 2e-6)
        assert_near(got[0][row], want[0][row], 2e-6)


def test_a_row_goes_to_as_many_programs_as_fill_the_gpu():
    assert token_loss.parts(256, 128256, 8, 132) == 1
    assert token_loss.parts(132, 128256, 8, 132) == 1
    assert token_loss.parts(28, 128256, 8, 132) == 18
    assert token_loss.parts(1, 128256, 8, 132) == 32  # no more than it has tiles
    assert token_loss.parts(1, 300, 8, 132) == 1


def test_says_what_it_cannot_take():
    def reason(op, case):
        with pytest.raises(RuntimeError) as error:
            registry.select(op, "triton", case)
        return str(error.value)

    hidden, delta, rows = perturb_case(4, 3, 8)
    assert "float64" in reason("perturb", (hidden.double(), delta, rows))
    assert "the last one must be 1" in reason("perturb", (hidden.t().contiguous().t(), delta, rows))
    assert "rule='adam'" in reason("pgd_update_", update_case(1, 2, 8, 4, rule="adam"))
    assert "delta is torch.float64" in reason("pgd_update_", (delta[None].double(), *update_case(1, 3, 8, 4)[1:]))
    assert "float64" in reason("token_loss_", loss_case(2, 9, torch.float64))
    assert "last one must be 1" in reason("token_loss_", (torch.randn(9, 2).t(), *loss_case(2, 9)[1:]))
    if not launch.INTERPRETED:
        assert "TRITON_INTERPRET" in reason("perturb", (hidden, delta, rows))
        assert "on cpu" in reason("token_loss_", loss_case(2, 9))


@kernels
def test_columns_of_a_gradient_beyond_2_to_the_31():
    """Of three columns the last lies 2^31 elements behind the first; only the pages that are touched take memory."""
    apart = 2**30 + 8
    case = update_case(1, 2, 3, 2, 1, torch.float16, masked=0.0, device=DEVICE)
    grad = torch.empty(2 * apart + 2, dtype=torch.float16, device=DEVICE).as_strided((2, 3), (1, apart))
    grad.copy_(case[3][0])
    expected = copied(case)
    case[3][0] = grad
    implementation("pgd_update_", "triton", case)(*case)
    reference.pgd_update_(*expected)
    assert_near(case[0], expected[0], 1e-6)


@pytest.mark.parametrize(
    ("room", "rank", "dtype", "fits"),
    [
        (232448, 256, torch.bfloat16, True),  # an H100
        (232448, 512, torch.bfloat16, False),
        (232448, 256, torch.float32, False),
        (101376, 128, torch.bfloat16, True),  # sm_120
        (101376, 256, torch.bfloat16, False),
    ],
)
def test_a_lora_that_does_not_fit_into_shared_memory_is_left_to_others(room, rank, dtype, fits, monkeypatch):
    monkeypatch.setattr(launch, "shared_memory", lambda device: room)
    monkeypatch.setattr(launch, "unavailable", lambda tensor: None)
    case = norm_case(2, 8, dtype, rank=rank)
    reason = registry._table["add_norm", "triton"].unsupported(*case)
    assert (reason is None) == fits
    assert fits or f"LoRA of rank {rank} takes" in reason
    assert registry._table["add_norm", "triton"].unsupported(*case[:2], None, None, *case[4:]) is None


EVERYWHERE = 32 << 10  # bytes, which a program has on every GPU: a bound below that refuses nothing
ON_AMD = {name for name, target in compile_triton.TARGETS.items() if target.backend == "hip"}
LORAS = {torch.bfloat16: (4, 16, 24, 64, 256), torch.float16: (64,), torch.float32: (4, 16, 24, 64, 128)}
QUICK = {("sm_80", torch.float32, 16), ("gfx942", torch.bfloat16, 64)}


def assert_bounds(compiled, target, rank, element_size, monkeypatch, least=0):
    monkeypatch.setattr(torch.version, "hip", "7.0" if target in ON_AMD else None)
    assert compiled <= norm.shared_bytes(rank, element_size) <= max(1.2 * compiled, least)


def test_the_shared_memory_of_lora_is_not_guessed_too_low(monkeypatch):
    table = compile_triton.RECORD.read_text()
    found = re.findall(r"norm of a site with LoRA: _add_norm +(\w+) +\d+ +\d+ +\d+ +(\d+)", table)
    assert {target for target, _ in found} == compile_triton.TARGETS.keys() - set(compile_triton.ON_REQUEST)
    for target, compiled in found:
        assert_bounds(int(compiled), target, 64, 2, monkeypatch)


@pytest.mark.skipif(launch.INTERPRETED, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize(
    ("target", "dtype", "rank"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in QUICK else pytest.mark.slow)
        for case in (
            (target, dtype, rank)
            for target in sorted(compile_triton.TARGETS.keys() - set(compile_triton.ON_REQUEST))
            for dtype, ranks in LORAS.items()
            for rank in ranks
        )
    ],
)
def test_the_shared_memory_of_lora_is_bounded_by_what_is_compiled(target, dtype, rank, monkeypatch):
    case = norm_case(64, 4096, dtype, rank=rank)
    call = partial(norm.add_norm, *(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in case))
    assert_bounds(compile_triton.shared(call, target), target, rank, dtype.itemsize, monkeypatch, EVERYWHERE)


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    width, tokens = 4096, (1 << 19) + 1
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.full((tokens,), -1, device=DEVICE)
    rows[-1] = 0
    delta = torch.randn(1, width, device=DEVICE)
    out = implementation("perturb", "triton", (hidden, delta, rows))(hidden, delta, rows)
    assert torch.equal(out[:-1], hidden[:-1])
    assert torch.equal(out[-1], (hidden[-1].float() + delta[0]).bfloat16())
    del out, hidden

    case = list(update_case(1, 1, width, 4, 1, rule="sign", norm="none", bad=False, masked=0.0, device=DEVICE))
    case[0] = torch.zeros(1, tokens, width, device=DEVICE)
    case[3] = [torch.ones((), device=DEVICE).expand(tokens, width)]
    case[4] = torch.arange(tokens, device=DEVICE)[:, None]
    case[8] = torch.full((1, tokens), float("nan"), device=DEVICE)
    implementation("pgd_update_", "triton", tuple(case))(*case)
    assert torch.equal(case[0].amin(), -case[6])
    assert torch.equal(case[0].amax(), -case[6])
    del case

    vocabulary = 128256
    count = (1 << 31) // vocabulary + 1
    last = loss_case(1, vocabulary, torch.bfloat16, ignored=0.0, device=DEVICE)
    logits = torch.zeros(count, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-1] = last[0][0]
    many = [logits, *(t.expand(count).contiguous() for t in last[1:4]), -5.0]
    losses, _ = implementation("token_loss_", "triton", tuple(many))(*many)
    right, _ = reference.token_loss_(*last)
    assert_near(losses[-1:], right, 2e-6)
    assert_near(logits[-1], last[0][0], 2e-6, "gradient", torch.bfloat16)
