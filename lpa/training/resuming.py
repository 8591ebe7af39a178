"""What a resumed run must have in common with its checkpoints: settings, data, base model, adapters and optimiser."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.collate import BENIGN_TOKENS
from ..data.loading import PAIR_COLUMNS
from ..data.templates import PAIR_TOKENS
from ..run_folder import BOUND, checkpoint_folders
from .checkpoint import CheckpointError

# what a PEFT config says of how adapters begin, where they are from and how they are loaded: a checkpoint has them made
_FREE_OF_PEFT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version",
                 "revision", "runtime_config", "task_type"}  # fmt: skip
_RETOLD = " (the texts are the same: the chat template or the tokenizer is likely another one)"

_HASHED = 64  # values of each weight that tell one model from another


def sources(trainer: Any) -> dict[str, Any]:
    """Hashes and sizes of what an `LPATrainer` trains on, its adapters and a user's own optimiser, for checkpoints."""
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    reference = () if trainer.ref_model is None else trainer.ref_model.parameters()
    return {
        "rows": len(trainer.lengths),
        "data": _hash_of(trainer.train_dataset, sorted(PAIR_COLUMNS)),
        "tokens": _hash_of(trainer.train_dataset, PAIR_TOKENS),
        "benign rows": None if trainer.benign is None else len(trainer.benign),
        "benign data": _hash_of(trainer.benign, ["prompt", "response"]),
        "benign tokens": _hash_of(trainer.benign, BENIGN_TOKENS),
        "base model": weights_hash([*frozen, *reference]),
        "own optimizer": _own_optimizer(trainer),
        **_adapters(trainer.model),
    }


def _own_optimizer(trainer: Any) -> Any:
    """What a user gave as `optimizers` or `optimizer_cls_and_kwargs`; None where the settings say it all."""
    if trainer.optimizer is not None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        schedule = trainer.lr_scheduler and type(trainer.lr_scheduler)
        return _plain([type(trainer.optimizer), groups, schedule])
    given = trainer.optimizer_cls_and_kwargs
    return None if given is None else _plain(given)


def _adapters(model: Any) -> dict[str, Any]:
    """The PEFT configs in force, a key for each of their settings: releases of PEFT have different ones."""
    return {
        f"{adapter} adapter's {name}": _plain(value)
        for adapter, config in (getattr(model, "peft_config", None) or {}).items()
        for name, value in config.to_dict().items()
        if name not in _FREE_OF_PEFT
    }


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, the same in each process; of an object or a class, its name."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, Number)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _hash_of(dataset: Any, columns: Sequence[str]) -> str | None:
    """SHA-256 of a data set's texts or tokens; None where it lacks the columns, as a user's own collator allows."""
    if not set(columns) <= set(getattr(dataset, "column_names", ())):
        return None
    return data_hash(dataset.select_columns(list(columns)), tuple(columns))


def data_hash(dataset: Any, columns: tuple[str, ...]) -> str:
    """SHA-256 of the rows' texts, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps([row[name] for name in columns], ensure_ascii=False).encode())
    return digest.hexdigest()


def weights_hash(parameters: Iterable[Tensor]) -> str | None:
    """SHA-256 of the first values of each floating-point weight; None where there are none.

    Packed weights are left out: two devices may quantise the same model to other ones.
    """
    digest, seen = hashlib.sha256(), False
    for weight in parameters:
        if weight.is_floating_point():
            some = weight.detach().reshape(-1)[:_HASHED].cpu().contiguous()
            digest.update(str(tuple(weight.shape)).encode() + bytes(some.view(torch.uint8).tolist()))
            seen = True
    return digest.hexdigest() if seen else None


def check_resumed(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than a checkpoint was made with.

    Raises:
        CheckpointError: some are others; the message names them. A checkpoint of an earlier release keeps none,
            or fewer, and other releases of transformers and PEFT have other settings: those of both are compared.
    """
    file = checkpoint / BOUND
    if not file.is_file():
        return
    made, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    other = {
        name: f"{name}={made[name]!r}, now {now[name]!r}" for name in made if name in now and made[name] != now[name]
    }
    for texts, tokens in (("data", "tokens"), ("benign data", "benign tokens")):
        if tokens in other and texts not in other:
            other[tokens] += _RETOLD
    if other:
        raise CheckpointError(
            f"the checkpoint {checkpoint} was made with {'; '.join(other.values())}; resume with its settings, or "
            "begin another run with the checkpoint as its model"
        )


def kept_setting(run: Path, name: str) -> Any:
    """A setting of a run's newest checkpoint that keeps any; None where there is none."""
    for checkpoint in checkpoint_folders(run):
        try:
            return json.loads((checkpoint / BOUND).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError):  # resuming names the damaged file
            continue
    return None
