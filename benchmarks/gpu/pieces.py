"""The pieces, in the order in which they matter when time is short."""

from __future__ import annotations

from .runner import Piece

_IN = "benchmarks.gpu"
PIECES = [
    Piece("ceilings", f"{_IN}.machine:ceilings", 2, "versions, clocks, the rate of a copy and of a bf16 product"),
    Piece("ops", f"{_IN}.ops:ops", 6, "each op beside torch's ways and Liger's: microseconds, GB/s, launches"),
    *(
        Piece(f"inner-{case}", f"{_IN}.inner:inner", 8, "the inner loop by every way", case)
        for case in ("llama-16", "llama-2", "llama-8", "qwen3-16", "qwen3-2", "qwen3-8")
    ),
]
NAMES = [piece.name for piece in PIECES]
