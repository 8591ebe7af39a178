"""Stage a clone of public code for a comparison: a copy with the stated lines changed, stubs; models, reports."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

# Imported by the public code, and without influence on what is compared (logging, data loading, evaluation).
STUBS = (
    "wandb", "einops", "dotenv", "trl", "hydra", "omegaconf", "sklearn", "tasks", "tasks.general_capabilities",
    "tasks.general_capabilities.multiple_choice_tasks", "tasks.wmdp", "tasks.wmdp.WMDP_MCTask",
)  # fmt: skip
WIDTH_LINE = re.compile(r"^(\s+)dim=\d+,$", re.MULTILINE)  # the public code writes one model's width into its source


class Stub(ModuleType):
    """A module whose every attribute is a mock."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def stub_missing_imports() -> list[str]:
    """Put a stand-in where a module of `STUBS` is not installed; returns the names."""
    made = []
    for name in STUBS:
        parent = name.partition(".")[0]
        if isinstance(sys.modules.get(parent), Stub) or importlib.util.find_spec(parent) is None:
            stub = Stub(name)
            stub.__path__ = []
            stub.__spec__ = ModuleSpec(name, None, is_package=True)
            sys.modules[name] = stub
            made.append(name)
    return made


def stage(clone: Path, folder: str) -> tuple[Path, dict[str, int]]:
    """Copy `folder` of a clone to a temporary place with the width line changed.

    Returns:
        the place (to go on sys.path), and how many lines were changed in which file.

    Raises:
        FileNotFoundError: the clone has no such folder.
    """
    source = clone / folder
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is missing; give the path of a clone that has {folder}/")
    place = Path(tempfile.mkdtemp(prefix="compat-"))
    shutil.copytree(source, place / folder)
    changed = {}
    for file in sorted((place / folder).rglob("*.py")):
        text, count = WIDTH_LINE.subn(r"\1dim=model.config.hidden_size,", file.read_text())
        if count:
            file.write_text(text)
            changed[str(file.relative_to(place))] = count
    return place, changed


def tiny_model(family: str = "llama", lora: int = 0, seed: int = 0, **sizes: Any) -> Any:
    """A random model in float32; with `lora`, adapters of that rank on every projection, off zero so that they act.

    Args:
        sizes: configuration values.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 199, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1, "tie_word_embeddings": False, **sizes,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def publish(report: dict[str, Any], clones: list[Path], out: Path | None) -> None:
    """Print a report, headed by what it was made with, and write it to `out` where one is given.

    Args:
        clones: the folders of the public code; their names and commits are part of the report.
    """
    made_with = {
        "command": " ".join(["python benchmarks/compat/" + Path(sys.argv[0]).name, *map(_shown, sys.argv[1:])]),
        "code": {clone.resolve().name: revision(clone) for clone in clones},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(made_with | report, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def _shown(argument: str) -> str:
    """An argument without the folders that only this machine has."""
    path = Path(argument)
    return path.resolve().name if path.is_absolute() else argument


def revision(clone: Path) -> str | None:
    """The commit that a clone is at; None where it is no clone."""
    result = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
