"""The settings of the public LPA code (its lat_config.json and its command line) by the names that they have here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_PAIRS = 16  # a batch of its README's run; the file does not hold it


def _site(layer: Any) -> str:
    return f"mlp:{layer}" if isinstance(layer, int) else str(layer)


def _coefs(prefix: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda values: {f"{prefix}{name}_coef": value for name, value in values.items()}


# its name -> ours, or how its value becomes our settings
NAMES: dict[str, str | Callable[[Any], dict[str, Any]]] = {
    "num_steps": "lpa_steps",
    "model_iterations_per_step": "defence_steps",
    "outer_learning_rate": "learning_rate",
    "pgd_iterations_per_step": "attack_steps",
    "inner_learning_rate": "attack_step_size",
    "epsilon": "attack_epsilon",
    "pgd_layers": lambda layers: {"attack_sites": [_site(layer) for layer in layers]},
    "add_completions_pgd": lambda added: {"attack_on": "prompt+completions" if added else "prompt"},
    "adv_loss_coefs": _coefs("attack_"),
    "def_loss_coefs": _coefs(""),
    "max_batch_per_acc": "per_device_train_batch_size",
    "reinitialize_dev_optim": "reset_optimizer",
    "only_train_lora": "lora",
    "clip_grad": "max_grad_norm",
    "N_checkpoints": lambda count: {"save_steps": 1 / count, "save_total_limit": count} if count else {},
    # what its command line takes beside the file
    "model_name": "model",
    "harmful_dataset": "data",
    "benign_dataset": "benign",
    "system_prompt_path": lambda path: {"system_prompt": f"@{path}"},
    "batch_size": "per_device_train_batch_size",
    "adv_toward": "attack_toward_coef",
    "adv_away": "attack_away_coef",
    "def_toward": "toward_coef",
    "def_away": "away_coef",
    "def_sft": "sft_coef",
    "lat_config_path": "config",
}
_TELLING = {"num_steps", "model_iterations_per_step", "pgd_iterations_per_step", "pgd_layers", "adv_loss_coefs"}


def is_public(settings: Mapping[str, Any]) -> bool:
    """Whether settings are those of a lat_config.json."""
    return bool(_TELLING & set(settings))


def translated(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a lat_config.json by our names; KL is the public form.

    Without batch_size a batch is 16 pairs. It is divided into equal micro-batches of at most `max_batch_per_acc` pairs.

    Raises:
        ValueError: one has no counterpart here.

    >>> translated({"num_steps": 30, "pgd_layers": ["embedding", 8], "max_batch_per_acc": 2}, "lat_config.json")
    ... # doctest: +NORMALIZE_WHITESPACE
    {'lpa_steps': 30, 'attack_sites': ['embedding', 'mlp:8'], 'per_device_train_batch_size': 2,
     'gradient_accumulation_steps': 8}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "l2_regularization" and not value:
            continue
        if name not in NAMES:
            raise ValueError(
                f"{where} is a lat_config.json of the public LPA code, and its {name}={value!r} has no counterpart "
                "here; leave it out (docs/migrate.md has the table of names)"
            )
        ours = NAMES[name]
        found |= {ours: value} if isinstance(ours, str) else ours(value)
    if {"batch_size", "max_batch_per_acc"} & set(settings):
        size = settings.get("batch_size") or _PAIRS
        most = settings.get("max_batch_per_acc") or size
        if any(not isinstance(pairs, int) or pairs < 1 for pairs in (size, most)):
            raise ValueError(f"{where}: batch_size={size!r}, max_batch_per_acc={most!r} must be whole numbers above 0")
        micro = next(pairs for pairs in range(min(most, size), 0, -1) if size % pairs == 0)
        found |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": size // micro}
    if found.get("kl_coef"):
        found |= {"kl": "public", "normaliser": "micro", "benign_eos": True}
    return found


def our_name(name: str) -> str | None:
    """What one of its options is called here; None where it has no such option."""
    ours = NAMES.get(name)
    if callable(ours):
        example: dict[str, Any] = {"pgd_layers": [], "adv_loss_coefs": {"toward": 1, "away": 1}, "N_checkpoints": 1,
                                   "def_loss_coefs": {"toward": 1, "away": 1, "kl": 1, "sft": 1}}  # fmt: skip
        return ", --".join(ours(example.get(name, "FILE")))
    return ours
