"""Compare TRL's trainers (trl 1.16, installed) with themselves under `patch_trl`: metrics, weights, CPU time, memory.

    python benchmarks/compat/run_trl.py --part closeness [--out benchmarks/results/compat_trl.json]
    python benchmarks/compat/run_trl.py --part groups [--out benchmarks/results/compat_trl_groups.json]
    python benchmarks/compat/run_trl.py --part cost [--out benchmarks/results/compat_trl_cost.json]

Closeness: two updates of a random 4-layer Llama in float32, LoRA or all weights, by DPOTrainer for several losses and
settings: every logged metric and the trained weights. Groups: the same of GRPOTrainer and RLOOTrainer, four sampled
completions a prompt. Both say how many places the decoder runs in a training pass. Cost, of DPO: forward, loss and
backward of a batch of one pair on the embedded model, LoRA r=16, activations kept, reference log-probabilities given:
CPU seconds on one thread, and the peak resident set above what the process held before, each side in a process of its
own, after a forward pass for warming up.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.stage import publish
from benchmarks.measure import peak_above_start
from lpa.models import load
from lpa_kernels import patch_trl

CASES: dict[str, dict[str, Any]] = {
    "lora, dpo": {},
    "lora, dpo, precomputed reference": {"precompute_ref_log_probs": True},
    "lora, ipo": {"loss_type": ["ipo"]},
    "lora, nca_pair": {"loss_type": ["nca_pair"]},
    "lora, sigmoid and sft, checkpointed": {"loss_type": ["sigmoid", "sft"], "gradient_checkpointing": True},
    "all weights, dpo": {"full": True},
    "all weights, wpo, checkpointed": {"full": True, "use_weighting": True, "gradient_checkpointing": True},
}
GROUPS: dict[str, dict[str, Any]] = {
    "lora, grpo": {},
    "lora, grpo, with a reference": {"beta": 0.04},
    "lora, grpo, batches used twice": {"num_iterations": 2, "max_steps": 4},
    "all weights, grpo": {"full": True},
    "lora, rloo": {"method": "rloo"},
    "all weights, rloo, checkpointed": {"method": "rloo", "full": True, "beta": 0.0, "gradient_checkpointing": True},
}
METHODS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
SIZES = {"prompt 512, completions 64": (512, 64), "prompt 64, completions 256": (64, 256)}


def words(tokenizer: Any) -> list[str]:
    """Words that are one token each, wherever they stand after a space."""
    alphabetic = [key[1:] for key in tokenizer.get_vocab() if key.startswith("Ġ") and key[1:].isalpha()]
    return sorted(word for word in alphabetic if word.isascii() and word.islower() and len(word) > 3)


def pairs(tokenizer: Any, sizes: list[tuple[int, int, int]]) -> datasets.Dataset:
    """Texts of random words: prompts, chosen and rejected completions of these lengths, the end token among them."""
    draw, known = random.Random(0), words(tokenizer)
    text = lambda n: "".join(f" {draw.choice(known)}" for _ in range(n))  # noqa: E731
    rows = [{"prompt": text(p), "chosen": text(c - 1), "rejected": text(r - 1)} for p, c, r in sizes]
    return datasets.Dataset.from_list(rows)


def common(folder: str, batch: int) -> dict[str, Any]:
    """Settings of either side: float32 on the CPU, without dropout."""
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "max_steps": 2,
        "per_device_train_batch_size": batch, "learning_rate": 1e-3, "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip


def lora(full: bool) -> LoraConfig | None:
    """The adapters of a run, None where all weights are trained."""
    return None if full else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def trainer(patched: bool, model: Any, tokenizer: Any, data: datasets.Dataset, folder: str, **options: Any) -> Any:
    """A DPOTrainer of either side."""
    full = options.pop("full", False)
    settings = common(folder, len(data)) | {"max_length": None} | options
    with patch_trl() if patched else nullcontext():
        return DPOTrainer(
            model, copy.deepcopy(model) if full else None, DPOConfig(**settings), train_dataset=data,
            processing_class=tokenizer, peft_config=lora(full),
        )  # fmt: skip


def variety(completions: list[str], **inputs: Any) -> list[float]:
    """A reward: how many letters a completion uses."""
    return [len(set(completion.lower())) / 26 for completion in completions]


def group_trainer(patched: bool, model: Any, tokenizer: Any, folder: str, **options: Any) -> Any:
    """A GRPOTrainer or RLOOTrainer of either side: two prompts, four completions each."""
    full, (kind, config) = options.pop("full", False), METHODS[options.pop("method", "grpo")]
    prompts = pairs(tokenizer, [(23, 2, 2), (11, 2, 2)]).select_columns("prompt")
    settings = common(folder, 8) | {"num_generations": 4, "max_completion_length": 12} | options
    with patch_trl() if patched else nullcontext():
        return kind(
            model, variety, config(**settings), train_dataset=prompts, processing_class=tokenizer,
            peft_config=lora(full),
        )  # fmt: skip


def differences(tokenizer: Any, make: Callable[[bool, Any, str], Any]) -> dict[str, Any]:
    """Largest differences between both sides' logs and weights after training, and how far weights moved.

    Args:
        make: the trainer, from whether it is patched, its model, and a folder.
    """
    found = []
    for patched in (False, True):
        torch.manual_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **size))
        seen: list[int] = []
        with tempfile.TemporaryDirectory() as folder:
            one = make(patched, model, folder)
            before = {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}

            def count(_: Any, args: Any, kwargs: Any, seen: list[int] = seen) -> None:
                if kwargs.get("past_key_values") is None:  # not of generation
                    seen.append(args[0].shape[:-1].numel())

            model.model.layers[0].register_forward_pre_hook(count, with_kwargs=True)
            one.train()
        logs = [{k: v for k, v in log.items() if k != "epoch" and "time" not in k} for log in one.state.log_history]
        found.append((logs[: one.args.max_steps], dict(one.model.named_parameters()), before, seen[-1]))
    (theirs, weights, before, tokens), (ours, patched_weights, _, patched_tokens) = found
    assert all(a.keys() == b.keys() for a, b in zip(theirs, ours, strict=True))
    return {
        "metrics": sorted(theirs[0]),
        "metrics_max_difference": max(abs(a[k] - b[k]) for a, b in zip(theirs, ours, strict=True) for k in a),
        "weights_max_difference": max(float((patched_weights[n] - weights[n]).abs().max()) for n in before),
        "weights_moved_max": max(float((weights[n] - before[n]).abs().max()) for n in before),
        "tokens_of_a_pass": tokens,
        "tokens_of_a_pass_patched": patched_tokens,
    }


def closeness(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`differences` of DPO on pairs."""
    data = pairs(tokenizer, [(23, 9, 4), (11, 5, 12), (40, 3, 3)])
    return differences(tokenizer, lambda patched, model, folder: trainer(patched, model, tokenizer, data, folder,
                                                                         **options))  # fmt: skip


def groups(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`differences` of GRPO or RLOO on sampled groups."""
    return differences(tokenizer, lambda patched, model, folder: group_trainer(patched, model, tokenizer, folder,
                                                                               **options))  # fmt: skip


def measured(size: str, patched: bool) -> dict[str, float]:
    """Loss, CPU seconds and peak memory of forward, loss and backward of one batch, of one side."""
    prompt, completion = SIZES[size]
    model, tokenizer = load()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(patched, model, tokenizer, pairs(tokenizer, [(prompt, completion, completion)]), folder)
        given = {f"ref_{name}_logps": torch.tensor([-200.0]) for name in ("chosen", "rejected")}
        inputs, one.precompute_ref_logps = next(iter(one.get_train_dataloader())) | given, True
    assert inputs["input_ids"].shape == (2, prompt + completion)
    one.model.train()
    with torch.no_grad():
        one.compute_loss(one.model, inputs)
    found: dict[str, float] = {}

    def run() -> None:
        begin = time.process_time()
        loss = one.compute_loss(one.model, inputs)
        loss.backward()
        found.update(cpu_seconds=time.process_time() - begin, loss=float(loss.detach()))

    return {"peak_mib_above_start": peak_above_start(run)} | found


def cost(size: str) -> dict[str, Any]:
    """Both sides, and the shares of theirs that a patched step takes."""
    sides = {}
    for name in ("trl", "patched"):
        command = [sys.executable, __file__, "--part", "cost", "--size", size, "--side", name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sides[name] = json.loads(printed.splitlines()[-1])
        print(size, name, sides[name], flush=True)
    shares = {name: sides["patched"][name] / sides["trl"][name] for name in ("cpu_seconds", "peak_mib_above_start")}
    return sides | {"share": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("closeness", "groups", "cost"), required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", choices=tuple(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("trl", "patched"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.side:
        print(json.dumps(measured(arguments.size, arguments.side == "patched")))
        return
    report: dict[str, Any] = {"trl": importlib.metadata.version("trl")}
    if arguments.part == "cost":
        report["cost"] = {size: cost(size) for size in SIZES}
    else:
        tokenizer = load()[1]
        run, cases = (closeness, CASES) if arguments.part == "closeness" else (groups, GROUPS)
        report[arguments.part] = {name: run(tokenizer, dict(options)) for name, options in cases.items()}
    publish(report, [], arguments.out)


if __name__ == "__main__":
    main()
