"""Run other code bases' own loops, from your clones, as they are and on PGDOptimizer or project_.

    python benchmarks/compat/run_own_loops.py OBFUSCATED_ACTIVATIONS UNLEARN ADVERSARIALLM [--out FILE]

Their files are executed as they are, but for what cannot be imported (stubbed) and, for unlearn, what follows the
attack's own functions. What docs/migrate.md exchanges (`torch.optim.AdamW`; a projection) is exchanged from outside.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.latent_at_training import stacked, texts
from benchmarks.compat.stage import Stub, gap, publish, tiny_model
from lpa_kernels import PGDOptimizer, project_

MISSING = (
    "sklearn", "sklearn.metrics", "automated_redteaming", "utils", "foreign", "foreign.encoders", "foreign.probe_evals",
    "foreign.utils", "foreign.types", "foreign.lm_utils", "foreign.attacks", "foreign.attacks.attack",
)  # fmt: skip


def execute(file: Path, name: str, before: str = "", **known: Any) -> Any:
    """The module of a file, up to the line that starts with `before`; `known` is what its stubs do give."""
    for missing in MISSING:
        sys.modules[missing] = Stub(missing)
        vars(sys.modules[missing]).update(known)
    text = file.read_text()
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), name.rpartition(".")[0]
    sys.modules[name] = module  # dataclasses look there
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


class Attack:
    """Stands for AdversariaLLM's base class of attacks, which needs its data sets."""

    def __init__(self, config: Any) -> None:
        self.config = config


def adversariallm(module: Any, family: str, projection: Any = None) -> Any:
    """The losses of every step of their `PGDAttack.attack_batch`, and its last embeddings."""
    model, batch = tiny_model(family).requires_grad_(False), stacked(texts(3, (9,), (4, 4), 199, 1))
    ids, prompt, target = batch["adv_tokens"], batch["prompt_mask"], batch["adv_labels_mask"].roll(-1, 1)
    config = module.PGDConfig(num_steps=12, epsilon=0.3, alpha=0.05, optimizer_config={}, log_embeddings=True)
    attack = module.PGDAttack(config)
    if projection is not None:
        attack.project_l2 = lambda delta: projection(delta, config.epsilon * attack.embedding_scale)
    attack._initialize_embedding_scale(model)
    runs = attack.attack_batch(model, None, None, ids, ids.roll(-1, 1), [""] * 3, ids > 0, prompt, target)
    losses = [step.loss for run in runs for step in run.steps]
    return losses, torch.stack([run.steps[-1].model_input_embeddings for run in runs])


def compare_projection(module: Any, family: str) -> dict[str, Any]:
    """Their loop with its own projection and with project_."""
    theirs, ours = adversariallm(module, family), adversariallm(module, family, project_)
    return {
        "first_and_last_loss": [theirs[0][0], theirs[0][11]],
        "losses_abs_max": max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True)),
        "embeddings_rel_max": gap(ours[1], theirs[1]),
    }


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
    parser.add_argument("adversariallm", type=Path, help="your clone of LLM-QC/AdversariaLLM")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["PYTHONBREAKPOINT"] = "0"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    attacks = arguments.obfuscated_activations / "train_time_experiments" / "src" / "attacks.py"
    unlearn = arguments.unlearn / "unlearn" / "reference" / "cas" / "unlearning.py"
    first = execute(attacks, "foreign.attacks")
    second = execute(unlearn, "foreign.unlearning", "class UnlearningTrainer")
    results = dict.fromkeys(("AttackStepResult", "SingleAttackRunResult"), SimpleNamespace)
    third = execute(
        arguments.adversariallm / "src" / "attacks" / "pgd.py", "foreign.attacks.pgd",
        Attack=Attack, generate_ragged_batched=lambda *_, embedding_list, **__: [""] * len(embedding_list), **results,
    )  # fmt: skip
    families = ("llama", "qwen3")
    report = {
        "obfuscated-activations": {f: compare(obfuscated, first, f, 2.0) for f in families},
        "unlearn": {f: compare(unlearning, second, f, float("inf")) for f in families},
        "AdversariaLLM": {f: compare_projection(third, f) for f in families},
    }
    publish(report, [arguments.obfuscated_activations, arguments.unlearn, arguments.adversariallm], arguments.out)


if __name__ == "__main__":
    main()
