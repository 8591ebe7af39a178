"""Loads every backend; each registers what it has, or why it is absent."""

from . import reference  # noqa: F401
