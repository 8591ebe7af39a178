"""Which implementation of an op runs: the table of backends and the rule that picks one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("reference", "triton", "native")
ENVIRONMENT_VARIABLE = "LPA_KERNELS_BACKEND"


@dataclass(frozen=True)
class Impl:
    """One op on one backend.

    Attributes:
        fn: takes the arguments of the op's schema, by position.
        unsupported: takes the same arguments; returns in a few words why `fn` cannot take this call, or None.
        built_for: takes a type of device; whether the build has `fn` for it.
    """

    fn: Callable[..., Any]
    unsupported: Callable[..., str | None]
    built_for: Callable[[str], bool]


_table: dict[tuple[str, str], Impl] = {}
_missing: dict[str, str] = {}  # backend -> why it could not be loaded
_logged: set[tuple[str, str, str]] = set()
_noted: ContextVar[dict[str, str] | None] = ContextVar("noted", default=None)
logger = logging.getLogger(__name__)


def register(
    op: str,
    backend: str,
    fn: Callable[..., Any],
    unsupported: Callable[..., str | None],
    built_for: Callable[[str], bool] = lambda device_type: True,
) -> None:
    """Add to the table an `Impl` of these parts as `backend`'s implementation of `op`."""
    _table[op, backend] = Impl(fn, unsupported, built_for)


def table() -> frozenset[tuple[str, str]]:
    """Every (op, backend) pair that is implemented."""
    return frozenset(_table)


def register_missing(backend: str, reason: str) -> None:
    """Keep why a whole backend is absent, for errors and for `backends()`."""
    _missing[backend] = reason


def _log_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        logger.info("%s does not run on the %s backend: %s", op, backend, reason)


@contextmanager
def noted() -> Iterator[dict[str, str]]:
    """Yields what runs each op that is called within it: by op, the backend, and why not one that comes before it.

    >>> from lpa_kernels.ops import swiglu
    >>> with noted() as kernels:
    ...     _ = swiglu(torch.zeros(1, 2), torch.zeros(1, 2), backend="reference")
    >>> kernels
    {'swiglu': 'reference'}
    """
    kernels: dict[str, str] = {}
    token = _noted.set(kernels)
    try:
        yield kernels
    finally:
        _noted.reset(token)


def note(what: str, how: str) -> None:
    """Have an enclosing `noted` tell how something else than an op is run."""
    if (kernels := _noted.get()) is not None:
        kernels[what] = how


def _found(op: str, backend: str, refusals: list[str]) -> Callable[..., Any]:
    note(op, f"{backend} ({'; '.join(refusals)})" if refusals else backend)
    return _table[op, backend].fn


def _refusal(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    impl = _table.get((op, backend))
    if impl is None:
        return _missing.get(backend, f"it has no {op}")
    return impl.unsupported(*args)


def requested(backend: str) -> str:
    """The backend asked for: `backend`, or `LPA_KERNELS_BACKEND` of the environment where `backend` is "auto".

    Raises:
        ValueError: the name is none of auto, reference, triton, native.
    """
    name = backend if backend != "auto" else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name != "auto" and name not in BACKENDS:
        where = "backend" if backend != "auto" else ENVIRONMENT_VARIABLE
        raise ValueError(f"{where}={name!r} is unknown; use one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


def preferred(device_type: str) -> tuple[str, ...]:
    """The order in which "auto" tries the backends on a device."""
    return ("triton", "reference") if device_type == "cuda" else ("native", "reference")


def _lacks(backend: str, op: str, device_type: str) -> bool:
    """Whether `backend` has kernels for this type of device, but none of `op`."""
    own = {name for (name, b), impl in _table.items() if b == backend and impl.built_for(device_type)}
    return bool(own) and op not in own


def select(op: str, backend: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs `op` on `args`, of which the first is a tensor.

    A named backend that has kernels for the device but none of this op leaves it to those that "auto" takes; the log
    says so once. (The native build has the update alone for CUDA.)

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the named backend cannot take this call; the message says why.
    """
    name = requested(backend)
    device: torch.device = args[0].device
    refusals: list[str] = []
    if name != "auto":
        reason = _refusal(op, name, args)
        if reason is None:
            return _found(op, name, refusals)
        if not _lacks(name, op, device.type):
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}; use backend='auto' or 'reference'")
        _log_once(op, name, reason)
    for candidate in preferred(device.type):
        reason = _refusal(op, candidate, args)
        if reason is None:
            return _found(op, candidate, refusals)
        refusals.append(f"not {candidate}: {reason}")
        if candidate not in _missing:
            _log_once(op, candidate, reason)
    raise RuntimeError(f"no backend can run {op} on {device}")


def backends() -> str:
    """A table of ops and backends as text, with the reason for each backend that is absent."""
    rows: list[tuple[str, ...]] = [("op", *BACKENDS)]
    for op in dict.fromkeys(op for op, _ in _table):
        rows.append((op, *("yes" if (op, b) in _table else "no" for b in BACKENDS)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"{name}: {why}" for name, why in _missing.items()]
    lines.append("auto: " + "; ".join(f"{d} takes {' then '.join(preferred(d))}" for d in ("cuda", "cpu")))
    return "\n".join(line.rstrip() for line in lines)
