"""Named sets of settings for `lpa train --preset NAME`; what is given beside a preset wins over it."""

from __future__ import annotations

from typing import Any

# What `lpa train` without arguments does, on two CPU cores in minutes. Both kinds of statements, so that the model must
# read them; the adversary enters once it tells them apart, within a radius that it can hold (docs/effect.md).
DEMO: dict[str, Any] = {
    "data": "both",
    "lpa_steps": 60,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "defence_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lora_alpha": 16.0,
    "reset_optimizer": False,
    "kl_coef": 2.0,
    "benign_every": 2,
    "benign": "own",
    "system_prompt": "You are a helpful assistant.",
    "attack_start": 0.5,
    "attack_steps": 4,
    "attack_step_size": 1.28e-3,
    "attack_epsilon": 0.02,
    "measure_attacked": 8,
}
# Shorter than `demo`, on undesirable statements alone. The embedded model learns to disagree with everything.
QUICK: dict[str, Any] = {
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
_PUBLISHED: dict[str, Any] = {
    "attack_steps": 16,
    "attack_step_size": 1e-3,
    "attack_epsilon": 6.0,
    "defence_steps": 4,
    "learning_rate": 8e-5,
    "lora_r": 64,
    "lora_alpha": 8.0,
    "system_prompt": "@self-assessment-or-refusal",
}
# arXiv 2607.07918 ("Efficient Safety Alignment of Language Models via Latent Personality Traits"), Qwen3-8B and
# Llama-3-8B; Mistral-7B took 8 LPA steps. 16 pairs: 4 micro-batches of 4.
PUBLISHED_2607: dict[str, Any] = _PUBLISHED | {
    "lpa_steps": 30,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "kl_coef": 0.0,
}
# arXiv 2605.08496 ("Latent Personality Alignment"), by its code: one pair a batch, and the public code's KL term on
# desirable statements. Its runs are of 7 to 20 LPA steps; this is the longest.
PUBLISHED_2605: dict[str, Any] = _PUBLISHED | {
    "lpa_steps": 20,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "kl_coef": 0.1,
    "kl": "public",
    "benign_eos": True,
    "normaliser": "micro",
}
# The adversary pulls toward the wrong completion alone, the defence does both: by a co-author's log the best trade
# between safety and utility.
TOWARD_ONLY: dict[str, Any] = DEMO | {"attack_toward_coef": 1.0, "attack_away_coef": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "demo": DEMO,
    "quick": QUICK,
    "published-2607": PUBLISHED_2607,
    "published-2605": PUBLISHED_2605,
    "toward-only": TOWARD_ONLY,
}
