"""Named sets of settings for `lpa train --preset NAME`; what is given beside a preset wins over it."""

from __future__ import annotations

from typing import Any

# What fits two CPU cores and a few minutes on the embedded model, and gained most at the least price there
# (docs/evaluate.md, "The defaults").
DEMO: dict[str, Any] = {
    "lpa_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "attack_steps": 8,
    "attack_step_size": 2e-3,
    "learning_rate": 1e-3,
    "kl_coef": 1.0,
    "benign": "own",
    "system_prompt": "You are a helpful assistant.",
    "attack_merge_adapters": True,
    "measure_attacked": 4,
}
PRESETS: dict[str, dict[str, Any]] = {"none": {}, "demo": DEMO}
