"""Loads every backend; each registers what it has, or why it is absent."""

from . import native, reference, triton  # noqa: F401
