"""Runs csrc/cuda/update.cu, as it stands or with a fault put in, on the CPU: g++ compiles it against the headers here.

Every launch is made five times, its threads in another order each time; what lies around each tensor is watched.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lpa_kernels.ops import reference
from tests.support.op_cases import Args, assert_near, copied

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "update.cu"
ORDERS = ("first to last", "last to first", "random", "first warp alone", "last warp alone")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRITTEN = {0: "delta", 1: "exp_avg", 2: "exp_avg_sq", 8: "norms", 9: "clipped"}  # places in a case of pgd_update_
CHECKS = "alignment,null,bounds,shift,signed-integer-overflow,pointer-overflow"  # each has a handler in update.cpp
GUARD = 64  # entries on either side of a tensor
POISON = 12345  # in guards and gaps: a number, because a NaN among the gradients would count as 0

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the path")

Kernel = Callable[..., bytes | None]


class LaunchError(AssertionError):
    """A launch that a GPU would refuse or that has no defined result."""


def compiled(folder: Path, source: str | None = None) -> Kernel:
    """The C function of update.cpp, built in `folder` from csrc, or from another text of update.cu."""
    if source is not None:
        (folder / "cuda").mkdir()
        (folder / "cuda" / "update.cu").write_text(source)
        shutil.copy(CSRC / "cuda" / "update.h", folder / "cuda")
        shutil.copy(CSRC / "update.h", folder)
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    if source is None:
        flags += ["-Werror"]
    flags += [f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all", f"-I{HERE}", f"-I{folder}", f"-I{CSRC}"]
    unlinked, library = folder / "update.o", folder / "update.so"
    for command in (
        ["g++", *flags, "-c", str(HERE / "update.cpp"), "-o", str(unlinked)],
        ["g++", "-shared", str(unlinked), "-o", str(library)],  # apart, so that UBSan's own handlers stay out
    ):
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stdout)
    function = ctypes.CDLL(str(library)).pgd_update
    function.restype = ctypes.c_char_p
    pointer, count, flag, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    function.argtypes = [flag, *[pointer] * 10, *[count] * 4, *[flag] * 4, *[number] * 4]
    return function


def launch(kernel: Kernel, args: Args, order: int = 0) -> None:
    """One call of pgd_update_ with the arguments of its schema, its threads in `ORDERS[order]`."""
    (delta, exp_avg, exp_avg_sq, grads, tokens, step, step_size, epsilon, norms, clipped,
     rule, norm, maximize, beta1, beta2, eps, weight_decay) = args  # fmt: skip
    table = torch.tensor([[g.data_ptr(), *g.stride(), DTYPES.index(g.dtype)] for g in grads], dtype=torch.int64)
    tensors = (delta, exp_avg, exp_avg_sq, table, tokens, step, step_size, epsilon, norms, clipped)
    failure = kernel(
        order, *(None if t is None else t.data_ptr() for t in tensors), *delta.shape, tokens.shape[1],
        epsilon.dim() > 0, maximize, ("adamw", "normalised", "sign").index(rule), ("none", "l2", "linf").index(norm),
        beta1, beta2, eps, weight_decay,
    )  # fmt: skip
    if failure is not None:
        raise LaunchError(failure.decode())


def guarded(tensor: Tensor, shift: int = 0) -> tuple[Tensor, Callable[[], bool]]:
    """A copy with the same strides in the midst of poison, `shift` entries further; and whether all poison is there."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((span + 2 * GUARD + shift,), POISON, dtype=tensor.dtype)
    own = memory.as_strided(tensor.shape, tensor.stride(), GUARD + shift)
    once = (slice(1),) * tensor.dim() if 0 in tensor.stride() else ()  # one number everywhere
    own[once] = tensor[once]
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), GUARD + shift).fill_(False)
    poison = memory[outside].clone()
    return own, lambda: torch.equal(memory[outside], poison)


def check(kernel: Kernel, case: Args, tolerance: float = 2e-6, shifts: Mapping[int, int] | None = None) -> None:
    """A case of pgd_update_ against the reference in float64, to the same bits in every order of its threads.

    Args:
        shifts: for places in the case, entries that its tensors lie beyond an aligned address.
    """
    shifts = shifts or {}
    want = copied(case, torch.float64)
    reference.pgd_update_(*want)
    first: list[bytes] | None = None
    for order, name in enumerate(ORDERS):
        got, intact = list(case), []
        for i, value in enumerate(case):
            if isinstance(value, list):
                pairs = [guarded(grad, shifts.get(i, 0)) for grad in value]
                got[i] = [pair[0] for pair in pairs]
                intact += [("a gradient", pair[1]) for pair in pairs]
            elif isinstance(value, Tensor) and value.numel():
                got[i], watch = guarded(value, shifts.get(i, 0))
                intact.append((WRITTEN.get(i, f"argument {i}"), watch))
        launch(kernel, tuple(got), order)
        for what, watch in intact:
            assert watch(), f"written around {what}, {name}"
        for i, what in WRITTEN.items():
            if i == 9:
                assert got[9].tolist() == want[9].tolist(), f"clipped is {got[9].tolist()}, not {want[9].tolist()}"
            elif got[i] is not None:
                assert_near(got[i], want[i], tolerance, f"{what}, {name}")
        bits = [got[i].contiguous().numpy().tobytes() for i in WRITTEN if got[i] is not None]
        first = first or bits
        assert bits == first, f"other bits, {name}"
