"""Run the loops of obfuscated-activations and EleutherAI/unlearn, from your own clones, on AdamW and on PGDOptimizer.

    python benchmarks/compat/run_own_loops.py OBFUSCATED_ACTIVATIONS UNLEARN [--out FILE]

Their files are executed as they are, but for what cannot be imported (stubbed) and, for unlearn, what follows the
attack's own functions. `torch.optim.AdamW` is what docs/migrate.md exchanges; here that is done from outside.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.run_latent_at import gap, stacked, texts
from benchmarks.compat.stage import Stub, tiny_model
from lpa_kernels import PGDOptimizer

MISSING = ("sklearn", "sklearn.metrics", "automated_redteaming", "foreign", "foreign.encoders", "foreign.probe_evals")


def execute(file: Path, name: str, before: str = "") -> Any:
    """The module of a file, up to the line that starts with `before`."""
    for missing in (*MISSING, "foreign.utils", "utils"):
        sys.modules[missing] = Stub(missing)
    text = file.read_text()
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), "foreign"
    exec(compile(text[: text.index("\n" + before)] if before else text, str(file), "exec"), module.__dict__)
    return module


def obfuscated(module: Any, family: str) -> Any:
    """Their `train_attack` with its PGD adversary, from a random start."""
    model, batch = tiny_model(family).requires_grad_(False), stacked(texts(4, (9, 7), (3, 4), 199, 1))
    torch.manual_seed(0)
    losses, wrappers = module.train_attack(
        batch["adv_tokens"], batch["prompt_mask"], batch["adv_labels_mask"], model, None, "model.layers",
        ["embedding", 1, 3], epsilon=2.0, learning_rate=0.1, pgd_iterations=12, return_loss_over_time=True,
        device="cpu",
    )  # fmt: skip
    return [step["total"] for step in losses], wrappers


def unlearning(module: Any, family: str) -> Any:
    """Their `gradient_descent_attack`: a vector and a soft prompt at each site, no ball."""
    model, tokens = tiny_model(family).requires_grad_(False), texts(4, (9, 7), (3, 4), 199, 1)
    ids = stacked(tokens)["adv_tokens"]
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    layers = ["embedding", 1, 3]
    return module.gradient_descent_attack(batch, model, "model.layers", layers, 1e-2, 12, device="cpu", hidden_dim=64)


def compare(loop: Any, module: Any, family: str, epsilon: float) -> dict[str, Any]:
    """The loop on torch.optim.AdamW and on PGDOptimizer."""
    theirs, found = loop(module, family)
    with patch("torch.optim.AdamW", functools.partial(PGDOptimizer, epsilon=epsilon)):
        ours, also = loop(module, family)
    params = [[p.detach() for w in wrappers for p in w.hook_fn.parameters()] for wrappers in (also, found)]
    return {
        "first_and_last_loss": [theirs[0], theirs[-1]],
        "losses_abs_max": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "perturbations_rel_max": max(gap(a, b) for a, b in zip(*params, strict=True)),
        "largest_norm": max(float(p.norm(dim=-1).max()) for p in params[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("obfuscated_activations", type=Path, help="your clone of LukeBailey181/obfuscated-activations")
    parser.add_argument("unlearn", type=Path, help="your clone of EleutherAI/unlearn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["PYTHONBREAKPOINT"] = "0"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    attacks = arguments.obfuscated_activations / "train_time_experiments" / "src" / "attacks.py"
    first = execute(attacks, "foreign.attacks")
    second = execute(
        arguments.unlearn / "unlearn" / "reference" / "cas" / "unlearning.py",
        "foreign.unlearning",
        "class UnlearningTrainer",
    )
    report = {
        "command": "python benchmarks/compat/run_own_loops.py OBFUSCATED_ACTIVATIONS UNLEARN",
        "torch": torch.__version__,
        "obfuscated-activations": {f: compare(obfuscated, first, f, 2.0) for f in ("llama", "qwen3")},
        "unlearn": {f: compare(unlearning, second, f, float("inf")) for f in ("llama", "qwen3")},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
