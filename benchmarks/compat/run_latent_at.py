"""Compare the public trainer of latent-adversarial-training, from your own clone, with and without patch_latent_at().

    python benchmarks/compat/run_latent_at.py CLONE [--out benchmarks/results/compat_latent_at.json]

Closeness: each scenario trains two copies of one random model with `ProjectedGradLAT.train`, once as it is and once
patched. Time: CPU seconds of both inner loops, alternating in one process. Memory: peak resident set of each in a
process of its own, above what it held before. The public code is a copy of the clone in which `dim=4096` reads the
model's width; its missing imports are stubbed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.stage import stage, stub_missing_imports, tiny_model
from lpa_kernels.compat import patch_latent_at

SPEED = {  # the setting that the target of 3.5 times less CPU time is stated for
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.02,
}  # fmt: skip


def texts(
    pairs: int, prompt: tuple[int, ...], completions: tuple[int, int], vocabulary: int, seed: int
) -> list[dict[str, Any]]:
    """Examples in the public batch format: random prompts of the given lengths in turn, and two completions each."""
    draw = torch.Generator().manual_seed(seed)
    length = max(prompt) + max(completions)
    examples = []
    for i in range(pairs):
        start = prompt[i % len(prompt)]
        tokens = torch.randint(1, vocabulary, (length,), generator=draw)
        example: dict[str, Any] = {"prompt_mask": torch.arange(length) < start}
        for side, size in zip(("adv", "def"), completions, strict=True):
            own = tokens.clone()
            own[start:] = torch.randint(1, vocabulary, (length - start,), generator=draw)
            own[start + size :] = 0
            mask = (torch.arange(length) >= start) & (torch.arange(length) < start + size)
            example |= {f"{side}_tokens": own, f"{side}_labels_mask": mask}
        examples.append(example)
    return examples


def stacked(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collated batch; explicit labels stay lists, as the public collator leaves them."""
    keys = examples[0]
    return {
        k: [e[k] for e in examples] if k.endswith("_labels") else torch.stack([e[k] for e in examples]) for k in keys
    }


def with_labels(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples with explicit label lists that are not the tokens."""
    for example in examples:
        for side in ("adv", "def"):
            labels = example[f"{side}_tokens"][example[f"{side}_labels_mask"]]
            example[f"{side}_labels"] = (labels % 7 + 1).tolist()
    return examples


SCENARIOS: dict[str, dict[str, Any]] = {
    "lora, toward/away/kl": {"lora": 8, "def": {"kl": 0.1, "toward": 0.5, "away": 0.5}},
    "lora, toward/away/sft": {"lora": 8, "def": {"sft": 1.5, "toward": 0.5, "away": 0.5}},
    "lora, prompt and completions, 1e-3": {
        "lora": 8,
        "train": {"inner_learning_rate": 1e-3, "add_completions_pgd": True},
    },
    "no adapters": {},
    "lora, explicit labels": {"lora": 8, "labels": True},
    "lora, dpo": {"lora": 8, "adv": {"dpo": 1.0}, "def": {"dpo": 1.0, "sft": 0.0}},
    "lora, toward/away/kl, clip_grad=1e9": {
        "lora": 8, "def": {"kl": 0.1, "toward": 0.5, "away": 0.5}, "train": {"clip_grad": 1e9},
    },
    "lora, dpo, clip_grad=1e9": {
        "lora": 8, "adv": {"dpo": 1.0}, "def": {"dpo": 1.0, "sft": 0.0}, "train": {"clip_grad": 1e9},
    },
    "lora, l2 penalty": {"lora": 8, "train": {"l2_regularization": 0.5}},
    "lora, micro-batches of 2, accumulation='upstream'": {
        "lora": 8, "train": {"max_batch_per_acc": 2}, "options": {"accumulation": "upstream"},
    },
    "lora, micro-batches of 2": {"lora": 8, "train": {"max_batch_per_acc": 2}},
}  # fmt: skip


def train(
    package: str, family: str, scenario: dict[str, Any], patched: bool, noise: float = 0.0, batches: int = 3
) -> dict[str, Any]:
    """Train one model with the public trainer; returns what it logged, its perturbations and its weights.

    Args:
        noise: relative change of every weight at the start: what rounding alone does to the result.
    """
    lora = scenario.get("lora", 0)
    model = tiny_model(family, lora=lora)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + noise * torch.randn(p.shape))
    # 8 pairs a batch, as the published runs have 16 or so
    data, benign = (texts(8 * batches, (9, 7), (3, 4), 199, seed) for seed in (1, 2))
    if scenario.get("labels"):
        data = with_labels(data)
    loaders = [DataLoader(d, batch_size=8, collate_fn=stacked) for d in (data, benign)]  # type: ignore[arg-type]
    logged: list[dict[str, float]] = []
    deltas: list[Tensor] = []
    calls: list[int] = []
    module = importlib.import_module(f"{package}.lat_methods")
    trainer = module.ProjectedGradLAT(
        model=model, dataloader=loaders[0], sft_dataloader=loaders[1], pgd_layers=["embedding", 1, 3],
        model_layers=[0, 1, 2, 3], epsilon=1.0, num_steps=batches, pgd_iterations_per_step=6,
        model_iterations_per_step=2, device="cpu", only_train_lora=bool(lora), outer_learning_rate=8e-5,
        adv_loss_coefs=scenario.get("adv", {"toward": 0.5, "away": 0.5}),
        def_loss_coefs=scenario.get("def", {"toward": 0.5, "away": 0.5, "sft": 1.0}),
        model_layers_module="base_model.model.model.layers" if lora else "model.layers",
        post_def_callback=lambda losses, epoch: logged.append(dict(losses)),
        **{"inner_learning_rate": 5e-2, "reinitialize_dev_optim": True, **scenario.get("train", {})},
    )  # fmt: skip
    watch_adversary(trainer, deltas)
    watch_defence(trainer, deltas, calls)
    with patch_latent_at(package, **scenario.get("options", {})) if patched else contextlib.nullcontext():
        trainer.train(project_name="compat")
    weights = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    return {"logged": logged, "deltas": deltas, "weights": weights, "calls": calls}


def watch_adversary(trainer: Any, deltas: list[Tensor]) -> None:
    """Keep a copy of every perturbation that the trainer's adversary finds, at its attacked positions."""
    own = trainer.train_adversary

    def kept(*args: Any, **kwargs: Any) -> Any:
        losses, wrappers = own(*args, **kwargs)
        for wrapper in wrappers:
            deltas.append(wrapper.hook_fn.attack.detach()[wrapper.hook_fn.attack_mask.bool()].clone())
        return losses, wrappers

    trainer.train_adversary = kept


def watch_defence(trainer: Any, deltas: list[Tensor], calls: list[int]) -> None:
    """Count how often the perturbations are added in each defence pass of a micro-batch."""
    own, seen = trainer.train_defense, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.clear()
        handles = [w.hook_fn.register_forward_hook(lambda *_: seen.append(1)) for w in kwargs["wrappers"]]
        try:
            return own(*args, **kwargs)
        finally:
            calls.append(len(seen))
            for handle in handles:
                handle.remove()

    trainer.train_defense = counted


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far two runs of `train` are from one another."""
    losses = [abs(a[k] - b[k]) for a, b in zip(ours["logged"], theirs["logged"], strict=True) for k in b]
    apart = torch.cat([(ours["weights"][k] - v).abs().flatten() for k, v in theirs["weights"].items()])
    first = len(theirs["deltas"]) // 3  # of the first batch, before any update of the weights
    gaps = [gap(a, b) for a, b in zip(ours["deltas"], theirs["deltas"], strict=True)]
    return {
        "losses_abs_max": max(losses), "deltas_first_batch_rel_max": max(gaps[:first]), "deltas_rel_max": max(gaps),
        "weights_abs_max": float(apart.max()), "weights_abs_mean": float(apart.mean()),
    }  # fmt: skip


def compare(package: str, family: str, name: str) -> dict[str, Any]:
    """How close the patched trainer is to the public one in a scenario, and the public one to itself under rounding."""
    scenario = SCENARIOS[name]
    theirs, ours = (train(package, family, scenario, patched) for patched in (False, True))
    noisy = train(package, family, scenario, False, noise=1e-7)
    start = dict(tiny_model(family, lora=scenario.get("lora", 0)).named_parameters())
    moved = torch.cat([(v - start[k]).abs().flatten() for k, v in theirs["weights"].items()])
    return {
        "patched": distance(ours, theirs),
        "public_with_weights_off_by_1e-7": distance(noisy, theirs),
        "weights_moved_abs_mean": float(moved.mean()),
        "perturbed_passes_public": theirs["calls"][:4], "perturbed_passes_patched": ours["calls"][:4],
    }  # fmt: skip


def inner_loop(package: str, family: str, batch: dict[str, Any], model: Any, patched: bool, **options: Any) -> Any:
    """One call of the public inner loop, patched or not, in the setting of `SPEED`."""
    module = importlib.import_module(f"{package}.lat_methods")
    with patch_latent_at(package, **options) if patched else contextlib.nullcontext():
        found = module.projected_gradient_descent(
            batch=batch, model=model, model_layers_module="base_model.model.model.layers",
            layer=["embedding", 2, 4, 6, 7], epsilon=6.0, learning_rate=1e-3, pgd_iterations=16,
            loss_coefs={"toward": 0.5, "away": 0.5}, device="cpu", add_completions_pgd=True,
            return_loss_over_time=True,
        )  # fmt: skip
        deltas = [w.hook_fn.attack.detach().clone() for w in found[1]]
        module.clear_hooks(model)
    return found[0], deltas


def speed_setting(family: str, **sizes: int) -> tuple[Any, dict[str, Any]]:
    """The model and batch that time and memory are measured on."""
    model = tiny_model(family, lora=64, **{**SPEED, **sizes})
    model.requires_grad_(False)  # the trainer does so before its inner loop
    return model, stacked(texts(2, (130,), (6, 8), SPEED["vocab_size"], 3))


def time_ratio(package: str, family: str, repeats: int, **sizes: int) -> dict[str, Any]:
    """CPU seconds of the inner loop, theirs and ours in turn."""
    model, batch = speed_setting(family, **sizes)
    seconds: dict[str, list[float]] = {"public": [], "fused": [], "fused, merge_adapters": []}
    calls = {
        "public": functools.partial(inner_loop, package, family, batch, model, False),
        "fused": functools.partial(inner_loop, package, family, batch, model, True),
        "fused, merge_adapters": functools.partial(
            inner_loop, package, family, batch, model, True, merge_adapters=True
        ),
    }
    results = {name: call() for name, call in calls.items()}  # also the warm-up
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    public, fused = results["public"], results["fused"]
    keys = public[0][0]
    return {
        "cpu_seconds": seconds, "cpu_seconds_median": medians,
        "ratio": medians["public"] / medians["fused"],
        "ratio_merged": medians["public"] / medians["fused, merge_adapters"],
        "losses_abs": max(abs(a[k] - b[k]) for a, b in zip(fused[0], public[0], strict=True) for k in keys),
        "deltas_rel": max(gap(a, b) for a, b in zip(fused[1], public[1], strict=True)),
    }  # fmt: skip


def resident(field: str) -> int:
    """A line of this process's memory status ("VmRSS", "VmHWM"), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) // 1024


def measure_memory(package: str, family: str, patched: bool) -> int:
    """MiB that the inner loop's peak lies above what the process held before it."""
    small = tiny_model(family, lora=4)  # threads, allocator and imports
    inner_loop_small(package, small, patched)
    model, batch = speed_setting(family)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    inner_loop(package, family, batch, model, patched)
    return resident("VmHWM") - before


def inner_loop_small(package: str, model: Any, patched: bool) -> None:
    """The same loop on a tiny model, so that what is allocated once is there."""
    module = importlib.import_module(f"{package}.lat_methods")
    with patch_latent_at(package) if patched else contextlib.nullcontext():
        module.projected_gradient_descent(
            batch=stacked(texts(2, (5,), (2, 3), 199, 4)), model=model, pgd_iterations=1, device="cpu",
            model_layers_module="base_model.model.model.layers", layer=["embedding", 1], epsilon=1.0,
            learning_rate=1e-3, loss_coefs={"toward": 0.5, "away": 0.5}, add_completions_pgd=True,
        )  # fmt: skip
        module.clear_hooks(model)


def memory_ratio(arguments: argparse.Namespace, family: str) -> dict[str, Any]:
    """Peak MiB of each, from a process of its own."""
    found = {}
    for name in ("public", "fused"):
        command = [sys.executable, __file__, str(arguments.clone), "--folder", arguments.folder, "--memory", name]
        result = subprocess.run([*command, "--families", family], check=True, capture_output=True, text=True)
        found[name] = int(result.stdout.splitlines()[-1])
    return {"peak_mib_above_start": found, "ratio": found["public"] / max(found["fused"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="your clone of the public code")
    parser.add_argument("--folder", default="latent_at", help="the package in it")
    parser.add_argument("--families", default="llama,qwen3", help="model types")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=("public", "fused"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["PYTHONBREAKPOINT"] = "0"  # the public code has breakpoints in it
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    stubs = stub_missing_imports()
    place, changed = stage(arguments.clone, arguments.folder)
    sys.path.insert(0, str(place))
    package, families = arguments.folder, arguments.families.split(",")
    if arguments.memory:
        print(measure_memory(package, families[0], arguments.memory == "fused"))
        return
    report: dict[str, Any] = {
        "command": "python benchmarks/compat/run_latent_at.py CLONE", "lines_changed": changed, "stubs": stubs,
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.processor() or "cpu",
        "threads": 1, "size": SPEED, "closeness": {}, "time": {}, "memory": {},
    }  # fmt: skip
    for family in families:
        report["closeness"][family] = {name: compare(package, family, name) for name in SCENARIOS}
        report["time"][family] = time_ratio(package, family, arguments.repeats)
        report["memory"][family] = memory_ratio(arguments, family)
    report["time"]["llama, feed-forward 704"] = time_ratio(package, "llama", arguments.repeats, intermediate_size=704)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
