"""The table of `lpa plan` for models of 1, 8 and 70 billion weights, whose configurations are written out here.

    python -m benchmarks.plan_shapes --out benchmarks/results/plan-shapes.json

The last rows are one LPA step of the 8B model beside the published code's, by the same closed forms. Estimates all: no
GPU was measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.measure import command, table
from lpa import LPAConfig
from lpa.commands.plan import gigabytes
from lpa.files import write_json, write_text
from lpa.memory import FOUR_BIT, PARTS, Pass, PlanShape, Run, estimate, on_meta

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}
MODELS = {
    "1B": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                   "tie_word_embeddings": True},
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
}  # fmt: skip
SINGLE = {"gradient_checkpointing": True, "per_device_train_batch_size": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "default (4 x 4 pairs)": {},
    "checkpointed": {"gradient_checkpointing": True},
    "4-bit, checkpointed": {"gradient_checkpointing": True, "quantized": FOUR_BIT},
    "4-bit, checkpointed, 16 x 1 pairs": SINGLE | {"quantized": FOUR_BIT, "gradient_accumulation_steps": 16},
    "checkpointed, each of 8 ranks by FSDP2, 2 x 1 pairs": SINGLE
    | {"fsdp": True, "ranks": 8, "gradient_accumulation_steps": 2},
}


class Published(Run):
    """A run as aengusl/latent-adversarial-training makes it: one completion's texts after the other, the head on every
    token. Only the last micro-batch keeps its perturbations, as `offload_attacks` plans."""

    def _pairs(self, shape: PlanShape) -> Pass:
        pairs, text = self.args.per_device_train_batch_size, shape.prompt + shape.completion
        return Pass(pairs, text, pairs * shape.completion, 2 * pairs * text)  # of `headed` a half are there at once


def beside(prompt: int, micro: int) -> dict[str, dict[str, Any]]:
    """An LPA step of 16 pairs on the 8B model: ours, and the published code's."""
    batch = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 16 // micro, "report_to": []}
    own, theirs = (LPAConfig(tempfile.gettempdir(), **batch, **more) for more in (
        {}, {"attack_engine": "reference", "offload_attacks": True}))  # fmt: skip
    shape = PlanShape(prompt=prompt)
    config = LlamaConfig(**MODELS["8B"])
    found = estimate(config, own, shape, dtype=torch.bfloat16, attn_implementation="sdpa")
    run = Published(on_meta(config, theirs, torch.bfloat16, "sdpa", False), theirs, shape, None, 1)
    peak = max([*run.attack_moments(), *run.defence_moments()], key=Counter.total)
    flops = run.attack_flops() * theirs.inner_steps + run.defence_flops() * theirs.defence_steps
    flops *= 2 * theirs.lpa_steps * run.micro  # a pass for each completion
    name = f"8B, prompt {prompt}, {16 // micro} x {micro} pairs"
    return {
        f"{name}: here": {"bytes": found.peak.total(), "parts": dict(found.peak),
                          "flops": found.attack_flops + found.defence_flops},
        f"{name}: published": {"bytes": peak.total(), "parts": dict(peak), "flops": flops},
    }  # fmt: skip


def planned(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `lpa plan` says of a model under settings of `LPAConfig`, "quantized" and "ranks"."""
    own = {name: value for name, value in settings.items() if name not in ("quantized", "ranks")}
    found = estimate(
        LlamaConfig(**MODELS[model]), LPAConfig(tempfile.gettempdir(), report_to=[], **own), PlanShape(),
        dtype=torch.bfloat16, attn_implementation="sdpa", quantized=settings.get("quantized"),
        ranks=settings.get("ranks", 1),
    )  # fmt: skip
    return {"settings": settings, "weights": found.total, "trained": found.trained, "phase": found.peak_phase,
            "bytes": found.peak.total(), "parts": dict(found.peak),
            "flops": found.attack_flops + found.defence_flops}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    runs = {f"{m}, {name}": planned(m, settings) for m in options.models for name, settings in SETTINGS.items()}
    for prompt, micro in ((64, 2), (64, 16), (512, 2), (512, 16)) if "8B" in options.models else ():
        runs |= beside(prompt, micro)
    parts = [part for part in PARTS if any(found["parts"].get(part) for found in runs.values())]
    page = table(["", "peak, GB", *parts, "10^15 operations"], (
        [name, gigabytes(found["bytes"]), *(gigabytes(found["parts"].get(part, 0)) for part in parts),
         f"{found['flops'] / 1e15:.1f}"] for name, found in runs.items()
    ))  # fmt: skip
    print(page)
    if options.out:
        write_json(options.out, {"command": command(), "shape": vars(PlanShape()), "runs": runs})
        write_text(options.out.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
