"""Compiles every Triton launch of an 8B model's attack ahead of time, with no GPU, and prints what it costs.

    python -m tests.support.compile_triton            # a table; fails where a kernel spills registers, or needs others
                                                      # than the table in compile_triton.txt says, of the same Triton
    python -m tests.support.compile_triton --record   # writes that table
    python -m tests.support.compile_triton --asm DIR  # keeps PTX, SASS and AMD assembly too
    python -m tests.support.compile_triton --corners  # odd shapes, strides and dtypes instead: that they compile at all

The launches are recorded from the ops themselves, called on tensors without memory: the compiled kernels are those
that run. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpa_kernels.ops.triton import attention, gate, launch, norm
from lpa_kernels.ops.triton.perturb import perturb
from lpa_kernels.ops.triton.token_loss import token_loss_
from lpa_kernels.ops.triton.update import pgd_update_
from tests.support.block_cases import attention_case, gate_case, norm_backward_case, norm_case
from tests.support.op_cases import loss_case, perturb_case, update_case

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
ON_REQUEST = ("gfx1100", "gfx1201")  # RDNA, warps of 32: the kernels run there, but attention spills
MULTIPROCESSORS = 132
RECORD = Path(__file__).with_suffix(".txt")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one kernel needs on one target. `loads` and `stores` count a thread's accesses of global memory by their
    bytes: "12x16 2x4" are twelve of 16 bytes and two of 4."""

    kernel: str
    target: str
    threads: int
    registers: int
    spills: int  # bytes of local memory a thread on CUDA, spilled vector registers on ROCm
    shared: int
    loads: str
    stores: str

    def __str__(self) -> str:
        return (
            f"{self.kernel:54} {self.target:7} {self.threads:7} {self.registers:5} {self.spills:6} {self.shared:6}  "
            f"{self.loads:20} {self.stores}".rstrip()
        )


def by_width(widths: Iterable[int]) -> str:
    """How many there are of each width, widest first."""
    return " ".join(f"{count}x{width}" for width, count in sorted(Counter(widths).items(), reverse=True))


def recorded(call: Callable[[], object], warp: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, positional arguments, keywords) of every launch that `call` would make; nothing is launched."""
    launches = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append((self, args, keywords))

    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(launch, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(launch, "warps", lambda threads: max(1, threads // warp)),
    ):
        call()
    return launches


def source(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel specialised on these arguments as a launch specialises it, and its options."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def one(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(one(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
    for i, name in enumerate(kernel.arg_names):
        if i < len(args):
            signature[name] = one(args[i], (i,))
        else:
            signature[name] = "constexpr"
            constants[(i,)] = keywords[name]
    return ASTSource(kernel, signature, constants, attributes), options


def shared(call: Callable[[], object], target: str) -> int:
    """Bytes of shared memory a program of the launches that `call` would make, the most of them."""
    found = []
    for kernel, args, keywords in recorded(call, TARGETS[target].warp_size):
        specialised, options = source(kernel, args, keywords)
        found.append(triton.compile(specialised, target=TARGETS[target], options=options).metadata.shared)
    return max(found)


def calls(width: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    """The ops of an attack on a model of this shape in bf16, on tensors without memory."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sites, rows, tokens = 5, 2304, 4608
    delta, norms, scalar = new(sites, rows, width), new(sites, rows), new()
    grads = [new(tokens, width, dtype=torch.bfloat16) for _ in range(sites)]
    index, clipped = new(rows, 2, dtype=torch.int64), new(sites, dtype=torch.int32)

    def update(rule: str, norm: str) -> Callable[[], object]:
        moments = (delta, delta) if rule == "adamw" else (None, None)
        tail = (scalar, scalar, scalar, norms, clipped, rule, norm, False, 0.9, 0.999, 1e-8, 0.01)
        return lambda: pgd_update_(delta, *moments, grads, index, *tail)

    def loss(rows: int, weighted: bool) -> Callable[[], object]:
        logits = new(rows, vocabulary, dtype=torch.bfloat16)
        labels, away = new(rows, dtype=torch.int64), new(rows, dtype=torch.bool)
        return lambda: token_loss_(logits, labels, away, new(rows) if weighted else None, -5.0)

    def half(*shape: int) -> Tensor:
        return new(*shape, dtype=torch.bfloat16)

    def attend(backward: bool = False, dim: int = 128, softcap: float = 0.0, window: int = 0) -> object:
        """Attention in the shape of Llama-3's, a quarter as many key heads as heads, on views of one product."""
        places, starts = new(tokens, 2, dtype=torch.int32), new(tokens // 144 + 1, dtype=torch.int32)
        tables, heads = (new(256, dim // 2), new(256, dim // 2)), width // dim
        layout = (*tables, places, places, starts, starts, 144, 144, 0.125, softcap, window)
        q, k, v = half(tokens, width * 3 // 2).unflatten(1, (-1, dim)).split([heads, heads // 4, heads // 4], 1)
        if not backward:
            return attention.attention(q, k, v, *layout)
        out = half(tokens, heads, dim)
        return attention.attention_backward_(out, q, k, v, out, new(heads, tokens), q, k, v, *layout)

    where, x, weight = new(tokens, dtype=torch.int64), half(tokens, width), new(width)
    inner = 7 * width // 2  # of the feed-forward, as in Llama-3
    products = half(tokens, 2 * inner).split(inner, 1)
    lora = half(tokens, 64), half(width, 64)
    return {
        "perturb": lambda: perturb(grads[0], new(rows, width), where),
        "update adamw l2": update("adamw", "l2"),
        "update normalised l2": update("normalised", "l2"),
        "update sign linf": update("sign", "linf"),
        "loss of many rows": loss(256, True),
        "loss of many rows, no gradient": loss(256, False),
        "loss of few rows": loss(28, True),
        "norm": lambda: norm.add_norm(x, x, None, None, None, None, weight, 1.0, 1e-5),
        "norm of a site": lambda: norm.add_norm(x, x, None, None, new(rows, width), where, weight, 1.0, 1e-5),
        "norm of a site with LoRA": lambda: norm.add_norm(x, x, *lora, new(rows, width), where, weight, 1.0, 1e-5),
        "norm backward": lambda: norm.add_norm_backward(x, x, new(tokens), weight, x),
        "norm of heads": lambda: norm.add_norm(half(tokens, 128), None, None, None, None, None, new(128), 1.0, 1e-5),
        "SwiGLU": lambda: gate.swiglu(*products, "silu"),
        "SwiGLU backward": lambda: gate.swiglu_backward_(*products, half(tokens, inner), "silu"),
        "attention": attend,
        "attention backward": lambda: attend(True),
        "attention of heads of 64": lambda: attend(False, 64),
        "attention of heads of 64 backward": lambda: attend(True, 64),
        "attention of Gemma-2": lambda: attend(False, 256, 50.0, 4096),
        "attention of Gemma-2 backward": lambda: attend(True, 256, 50.0, 4096),
        "GELU backward": lambda: gate.swiglu_backward_(*products, half(tokens, inner), "gelu_tanh"),
    }


def cuda_cost(name: str, target: str, binary: Any, folder: Path) -> Cost:
    """Registers and local memory from the cubin's own table, access widths from its machine code."""
    from triton import knobs

    path = folder / f"{name}.{target}.cubin".replace(" ", "_")
    path.write_bytes(binary.asm["cubin"])
    tool = str(knobs.nvidia.cuobjdump.path)

    def dump(what: str) -> str:
        return subprocess.run([tool, what, str(path)], capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED", "LOCAL")}  # type: ignore[index]
    sass = dump("-sass")
    path.with_suffix(".sass").write_text(sass)
    path.with_suffix(".ptx").write_text(binary.asm["ptx"])
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spills = found["STACK"] + found["LOCAL"] + 4 * local
    bytes_of = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}

    def widths(names: str) -> str:
        kinds = re.findall(rf"\b(?:{names})((?:\.\w+)*)", sass)
        return by_width(
            next((n for kind, n in bytes_of.items() if re.search(rf"{kind}\b", kinds_of)), 4) for kinds_of in kinds
        )

    threads, shared = binary.metadata.num_warps * 32, binary.metadata.shared
    return Cost(name, target, threads, found["REG"], spills, shared, widths("LDG|LDGSTS"), widths("STG"))


def hip_cost(name: str, target: str, binary: Any, folder: Path) -> Cost:
    """The same from the AMD assembly, whose metadata count registers and spills."""
    text = binary.asm["amdgcn"]
    (folder / f"{name}.{target}.s".replace(" ", "_")).write_text(text)

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        assert match, f"no {key} in the assembly"
        return int(match[1])

    bytes_of = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}
    bytes_of |= {"b128": 16, "b96": 12, "b64": 8, "b32": 4, "b16": 2, "d16": 2, "u16": 2, "i16": 2}  # as RDNA says it

    def widths(what: str) -> str:
        kinds = re.findall(rf"\b(?:global|buffer)_{what}_([a-z]+\d*)", text)
        return by_width(bytes_of.get(kind, 1) for kind in kinds)

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    threads, shared = binary.metadata.num_warps * TARGETS[target].warp_size, binary.metadata.shared
    return Cost(name, target, threads, number("vgpr_count"), spills, shared, widths("load"), widths("store"))


def costs(width: int, vocabulary: int, folder: Path, targets: list[str]) -> list[Cost]:
    """Every kernel of `calls`, compiled for every target."""
    out = []
    for name, call in calls(width, vocabulary).items():
        for target in targets:
            for kernel, args, keywords in recorded(call, TARGETS[target].warp_size):
                specialised, options = source(kernel, args, keywords)
                binary = triton.compile(specialised, target=TARGETS[target], options=options)
                cost = cuda_cost if TARGETS[target].backend == "cuda" else hip_cost
                out.append(cost(f"{name}: {kernel.__name__}", target, binary, folder))
    return out


def corners() -> int:
    """Compile odd cases: ones become constants, large strides need 64 bits, other layouts other loads.

    Returns:
        How many kernels were compiled.
    """

    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    half, wide = torch.float16, 4100
    unlike = list(update_case(3, 5, 24, 9))
    unlike[3] = [unlike[3][0], torch.zeros(()).expand(9, 24), torch.empty_strided((9, 24), (2**31, 1), device="meta")]
    ops: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
        (perturb, perturb_case(1, 1, 1)),
        (perturb, perturb_case(5, 3, 33, half, layout="rows")),
        *((pgd_update_, update_case(1, 1, width, 1, 1, layout="columns")) for width in (1, 33, wide)),
        (pgd_update_, update_case(1, 1, 24, 1, 1, half)),
        (pgd_update_, update_case(2, 3, wide, 4, rule="normalised", norm="linf", maximize=True)),
        (pgd_update_, update_case(2, 3, 24, 4, rule="sign", norm="none", per_row_epsilon=True, layout="expanded")),
        (pgd_update_, tuple(unlike)),
        (token_loss_, loss_case(1, 2)),
        (token_loss_, loss_case(1, 40000, half, gap=3, weighted=False)),
        (token_loss_, loss_case(200, 33, gap=3)),
        (norm.add_norm, norm_case(1, 1, scale=0.5)),
        (norm.add_norm, norm_case(17, 300, half, rank=1, layout="rows")),
        (norm.add_norm, norm_case(3, 9000, residual=False)),
        (norm.add_norm_backward, norm_backward_case(3, 9000, half)),
        (norm.add_norm_backward, norm_backward_case(1, 1, residual=False)),
        (attention.attention, attention_case(half, width=20, few=True, softcap=2.0, window=3)),
        (attention.attention_backward_, attention_case(heads=1, kv_heads=1, width=2, rotated=0, backward=True)),
        (gate.swiglu, gate_case(1, 1)),
        (gate.swiglu_backward_, gate_case(3, 33, half, backward=True, layout="rows")),
    ]
    count = 0
    for op, args in ops:
        for kernel, positional, keywords in recorded(partial(op, *map(meta, args)), 32):
            specialised, options = source(kernel, positional, keywords)
            triton.compile(specialised, target=TARGETS["sm_90"], options=options)
            count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--targets", nargs="+", choices=TARGETS,
                        default=[name for name in TARGETS if name not in ON_REQUEST])  # fmt: skip
    parser.add_argument("--asm", type=Path, help="keep the assembly in this folder")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--corners", action="store_true", help="compile odd shapes, strides and dtypes for sm_90")
    options = parser.parse_args(argv)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled; unset it")
    if options.corners:
        print(f"{corners()} kernels compiled")
        return 0
    title = f"width {options.width}, vocabulary {options.vocabulary}, bf16, triton {triton.__version__}"
    columns = f"{'kernel':54} {'target':7} {'threads':>7} {'regs':>5} {'spills':>6} {'shared':>6}  {'loads':20} stores"
    print(title, columns, sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.asm or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = costs(options.width, options.vocabulary, folder, options.targets)
    lines = [str(cost) for cost in found]
    print(*lines, sep="\n")
    if options.record:
        RECORD.write_text("\n".join([title, columns, *lines]) + "\n")
    recorded_title, _, *expected = RECORD.read_text().splitlines()
    changed = []
    if recorded_title == title:
        own = [line for line in expected if line.split(": ")[1].split()[1] in options.targets]
        now = [str(cost) for cost in found if cost.target not in ON_REQUEST]
        changed = [line for line in difflib.ndiff(own, now) if line[0] in "+-"]
        print(*(["not as in", RECORD.name, *changed] if changed else []), sep="\n")
    else:
        print(f"{RECORD.name} has no table for {title}; only spills are checked")
    spilling = [f"{c.kernel} on {c.target}" for c in found if c.spills]
    if spilling:
        print("registers spill to memory:", "; ".join(spilling))
    return bool(spilling or changed)


if __name__ == "__main__":
    sys.exit(main())
