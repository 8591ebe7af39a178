"""Settings of a run drawn at random: they are refused by name, or train to the same weights by either engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from lpa_kernels.attack import NORMS
from lpa_kernels.ops import RULES

from .tiny import rows
from .trainers import trainer_of, weights

DATA = [row | {"chosen": row["chosen"] + " I agree" * (n % 3)} for n, row in enumerate(rows(5))]
GOOD: dict[str, list[Any]] = {
    "attack_sites": [["embedding"], ["mlp:1"], ["block:0", "attn:1"], ["embedding", "mlp:0", "mlp:1"], None],
    "attack_on": ["prompt+completions", "prompt", "completions"],
    "attack_steps": [0, 1, 3],
    "attack_epsilon": [0.1, 6.0, 1e3],
    "attack_step_size": [1e-3, 0.05],
    "attack_norm": list(NORMS),
    "attack_rule": list(RULES),
    "attack_random_start": [False, True],
    "attack_relative": [False, True],
    "attack_merge_adapters": [False, True],
    "toward_coef": [0.0, 0.5, 3.0],
    "away_coef": [0.0, 0.5],
    "dpo_coef": [0.0, 0.0, 1.0],
    "ipo_coef": [0.0, 0.0, 0.5],
    "sft_coef": [0.0, 0.4],
    "kl_coef": [0.0, 0.4],
    "kl": ["standard", "standard", "public"],
    "benign_every": [1, 1, 2],
    "attack_toward_coef": [0.5, 0.0, 1.0],
    "attack_away_coef": [0.5, 0.0],
    "attack_dpo_coef": [0.0, 0.0, 1.0],
    "preference_beta": [0.1, 0.5],
    "reference_free": [False, True],
    "normaliser": ["global", "micro"],
    "lora": [True, True, False],
    "lora_r": [1, 5],
    "lora_alpha": [8.0, 0.0],
    "max_grad_norm": [0.0, 1.0],
    "per_device_train_batch_size": [1, 2, 3],
    "gradient_accumulation_steps": [1, 2],
    "defence_steps": [1, 2],
    "gradient_checkpointing": [False, True],
    "offload_attacks": [False, True],
    "reset_optimizer": [False, True],
    "lora_targets": [["q_proj"], ["all-linear"]],
    "system_prompt": ["", "Do you agree?"],
    "seed": [0, 2**32 - 1],
    "attack_capture_graph": ["auto", "off"],
}
BAD: dict[str, list[Any]] = {
    "attack_sites": [["mlp:7"], ["nowhere"], []],
    "attack_on": ["all"],
    "attack_steps": [-1],
    "attack_epsilon": [0.0, float("nan")],
    "attack_step_size": [-1.0],
    "attack_norm": ["l1"],
    "attack_rule": ["lion"],
    "toward_coef": [-0.5, float("nan"), float("inf")],
    "attack_away_coef": [-1.0],
    "kl": ["reverse"],
    "normaliser": ["batch"],
    "lora_r": [0],
    "lora_dropout": [1.0],
    "lora_targets": [["nothing"]],
    "per_device_train_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "defence_steps": [0],
    "lpa_steps": [0],
    "max_length": [0, 3],
    "seed": [-1],
    "attack_capture_graph": ["maybe"],
    "attack_backend": ["cuda"],
    "attack_engine": ["fast"],
    "optim": ["best"],
    "bf16": [True],
    "max_steps": [7],
    "canary_steps": [-1],
}


@st.composite
def choices(draw: Any) -> dict[str, Any]:
    """Some settings of GOOD, and at times one of BAD."""
    some = draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=9, unique=True))
    found = {name: draw(st.sampled_from(GOOD[name])) for name in some}
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(BAD)))
        found[name] = draw(st.sampled_from(BAD[name]))
    return found


def trained(folder: Path, setting: dict[str, Any], **more: Any) -> dict[str, torch.Tensor]:
    # of Adam, rounding alone would decide where a gradient is all but zero
    fixed = {"lpa_steps": 1, "optim": "sgd", "learning_rate": 0.05, "defence_steps": 1}
    trainer = trainer_of(folder, DATA, **(fixed | more | setting))
    trainer.train()
    return weights(trainer)


def check(folder: Path, setting: dict[str, Any], seen: Counter[str]) -> None:
    try:
        packed = trained(folder, setting, attack_engine="packed")
    except ValueError as error:
        if not any(name.removesuffix("s") in str(error) for name in setting):
            raise AssertionError(f"names no setting of {setting}: {error}") from error
        seen["refused"] += 1
        return
    assert all(bool(w.isfinite().all()) for w in packed.values()), setting
    plain = trained(folder, setting, attack_engine="reference")
    for name, weight in plain.items():
        assert torch.allclose(packed[name], weight, atol=1e-4, rtol=0), (setting, name)
    seen["trained"] += 1
