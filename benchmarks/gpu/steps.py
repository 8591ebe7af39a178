"""The run and memory pieces: LPA steps of the 8B shape through LPATrainer, as a user's run makes them."""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import torch
from datasets import Dataset

from benchmarks.loop_cases import Shape, batch_of
from lpa import LPAConfig, LPATrainer

from .inner import peaks, synchronized
from .shapes import BATCH, shape
from .worker import Cases, Setting


def base_model(own: Shape) -> Any:
    """The random model without adapters, which the trainer adds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(own.family, **own.config), dtype=own.dtype)


def train(own: Shape, lpa_steps: int, dry: bool, **settings: Any) -> dict[str, Any]:
    """A run of so many LPA steps of 16 pairs in micro-batches of the shape's: seconds, and memory."""
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = {name: value.cpu() for name, value in vars(batch_of(own)).items() if value is not None}

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {name: value.clone() for name, value in held.items()}

    with tempfile.TemporaryDirectory() as folder:
        args = LPAConfig(
            folder, lpa_steps=lpa_steps, per_device_train_batch_size=own.pairs, save_strategy="no",
            gradient_accumulation_steps=BATCH // own.pairs, disable_tqdm=True, report_to=[], use_cpu=not cuda,
            attack_sites=list(own.sites), auto_micro_batch=False, **settings,
        )  # fmt: skip
        data = Dataset.from_dict({"number": list(range(BATCH * 2))})
        trainer = LPATrainer(base_model(own), args, data, None, data_collator=collate)
        begin = synchronized()
        trainer.train()
        seconds = synchronized() - begin
    logs = [entry for entry in trainer.state.log_history if "seconds_attack" in entry]
    last = logs[-1]
    found = {
        "LPA steps": lpa_steps,
        "micro-batch": own.pairs,
        "seconds": round(seconds, 2),
        "first step s": round(sum(logs[0][f"seconds_{part}"] for part in ("attack", "defence", "other")), 3),
        "last step: attack s": round(last["seconds_attack"], 3),
        "last step: defence s": round(last["seconds_defence"], 3),
        "last step: other s": round(last["seconds_other"], 3),
        "captured": trainer_captured(trainer),
        **peaks(),
    }
    if lpa_steps == 30:
        found["seconds of 30 LPA steps"] = round(seconds, 2)
    del trainer
    return found


def trainer_captured(trainer: Any) -> str:
    """Whether the last attacks were replayed, from what the engine remembers of the model."""
    from lpa_kernels.attack import graphs

    return graphs._off.get(trainer.model) or ("yes" if graphs._captured.get(trainer.model) else "no")


def run(setting: Setting) -> Cases:
    """30 LPA steps of 16 pairs: the whole micro-batch at once, as it is and with adapters merged; then in parts."""
    dry = setting.dry
    steps = 2 if dry else 30
    yield "llama, 16 pairs at once", lambda: train(shape("llama", BATCH, dry), steps, dry)
    merged = {"attack_merge_adapters": True}
    yield "llama, 16 pairs at once, merged", lambda: train(shape("llama", BATCH, dry), steps, dry, **merged)
    if not dry:
        yield "llama, 4 x 4 pairs", lambda: train(shape("llama", 4, dry), steps, dry)
        yield "qwen3, 16 pairs at once", lambda: train(shape("qwen3", BATCH, dry), steps, dry)


def memory(setting: Setting) -> Cases:
    """Peak memory of whole LPA steps by micro-batch."""
    for pairs in (2, 16, 4, 8):
        yield f"micro-batch {pairs}", lambda pairs=pairs: train(shape("llama", pairs, setting.dry), 2, setting.dry)
    off = {"attack_capture_graph": "off"}  # a graph keeps the memory of its pass, which the updates cannot use
    yield "micro-batch 2, not captured", lambda: train(shape("llama", 2, setting.dry), 2, setting.dry, **off)
    checkpointed = {"gradient_checkpointing": True}
    yield "micro-batch 2, checkpointed", lambda: train(shape("llama", 2, setting.dry), 2, setting.dry, **checkpointed)
