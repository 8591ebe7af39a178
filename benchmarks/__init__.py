"""Benchmarks: `pytest --benchmark-only` from the root, and the scripts that write benchmarks/results."""
