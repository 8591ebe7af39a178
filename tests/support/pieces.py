"""Pieces for the tests of the GPU entry's runner: they count how often they run, break, crash and hang."""

import os
import signal
import time
from typing import Any

from benchmarks.gpu.worker import Cases, Setting, Skip


def _count(setting: Setting, name: str) -> dict[str, Any]:
    with (setting.out / "calls.txt").open("a") as stream:
        stream.write(name + "\n")
    return {"name": name}


def plain(setting: Setting) -> Cases:
    for name in ("a", "b"):
        yield name, lambda name=name: _count(setting, name)


def broken(setting: Setting) -> Cases:
    """The second case works only where a file says so; the third always does."""
    yield "first", lambda: _count(setting, "first")

    def second() -> dict[str, Any]:
        if not (setting.out / "mended").exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return _count(setting, "second")

    yield "second", second
    yield "third", lambda: _count(setting, "third")


def crash(setting: Setting) -> Cases:
    yield "before", lambda: _count(setting, "before")
    yield "crash", lambda: os.kill(os.getpid(), signal.SIGSEGV)
    yield "after", lambda: _count(setting, "after")


def hang(setting: Setting) -> Cases:
    yield "before", lambda: _count(setting, "before")

    def sleep() -> dict[str, Any]:
        print("now it sleeps", flush=True)
        (setting.out / "asleep").touch()
        time.sleep(600)
        return {}

    yield "hang", sleep
    yield "after", lambda: _count(setting, "after")


def nothing(setting: Setting) -> Cases:
    raise Skip(f"there is no such tool on {setting.device}")
    yield


def no_setup(setting: Setting) -> Cases:
    raise MemoryError("the model does not fit")
    yield
