"""One entry for a machine with a GPU: `python -m benchmarks.gpu` works through pieces that can be resumed."""
