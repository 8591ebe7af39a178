"""The stack as a GPU runs it, on the device of the tests: joined weights, queries and keys rotated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lpa_kernels.model.joined import APART


@contextmanager
def joining(on: bool = True) -> Iterator[None]:
    """Within it, maps of one input are one product, whatever the device; with `on` False, on none."""
    held = set(APART)
    APART.clear()
    APART.update(() if on else ("cpu", "cuda"))
    try:
        yield
    finally:
        APART.clear()
        APART.update(held)
