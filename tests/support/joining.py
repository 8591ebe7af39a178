"""The stack as a GPU runs it, on the device of the tests: joined weights, queries and keys rotated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lpa_kernels.model.joined import JOINED_ON
from lpa_kernels.model.stack import ROTATED_INSIDE


@contextmanager
def joining(on: bool = True) -> Iterator[None]:
    """Within it, maps of one input are one product, whatever the device; with `on` False, on none."""
    wanted = {id(JOINED_ON): on, id(ROTATED_INSIDE): not on}
    held = [(devices, set(devices)) for devices in (JOINED_ON, ROTATED_INSIDE)]
    for devices, _ in held:
        devices.clear()
        devices.update(("cpu", "cuda") if wanted[id(devices)] else ())
    try:
        yield
    finally:
        for devices, before in held:
            devices.clear()
            devices.update(before)
