"""The table of `lpa plan` for models of 1, 8 and 70 billion weights, whose configurations are written out here.

    python -m benchmarks.plan_shapes --out benchmarks/results/plan-shapes.json

Estimates all: no GPU was measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lpa import LPAConfig
from lpa.commands.plan import gigabytes
from lpa.plan import FOUR_BIT, PARTS, PlanShape, estimate

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}
MODELS = {
    "1B": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                   "tie_word_embeddings": True},
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "default (4 x 4 pairs)": {},
    "checkpointed": {"gradient_checkpointing": True},
    "4-bit, checkpointed": {"gradient_checkpointing": True, "quantized": FOUR_BIT},
    "4-bit, checkpointed, 16 x 1 pairs": {"gradient_checkpointing": True, "quantized": FOUR_BIT,
                                          "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "checkpointed, each of 8 ranks by FSDP2, 2 x 1 pairs": {
        "gradient_checkpointing": True, "fsdp": True, "ranks": 8, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2},
}  # fmt: skip


def planned(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    own = dict(settings)
    quantized, ranks = own.pop("quantized", None), own.pop("ranks", 1)
    args = LPAConfig(tempfile.gettempdir(), report_to=[], **own)
    found = estimate(
        LlamaConfig(**MODELS[model]), args, PlanShape(), dtype=torch.bfloat16, attn_implementation="sdpa",
        quantized=quantized, ranks=ranks,
    )  # fmt: skip
    return {
        "settings": settings,
        "weights": found.total,
        "trained": found.trained,
        "phase": found.peak_phase,
        "bytes": found.peak.total(),
        "parts": dict(found.peak),
        "flops": found.attack_flops + found.defence_flops,
    }


def as_table(results: dict[str, dict[str, Any]]) -> str:
    parts = [part for part in PARTS if any(found["parts"].get(part) for found in results.values())]
    lines = [f"| | peak, GB | {' | '.join(parts)} | 10^15 operations |", "|---" * (len(parts) + 3) + "|"]
    for name, found in results.items():
        cells = [gigabytes(found["parts"].get(part, 0)) for part in parts]
        lines.append(f"| {name} | {gigabytes(found['bytes'])} | {' | '.join(cells)} | {found['flops'] / 1e15:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    results = {}
    for model in options.models:
        for name, settings in SETTINGS.items():
            results[f"{model}, {name}"] = planned(model, settings)
            print(as_table(results).splitlines()[-1], flush=True)
    if options.out:
        record = {"command": f"python -m benchmarks.plan_shapes --out {options.out}", "shape": vars(PlanShape()),
                  "runs": results}  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(as_table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
