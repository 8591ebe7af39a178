"""What every comparison with public code needs: a staged copy of a clone, stubs, models, closeness, cost, reports."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks.measure import Run, in_turns, made_with, peak_in_a_process, revision, write_record

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


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def cpu_seconds(calls: dict[str, Run], repeats: int) -> dict[str, Any]:
    """Seconds of each call in turn, their medians, and the first call's median as a multiple of each."""
    seconds = in_turns(calls, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    ratios = {name: first / median for name, median in medians.items()}
    return {"cpu_seconds": seconds, "cpu_seconds_median": medians, "ratio": ratios}


def peaks(module: str, expressions: dict[str, str]) -> dict[str, Any]:
    """MiB of each function's peak above its start, each in a process of its own; the first by the last."""
    found = {name: round(peak_in_a_process(module, expression)) for name, expression in expressions.items()}
    first, *_, last = found.values()
    return {"peak_mib_above_start": found, "ratio": first / max(last, 1)}


def publish(report: dict[str, Any], clones: list[Path], out: Path | None) -> None:
    """Print a report, headed by what it was made with and the commits of the clones; write it where `out` is given."""
    record = made_with() | {"code": {clone.resolve().name: revision(clone) for clone in clones}} | report
    print(json.dumps(record, indent=2))
    if out is not None:
        write_record(out, record)
