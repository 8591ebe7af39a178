"""Everything that can fail when a run is saved is tried before its first step."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import PART, WriteError, write_json, writing
from ..run_folder import BOUND


def rehearse_saving(trainer: Any) -> None:
    """Write what the run's folder will get, without the weights, and take it away again.

    Raises:
        ValueError: a configuration or the tokenizer cannot be saved.
        lpa.files.WriteError: the folder cannot be written to, or there is no room for one checkpoint.
    """
    model, run = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    with writing("the run", run), tempfile.TemporaryDirectory(prefix=".try-", suffix=PART, dir=run) as folder:
        parts: dict[str, Any] = {
            "settings": partial(torch.save, trainer.args, Path(folder) / "training_args.bin"),
            "settings of a checkpoint": partial(write_json, Path(folder) / BOUND, trainer.kept_settings()),
        }
        for name, config in getattr(model, "peft_config", {}).items():
            parts[f"adapter {name!r}"] = partial(config.save_pretrained, folder)
        if not hasattr(model, "peft_config"):
            for name in ("config", "generation_config"):
                if (config := getattr(model, name, None)) is not None:
                    parts[f"model's {name}"] = partial(config.save_pretrained, folder)
        if trainer.processing_class is not None:
            parts["tokenizer"] = partial(trainer.processing_class.save_pretrained, folder)
        for name, save in parts.items():
            try:
                save()
            except OSError:
                raise
            except Exception as error:
                raise ValueError(f"the {name} cannot be saved, as it would be after training: {error}") from error
    need, free = _bytes_of_a_checkpoint(model, trainer.args), shutil.disk_usage(run).free
    if free < need:
        raise WriteError(
            f"cannot write the run in {run}: {free / 1e9:.1f} GB are free, and a checkpoint takes {need / 1e9:.1f}"
        )


def _bytes_of_a_checkpoint(model: Any, args: Any) -> int:
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    moments = 0 if args.reset_optimizer or args.save_only_model or str(args.save_strategy.value) == "no" else 2
    return weights * (1 + moments)
