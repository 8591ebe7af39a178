"""Matrix products of tiles in Triton, float32 in full precision, with one answer on a GPU and under the interpreter."""

# The parameters of a kernel have no Python types.
# mypy: allow-untyped-defs
import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b):
    """a [M, K] @ b [K, N] in float32."""
    if _INTERPRETED:  # its product takes the bits of a bfloat16 for an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
