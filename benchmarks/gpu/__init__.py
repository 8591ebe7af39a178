"""What a GPU is to tell: run piece by piece with `python -m benchmarks.gpu`, into one record."""
