"""The backends and devices of this process, for tests that run on all of them."""

from __future__ import annotations

import pytest
import torch

from lpa_kernels.ops import native

PLACES = [("reference", "cpu"), ("native", "cpu"), ("triton", "cpu")]
if torch.cuda.is_available():
    PLACES = [*PLACES[:2], ("reference", "cuda"), ("native", "cuda"), ("triton", "cuda")]
everywhere = pytest.mark.parametrize("place", PLACES, ids="-".join)


def need(op: str, place: tuple[str, str]) -> tuple[str, str]:
    """`place`, or a skip where this process has no such kernel."""
    backend, device = place
    if backend == "native" and (not native.BUILT or not native.built_for(op, device)):
        pytest.skip(f"the native {op} is not built for {device} (see setup.py)")
    if backend == "triton":
        launch = pytest.importorskip("lpa_kernels.ops.triton.launch")
        if device == "cpu" and not launch.INTERPRETED:
            pytest.skip("no GPU; runs under the interpreter")
    return place
