"""The pieces, in the order in which they matter when time is short."""

from __future__ import annotations

from .runner import Piece

_IN = "benchmarks.gpu"
_INNER = "the inner loop: the public one, each engine, merged, captured, compiled"
_PROFILE = "where a packed inner step's time goes, by kernel"
_VARIANTS = "compiled blocks, fused norms, attention: each against the packed engine"
PIECES = [
    Piece("ceilings", f"{_IN}.machine:ceilings", 2, "versions, clocks, the rate of a copy and of a bf16 product"),
    Piece(
        "build",
        f"{_IN}.build:build",
        5,
        "csrc for this GPU: registers, spills, and whether its ops are there",
        leaves="lpa_kernels/ops/_native.so",
    ),
    Piece("tests-ops", f"{_IN}.suite:suite", 8, "tests/ops on the GPU", "tests/lpa_kernels/ops"),
    Piece(
        "tests-attack",
        f"{_IN}.suite:suite",
        8,
        "tests/attack on the GPU, and the trainer's captured steps",
        "tests/lpa_kernels/attack tests/lpa/training/test_device.py",
    ),
    Piece("inner-llama-16", f"{_IN}.inner:inner", 8, _INNER, "llama-16"),
    Piece("inner-llama-2", f"{_IN}.inner:inner", 8, _INNER, "llama-2"),
    Piece("ops", f"{_IN}.ops:ops", 8, "each op beside torch's ways and Liger's: microseconds, GB/s, launches"),
    Piece("run", f"{_IN}.steps:run", 8, "30 LPA steps of 16 pairs through LPATrainer"),
    Piece("memory", f"{_IN}.steps:memory", 4, "peak memory of LPA steps at micro-batches of 2 to 16"),
    Piece("profile-llama-16", f"{_IN}.profiles:profiles", 3, _PROFILE, "llama-16"),
    Piece("profile-llama-2", f"{_IN}.profiles:profiles", 3, _PROFILE, "llama-2"),
    Piece("variants-llama-16", f"{_IN}.variants:variants", 8, _VARIANTS, "llama-16"),
    Piece("variants-llama-2", f"{_IN}.variants:variants", 8, _VARIANTS, "llama-2"),
    Piece("sanitizer", f"{_IN}.build:sanitizer", 8, "compute-sanitizer over every op at small shapes"),
    Piece("inner-qwen3-16", f"{_IN}.inner:inner", 8, _INNER, "qwen3-16"),
    Piece("inner-qwen3-2", f"{_IN}.inner:inner", 8, _INNER, "qwen3-2"),
    Piece("inner-llama-8", f"{_IN}.inner:inner", 6, _INNER, "llama-8"),
    Piece("inner-qwen3-8", f"{_IN}.inner:inner", 6, _INNER, "qwen3-8"),
    Piece("tests-compat", f"{_IN}.suite:suite", 5, "tests/compat on the GPU", "tests/lpa_kernels/compat"),
    Piece("tests-lpa", f"{_IN}.suite:suite", 8, "tests/lpa on the GPU", "tests/lpa"),
    Piece("real", f"{_IN}.real:real", 8, "the embedded model at the paper's settings: rates, radii, seeds, evaluated"),
]
NAMES = [piece.name for piece in PIECES]
