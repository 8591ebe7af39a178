"""The tests pieces: folders and files of tests with the GPU, a case a file."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import Any

from .build import ROOT, command
from .worker import Cases, Setting

LIMIT = 400  # seconds a file
QUICK = {
    "tests/lpa_kernels/ops": "test_reference.py",
    "tests/lpa_kernels/attack": "test_packing.py",
    "tests/lpa_kernels/compat": "test_own_loops.py",
    "tests/lpa": "training/test_losses.py",
}  # of a dry run


def tests(path: str) -> dict[str, Any]:
    """How many of a file's tests passed; a failure is an error that names some."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    spread = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    done = command([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--tb=short", "-v", "--no-header",
                    *spread, path], LIMIT)  # fmt: skip
    text = done.stdout
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", text[-2000:])}
    if done.returncode not in (0, 5):  # 5: no test is there
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
        raise RuntimeError(f"{counts}; {', '.join(names[:12])}")
    return counts


def suite(setting: Setting) -> Cases:
    """The piece; argument: folders and files."""
    for given in setting.argument.split():
        path = ROOT / given
        files = [path / QUICK.get(given, "")] if setting.dry or path.is_file() else sorted(path.glob("test_*.py"))
        for file in files:
            name = str(file.relative_to(ROOT))
            yield name, lambda name=name: tests(name)
