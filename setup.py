"""Builds csrc on request; a plain install is pure Python and needs no compiler.

LPA_KERNELS_NATIVE=1 pip install --no-build-isolation .     the CPU kernels, and CUDA where torch and nvcc have it
LPA_KERNELS_NATIVE=cpu pip install --no-build-isolation .   the CPU kernels alone
"""

import os
from typing import Any

from setuptools import setup

VARIABLE = "LPA_KERNELS_NATIVE"
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"  # of a build without a GPU: A100, H100, and what comes after them
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the build runs on this and every later version


def native(wanted: str) -> dict[str, Any]:
    """Arguments of `setup` that build the extension."""
    if wanted not in ("1", "cpu"):
        raise SystemExit(f"{VARIABLE}={wanted!r} is unknown; use 1 (with CUDA where there is any), cpu, or 0")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"{VARIABLE}={wanted} builds against torch, which cannot be imported here ({error}). Install torch first "
            "and give pip --no-build-isolation."
        ) from error
    cuda = wanted == "1" and torch.version.cuda is not None and CUDA_HOME is not None
    sources = ["csrc/ops.cpp", "csrc/ops_block.cpp", "csrc/cpu/dispatch.cpp"]
    sources += [f"csrc/cpu/{name}.cpp" for name in ("baseline", "avx2", "avx512")]
    macros = [("TORCH_TARGET_VERSION", OLDEST_TORCH)]
    flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]}
    if cuda:
        if not torch.cuda.is_available():  # torch asks the GPUs at hand which they are, and here is none
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        sources += ["csrc/ops_cuda.cpp", "csrc/cuda/update.cu"]
        macros.append(("USE_CUDA", "1"))
        flags["nvcc"] = ["-O3"]
    print(f"lpa-kernels: building the native kernels {'with' if cuda else 'without'} CUDA")
    extension = (CUDAExtension if cuda else CppExtension)(
        "lpa_kernels.ops._native",
        sources,
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,  # it holds no Python at all: torch.ops.load_library opens it
    )

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"The native kernels did not build ({error}); the compiler's own words are above. Without "
                    f"{VARIABLE} the install is pure Python and needs no compiler; {VARIABLE}=cpu leaves CUDA out."
                ) from error

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


request = os.environ.get(VARIABLE, "0")
setup(**(native(request) if request not in ("", "0") else {}))
