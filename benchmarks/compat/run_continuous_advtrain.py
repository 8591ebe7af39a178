"""Compare the public attack of Continuous-AdvTrain, from your own clone, with lpa_kernels.compat.EmbeddingSpaceAttack.

    python benchmarks/compat/run_continuous_advtrain.py CLONE [--out benchmarks/results/compat_continuous_advtrain.json]

Both run on one random model and batch, with each of the three optimisers: losses, perturbations, counts of
affirmative responses; CPU seconds, alternating in one process; the peak resident set of each in a process of its own,
above what it held before. The clone is used as it is.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.run_latent_at import SPEED
from benchmarks.compat.stage import cpu_seconds, gap, peaks, publish, tiny_model
from benchmarks.measure import Run
from lpa_kernels.compat import EmbeddingSpaceAttack

OPTIMIZERS = {"sign": 1e-3, "adam": 1e-3, "rms": 1e-3}


def texts(size: int, prompt: int, target: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, target_ids, attention_mask), left padded, targets at the end."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (size, prompt + target), generator=draw)
    targets = ids.clone()
    targets[:, :prompt] = -100
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    return ids, targets, attention


def setting(large: bool) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """The model and batch: small for closeness, as in `run_latent_at.SPEED` for time and memory."""
    model = tiny_model("llama", lora=64 if large else 8, **(SPEED if large else {}))
    return model, texts(2, 130, 8, SPEED["vocab_size"]) if large else texts(4, 9, 4, 199)


def run(cls: Any, model: Any, data: tuple[Tensor, Tensor, Tensor], kind: str, iters: int) -> Any:
    """One attack with the class of either side."""
    weights = model.get_input_embeddings().weight.detach()
    config = {"type": kind, "lr": OPTIMIZERS[kind]}
    return cls(weights, response_key="", tokenizer=None, iters=iters, opt_config=config, eps=0.05).attack(model, *data)


def closeness(theirs: Any, kind: str) -> dict[str, Any]:
    """How far the two results are from one another after 10 steps."""
    model, data = setting(False)
    for name, p in model.named_parameters():  # the public attack wants it so
        p.requires_grad_("lora" in name)
    public, ours = (run(cls, model, data, kind, 10) for cls in (theirs, EmbeddingSpaceAttack))
    return {
        "losses_abs_max": max(abs(a - b) for a, b in zip(ours[3], public[3], strict=True)),
        "perturbation_rel_max": gap(ours[1], public[1]),
        "embeddings_equal": torch.equal(ours[0], public[0]),
        "masks_equal": torch.equal(ours[2], public[2]),
        "affirmative_equal": ours[4] == public[4],
        "same_dtypes": [t.dtype for t in ours[:3]] == [t.dtype for t in public[:3]],
        "first_and_last_loss": [public[3][0], public[3][-1]],
    }


def time_ratio(theirs: Any, repeats: int) -> dict[str, Any]:
    """CPU seconds of 8 steps, theirs and ours in turn."""
    model, data = setting(True)
    sides = {"public": theirs, "fused": EmbeddingSpaceAttack}
    calls: dict[str, Run] = {k: functools.partial(run, cls, model, data, "sign", 8) for k, cls in sides.items()}
    return cpu_seconds(calls, repeats)


def alone(clone: str, patched: bool) -> Run:
    """The attack of one side, for a process of its own; what is allocated once is there."""
    cls = EmbeddingSpaceAttack if patched else public(Path(clone))
    run(cls, *setting(False), "sign", 1)
    model, data = setting(True)
    return lambda: run(cls, model, data, "sign", 8)


def public(clone: Path) -> Any:
    """The class of the public code.

    Raises:
        FileNotFoundError: the clone has no such file.
    """
    if not (clone / "src" / "embedding_attack.py").is_file():
        raise FileNotFoundError(f"{clone}/src/embedding_attack.py is missing; give the path of a clone")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(clone / "src"))
    return importlib.import_module("embedding_attack").EmbeddingSpaceAttack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="your clone of the public code")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    theirs, clone = public(arguments.clone), str(arguments.clone.resolve())
    sides = {name: f"alone({clone!r}, {patched})" for name, patched in (("public", False), ("fused", True))}
    report = {
        "closeness": {kind: closeness(theirs, kind) for kind in OPTIMIZERS},
        "size": SPEED,
        "time": time_ratio(theirs, arguments.repeats),
        "memory": peaks("benchmarks.compat.run_continuous_advtrain", sides),
    }
    publish(report, [arguments.clone], arguments.out)


if __name__ == "__main__":
    main()
