"""What a resumed run must have in common with its checkpoints: settings, data and base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.loading import PAIR_COLUMNS
from ..run_folder import BOUND, checkpoint_folders
from .card import data_hash, weights_hash
from .checkpoint import CheckpointError


def sources(trainer: Any) -> dict[str, Any]:
    """Hashes and sizes of what an `LPATrainer` trains on, for its checkpoints."""
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    reference = () if trainer.ref_model is None else trainer.ref_model.parameters()
    return {
        "rows": len(trainer.lengths),
        "data": _hash_of(trainer.train_dataset, sorted(PAIR_COLUMNS)),
        "benign rows": None if trainer.benign is None else len(trainer.benign),
        "benign data": _hash_of(trainer.benign, ["prompt", "response"]),
        "base model": weights_hash([*frozen, *reference]),
    }


def _hash_of(dataset: Any, columns: list[str]) -> str | None:
    """SHA-256 of a data set's texts; None where it lacks these columns, as one with a collator of its own may."""
    if not set(columns) <= set(getattr(dataset, "column_names", ())):
        return None
    return data_hash(dataset.select_columns(columns), tuple(columns))


def check_resumed(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than a checkpoint was made with.

    Raises:
        CheckpointError: some are others; the message names them. A checkpoint of an earlier release keeps none.
    """
    file = checkpoint / BOUND
    if not file.is_file():
        return
    made, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    other = [
        f"{name}={made.get(name)!r}, now {now.get(name)!r}" for name in made | now if made.get(name) != now.get(name)
    ]
    if other:
        raise CheckpointError(
            f"the checkpoint {checkpoint} was made with {'; '.join(other)}; resume with its settings, or begin another "
            "run with the checkpoint as its model"
        )


def kept_setting(run: Path, name: str) -> Any:
    """A setting of a run's newest checkpoint that keeps any; None where there is none."""
    for checkpoint in checkpoint_folders(run):
        try:
            return json.loads((checkpoint / BOUND).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError):  # resuming names the damaged file
            continue
    return None
