"""Every op on every backend of this device once at small, odd shapes: the program that compute-sanitizer watches."""

from __future__ import annotations

import torch

from benchmarks.op_cases import device
from lpa_kernels.ops import native, registry
from tests.support.op_cases import implementation, loss_case, perturb_case, update_case


def main() -> None:
    where, calls = device(), 0
    fast = ("triton", "native") if where == "cuda" else ("native",)
    for dtype in (torch.float32, torch.bfloat16):
        cases = [
            ("perturb", perturb_case(17, 5, 33, dtype, device=where)),
            ("perturb", perturb_case(40, 20, 576, dtype, layout="rows", device=where)),
            *(
                ("pgd_update_", update_case(3, 7, width, 11, shares, dtype, rule=rule, norm=norm, device=where))
                for width, shares, rule, norm in (
                    (33, 1, "adamw", "l2"), (576, 2, "adamw", "l2"), (64, 2, "normalised", "linf"),
                    (4100, 2, "sign", "none"), (8192, 1, "adamw", "linf"), (20000, 2, "adamw", "l2"),
                )
            ),
            ("token_loss_", loss_case(5, 97, dtype, device=where)),
            ("token_loss_", loss_case(3, 40000, dtype, device=where)),
            ("token_loss_", loss_case(200, 515, dtype, device=where)),
        ]  # fmt: skip
        for op, case in cases:
            for backend in fast:
                there = (op, backend) in registry.table()
                if there and not (backend == "native" and not native.built_for(op, where)):
                    implementation(op, backend, case)(*case)
                    calls += 1
    if where == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
