"""csrc/cuda without a GPU: its own source run on the CPU, faults that this must find, and what nvcc makes of it."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from lpa_kernels.ops import registry
from tests.support.batches import assert_same, attack_with, llama, pairs
from tests.support.cuda_on_cpu import SOURCE, Kernel, compiled, launch, needs_gxx
from tests.support.cuda_on_cpu.grid import GRID, SLOW

ROOT = Path(__file__).resolve().parents[3]
HEADERS = Path(torch.__file__).parent / "include"  # not through cpp_extension, whose import wants setuptools first

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")


# ---- on the CPU ----


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Kernel:
    return compiled(tmp_path_factory.mktemp("cuda_on_cpu"))


@needs_gxx
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in GRID])
def test_the_source_on_the_cpu(name, kernel):
    """Against the oracle in float64; to the same bits in every order of threads; nothing written beside."""
    GRID[name](kernel)


@needs_gxx
def test_an_attack_takes_its_updates_from_the_source(kernel, monkeypatch):
    """backend="native" where the update is all that it has, as on CUDA: the other ops run as under "auto"."""
    launches = []

    def update(*args):
        launches.append(args[0].shape)
        launch(kernel, args)

    table = {place: impl for place, impl in registry._table.items() if "native" not in place}
    monkeypatch.setattr(registry, "_table", table)
    registry.register("pgd_update_", "native", update, lambda *args: None)
    registry.register("perturb", "native", update, lambda *args: "not here", lambda device_type: False)
    model, batch, sites = llama(), pairs(), ["embedding", "mlp:1"]
    found, expected = (attack_with(model, batch, sites, "packed", steps=3, backend=b) for b in ("native", "reference"))
    assert len(launches) == 3
    assert_same(found, expected)


# (what is wrong, the source, the fault in its place)
FAULTS = [
    ("no barrier before warps are written", "  __syncthreads();  // the last call's readers are done\n", ""),
    ("no barrier before warps are read", "  __syncthreads();\n  x = warps[0];", "  x = warps[0];"),
    ("half a warp summed", "int lane = 16;", "int lane = 8;"),
    ("a shuffle that lanes skip", "x = combine(x, __shfl", "if (lane != 4 || threadIdx.x % 8) x = combine(x, __shfl"),
    ("a shuffle of half a warp", "0xffffffffu", "0x0000ffffu"),
    ("the last warp forgotten", "warp < blockDim.x / 32", "warp + 1 < blockDim.x / 32"),
    ("a barrier that some pass by", "const bool outside", "if (begin < 20) __syncthreads();\n  const bool outside"),
    ("threads that leave before the norm", "  float part = 0;", "  if (begin >= width) return;\n  float part = 0;"),
    ("a NaN that the largest hides", "a > b || a != a ? a : b", "a > b ? a : b"),
    ("one row too many", "if (row >= call.rows) return;", "if (row > call.rows) return;"),
    ("too few blocks", "(call.rows + config.blockDim.y - 1)", "call.rows"),
    ("too many threads", "kMaxThreads = 512;", "kMaxThreads = 2048;"),
    ("columns past the end read", "if (at.hold(k)) out[k]", "if (at.of(k) <= at.width) out[k]"),
    ("columns past the end written", "if (at.hold(k)) *", "if (at.of(k) <= at.width) *"),
    ("columns past the end in the norm", "      if (!at.hold(k)) return;", "      if (k > 99) return;"),
    ("the gradient of no token not set", "Held<T, V> raw[2]{};", "Held<T, V> raw[2];"),
    ("wide rows taken for kept ones", "bool kept = int64_t{threads} * kChunks >= vectors;", "bool kept = true;"),
    ("a width that 4 does not divide", "return call.width % kVector == 0 && ", "return "),
    ("delta not aligned", "aligned(call.delta, 16) && ", ""),
    ("moments not aligned", "aligned(call.exp_avg_sq, 16) && ", ""),
    ("gradient not aligned", " &&\n         aligned(grad.data, bytes);", ";"),
    ("rows of the gradient not aligned", "grad.row_stride % kVector == 0 &&", "true &&"),
    ("columns of the gradient apart", "grad.column_stride == 1 && ", ""),
    ("columns of the gradient taken for neighbours", "V == 1 ? grad.column_stride : 1", "1"),
    ("a row of the gradient in 32 bits", "tokens[share] * grad.row_stride", "int(tokens[share] * grad.row_stride)"),
    ("one token of a row alone", "share < 2; ++share", "share < 1; ++share"),
    ("tokens of one share read as of two", "call.shares == 2 ? own[1] : -1", "own[1]"),
    ("no token taken for the first", "if (tokens[share] < 0) continue;", "if (tokens[share] < -1) continue;"),
    ("rows without tokens moved", "const bool live = tokens[0] >= 0 || tokens[1] >= 0;", "const bool live = true;"),
    ("rows of one token left alone", "tokens[0] >= 0 || tokens[1] >= 0;", "tokens[0] >= 0 && tokens[1] >= 0;"),
    ("gradients that are not finite", "isfinite(sum) ? sum * sign : 0.0f", "sum * sign"),
    ("descent for ascent", "call.maximize ? -1.0f : 1.0f", "1.0f"),
    ("1 - beta^t with cancellation", "-expm1f(t * c.log_beta2)", "1 - expf(t * c.log_beta2)"),
    ("no decay", "x * decay - scale", "x - scale"),
    ("one radius for all rows", "call.epsilon[call.epsilon_per_row ? index : 0]", "call.epsilon[0]"),
    ("squares below float32", "if (squares > 1e-24f && squares < 1e36f) break;", "break;"),
    ("a NaN that the box hides", "x > box ? box : (x < -box ? -box : x)", "fminf(fmaxf(x, -box), box)"),
    ("rows counted by every thread", "  if (threadIdx.x == 0) {", "  if (threadIdx.x < 32) {"),
    ("rows counted without a projection", "live && call.norm != Norm::none &&", "live &&"),
    ("sites of another dtype", "if (grad.dtype != dtype || ", "if ("),
    ("sites that cannot be read in vectors", " || in_vectors(call, grad) != vector) break;", ") break;"),
    ("more sites than fit", "count < kMaxSites && ", ""),
    ("the second launch from the first site", "site = first + blockIdx.y", "site = blockIdx.y"),
    ("the other 16-bit dtype", "launch<__nv_bfloat16>", "launch<__half>"),
]  # fmt: skip


def _run_faulty(folder: Path, source: str) -> None:
    """In a process of its own, which a fault may end; its exit status is 0 where every check passes."""
    torch.set_num_threads(1)  # threads of the parent do not live on in a fork
    kernel = compiled(folder, source)
    for name in GRID.keys() - SLOW:
        GRID[name](kernel)


def _status(folder: Path, source: str) -> int:
    """The exit status of a process that runs this source through the checks."""
    child = multiprocessing.get_context("fork").Process(target=_run_faulty, args=(folder, source))
    child.start()
    child.join(300)
    ended = not child.is_alive()
    child.kill()
    child.join()
    assert (folder / "update.so").exists(), "the source does not compile"
    assert ended, "the checks did not end in 5 minutes"
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize(("what", "right", "wrong"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_has_its_place(what, right, wrong):
    assert SOURCE.read_text().count(right) >= 1, "the source has changed; put the fault where it belongs now"


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize(("what", "right", "wrong"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found(what, right, wrong, tmp_path):
    assert _status(tmp_path, SOURCE.read_text().replace(right, wrong, 1)) != 0, f"{what}: every check passed"


@needs_gxx
@pytest.mark.slow
def test_no_fault_is_found_in_the_source_itself(tmp_path):
    assert _status(tmp_path, SOURCE.read_text()) == 0


# ---- by nvcc ----

DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}  # as names are mangled
RULES = ("adamw", "normalised", "sign")
RECORDED = "13.0"  # the release of nvcc whose registers, loads and stores were counted; others may choose otherwise


def _cuobjdump() -> str | None:
    """CUDA's own, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.nvidia.cuobjdump.path


def _kernels(text: str, header: str) -> dict[tuple[str, str, bool, bool], str]:
    """What a tool says of each kernel, by dtype, rule, in vectors or not, kept or not."""
    parts = re.split(header + r".*?update_kernelI(\w+?)LNS_4RuleE(\d)ELi(\d)ELb(\d)E\w*", text)[1:]
    return {
        (DTYPES[dtype], RULES[int(rule)], width == "4", kept == "1"): body
        for dtype, rule, width, kept, body in zip(*(parts[i::5] for i in range(5)), strict=True)
    }


@needs_nvcc
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "sm_120"))]
)
def test_nvcc_spills_nothing_and_reads_in_vectors(target, tmp_path):
    if target not in subprocess.run(["nvcc", "--list-gpu-code"], text=True, capture_output=True).stdout.split():
        pytest.skip(f"this nvcc does not know {target}")
    cubin = tmp_path / "update.cubin"
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin", str(SOURCE), "-o", str(cubin)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = _kernels(done.stdout, "Compiling entry function")
    assert len(said) == 27, done.stdout  # 3 dtypes and 3 rules; kept, in spans, and in spans of single columns
    registers = {name: int(re.search(r"Used (\d+) registers", text)[1]) for name, text in said.items()}
    spills = {name: re.findall(r"(\d+) bytes spill", text) for name, text in said.items()}
    print(target, registers)
    assert {name: found for name, found in spills.items() if found != ["0", "0"]} == {}
    release = subprocess.run(["nvcc", "--version"], text=True, capture_output=True, check=True).stdout
    exact = f"release {RECORDED}," in release
    if exact:  # two blocks of 256 threads, or one of 512, share a multiprocessor's 65536 registers
        assert {name: n for name, n in registers.items() if n > (128 if name[1] == "adamw" else 104)} == {}
    else:
        print(f"this nvcc is not of {RECORDED}; only spills and widths are checked")

    if _cuobjdump() is None:
        return
    sass = subprocess.run([_cuobjdump(), "-sass", str(cubin)], text=True, capture_output=True, check=True).stdout
    for (dtype, rule, _, kept), text in _kernels(sass, "Function : ").items():
        if not kept:
            continue
        found = Counter(re.findall(r"\b(LDG|STG)(?:\.\w+)*?(\.64|\.128|)(?:\.CONSTANT)?\s", text))
        state = 12 if rule == "adamw" else 4  # vectors of delta, and of its moments
        loads = Counter({".128": state, ".64": 2, "": 3 if rule == "adamw" else 2})  # the row's tokens; step and sizes
        loads[".128" if dtype == "float32" else ".64"] += 8  # gradients of two tokens
        stores = Counter({".128": state, "": 1})
        assert found.keys() == {("LDG", w) for w in loads} | {("STG", w) for w in stores}, (dtype, rule)
        if not exact:
            continue
        assert {w: n for (op, w), n in found.items() if op == "LDG"} == loads, (dtype, rule)
        assert {w: n for (op, w), n in found.items() if op == "STG"} == stores, (dtype, rule)
        assert text.rfind("LDG.") < text.find("STG."), f"{dtype}, {rule}: a load waits for a store"
        if rule == "adamw" and dtype != "float32":
            assert text.rfind("LDG.") < text.find("MUFU."), f"{dtype}: a load waits for arithmetic"


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_cuda_binding_compiles_where_nvcc_is():
    found = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], text=True, capture_output=True).stderr
    toolkit = re.search(r"INCLUDES=\"?-I([^\s\"]+)", found)[1]
    paths = [f"-isystem{path}" for path in (HEADERS, HEADERS / "torch/csrc/api/include", toolkit)]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *macros, *paths, "csrc/ops_cuda.cpp"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
