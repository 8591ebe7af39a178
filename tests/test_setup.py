"""The native build without a GPU: setup.py lists the architectures to build for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, runpy, sys, torch, torch.utils.cpp_extension as build
torch.version.cuda, build.CUDA_HOME = "13.0", "/nowhere"
torch.cuda.is_available = lambda: False
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py")
print("for", os.environ.get("TORCH_CUDA_ARCH_LIST"))
"""


def test_a_build_for_cuda_without_a_gpu_has_a_list_of_architectures() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    for given, wanted in ((None, "for 8.0;9.0+PTX"), ("9.0a", "for 9.0a")):
        more = {} if given is None else {"TORCH_CUDA_ARCH_LIST": given}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1],
            env=clean | more | {"LPA_KERNELS_NATIVE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert wanted in done.stdout, done.stderr[-2000:]
