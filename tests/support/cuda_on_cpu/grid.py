"""The cases of pgd_update_ for csrc/cuda/update.cu on the CPU: those of every backend, and what only a GPU minds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch

from tests.support.cuda_on_cpu import DTYPES, Kernel, check, launch
from tests.support.op_cases import LAYOUTS, Args, copied, update_case

RULES, NORMS = ("adamw", "normalised", "sign"), ("l2", "linf", "none")
# One lane, one warp, several, and a block; held in registers to 8192, in vectors where 4 divides it.
NARROW, WIDE = (1, 3, 33, 36, 512, 516, 576), (3584, 4096, 4100, 8192, 8196, 8193, 16384)

Check = Callable[[Kernel], None]


def _of(case: Args, tolerance: float = 2e-6, shifts: Mapping[int, int] | None = None) -> Check:
    return lambda kernel: check(kernel, case, tolerance, shifts)


def _sizes(width: int, dtype: torch.dtype) -> Check:
    def run(kernel: Kernel) -> None:
        for i, (rule, norm) in enumerate(product(RULES, NORMS)):
            rows = 5 if width in NARROW else 2
            options = {"maximize": i % 2 == 0, "per_row_epsilon": i % 3 == 0, "seed": i}
            check(kernel, update_case(2, rows, width, 7, 1 + i % 2, dtype, rule=rule, norm=norm, **options))

    return run


def _layouts(layout: str, dtype: torch.dtype) -> Check:
    def run(kernel: Kernel) -> None:
        for rule, width in product(("adamw", "normalised"), (33, 64)):
            check(kernel, update_case(3, 6, width, 9, dtype=dtype, rule=rule, layout=layout))

    return run


def _far_rows(kernel: Kernel) -> None:
    """Rows of a gradient that lie 2^31 elements apart; only the pages that are touched take memory."""
    apart = 2**31 + 8
    for width in (33, 36):
        case = update_case(1, 2, width, 2, 1, torch.float16, masked=0.0, bad=False)
        case[4][:] = torch.tensor([[0], [1]])
        far = torch.empty(apart + 40, dtype=torch.float16).as_strided((2, width), (apart, 1))
        far.copy_(case[3][0])
        got = copied(case)
        got[3][0] = far
        near = copied(case)
        launch(kernel, got)
        launch(kernel, near)
        assert torch.equal(got[0], near[0]), "another result where rows lie far apart"


def _nan_in_delta(kernel: Kernel) -> None:
    for norm, width in product(NORMS, (100, 4100, 8196)):
        case = update_case(1, 4, width, 4, norm=norm, masked=0.0)
        case[4][:] = 0
        case[0][0, 2, 50] = float("nan")
        launch(kernel, case)
        assert case[8].isnan().tolist() == [[False, False, True, False]], "a NaN does not show in the norm"
        assert int(case[0].isnan().sum()) == 1, "a NaN vanished or spread"


def _dead_rows(kernel: Kernel) -> None:
    for norm, width in product(NORMS, (33, 64, 8196)):
        case = update_case(2, 6, width, 9, norm=norm, masked=0.4, epsilon=0.1)
        got, dead = copied(case), (case[4] < 0).all(1)
        launch(kernel, got)
        for i in (0, 1, 2):
            assert torch.equal(got[i][:, dead], case[i][:, dead]), "a row without tokens moved"


def _unlike() -> Args:
    """Gradients of several dtypes and layouts."""
    case = update_case(9, 3, 24, 9)
    grads = case[3]
    grads[2] = grads[2].bfloat16()
    grads[5] = torch.zeros(()).expand(9, 24)
    grads[6] = grads[6].t().contiguous().t()
    grads[-1] = grads[-1].half()
    return case


def _changed(case: Args, **changes: object) -> Args:
    places = {"eps": 15, "beta2": 14, "delta": 0}
    return tuple({places[name]: value for name, value in changes.items()}.get(i, old) for i, old in enumerate(case))


def _odd_row_stride(dtype: torch.dtype) -> Args:
    case = update_case(1, 4, 36, 5, 1, dtype, masked=0.0)
    apart = torch.empty_strided((5, 36), (37, 1), dtype=dtype)
    case[3][0] = apart.copy_(case[3][0])
    return case


def _scaled(width: int, magnitude: float) -> Args:
    case = update_case(1, 3, width, 4, 1, rule="normalised", norm="none", masked=0.0, bad=False)
    case[3][0].mul_(magnitude * 1e3)
    return case


def _first_steps(beta2: float, step: int) -> Args:
    case = _changed(update_case(1, 5, 16, 9, step=step, norm="none"), beta2=beta2)
    case[0].zero_()  # so that the step itself is compared, not the sum with something larger
    return case


def _every_check() -> Iterator[tuple[str, Check]]:
    for width, dtype in product(NARROW + WIDE, DTYPES):
        yield f"width {width} {dtype}", _sizes(width, dtype)
    for layout, dtype in product(LAYOUTS, DTYPES):
        yield f"{layout} {dtype}", _layouts(layout, dtype)
    for sites, rows, tokens, shares in ((3, 0, 5, 2), (1, 1, 1, 1), (2, 1, 0, 2), (2, 61, 64, 1)):
        yield f"{rows} rows of {tokens} tokens", _of(update_case(sites, rows, 20, tokens, shares))
    yield "unlike sites", _of(_unlike())
    yield "more sites than a launch holds", _of(update_case(70, 2, 12, 5))
    yield "rows of an odd stride", lambda k: [check(k, _odd_row_stride(dtype)) for dtype in DTYPES] and None
    for place, dtype, by in ((0, 0, 1), (1, 0, 1), (2, 0, 2), (3, 0, 2), (3, 1, 2), (3, 2, 1)):
        case = update_case(2, 3, 36, 5, 2, DTYPES[dtype])
        yield f"argument {place} of {DTYPES[dtype]} {by} beyond alignment", _of(case, shifts={place: by})
    for width, magnitude in product((20, 4100, 8196), (1e-30, 1e-20, 1e25)):
        yield f"normalised, width {width}, gradients of {magnitude}", _of(_scaled(width, magnitude))
    for beta2, step in product((0.0, 0.5, 0.999, 0.9999), (1, 2, 5000)):
        yield f"step {step} with beta2 = {beta2}", _of(_first_steps(beta2, step), 1e-6)
    for width in (33, 36, 4100, 8196):
        yield f"eps = 0, width {width}", _of(_changed(update_case(1, 4, width, 9, masked=0.0, bad=False), eps=0.0))
    yield "a radius of 0", _of(update_case(1, 4, 36, 9, epsilon=0.0, masked=0.0))
    yield "rows far apart", _far_rows
    yield "NaN in delta", _nan_in_delta
    yield "rows without tokens", _dead_rows


GRID: dict[str, Check] = dict(_every_check())
SLOW = {f"width {width} {dtype}" for width, dtype in product(WIDE, DTYPES)} - {
    "width 4096 torch.bfloat16", "width 8193 torch.float32", "width 8196 torch.float16"
}  # fmt: skip
