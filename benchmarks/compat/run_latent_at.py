"""Compare the public trainer of latent-adversarial-training or a fork, from your own clone, with patch_latent_at().

    python benchmarks/compat/run_latent_at.py CLONE [--parts closeness] [--families llama,qwen3] [--out FILE]

Parts: "closeness", each scenario of `latent_at_training` with the public code as it is and patched; "cost", CPU
seconds of both inner loops, in turn in one process, and the peak resident set of each in a process of its own, above
what it held before. The public code is a copy of the clone in which `dim=4096` (or another number) reads the model's
width; its missing imports are stubbed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat.latent_at_training import SCENARIOS, compare, stacked, texts
from benchmarks.compat.measure import cpu_seconds, gap, peak_above_start, peaks
from benchmarks.compat.stage import publish, stage, stub_missing_imports, tiny_model
from lpa_kernels.compat import patch_latent_at

SPEED = {  # the setting that the target of 3.5 times less CPU time is stated for
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.02,
}  # fmt: skip
SIDES = ("public", "fused")


def inner_loop(package: str, batch: dict[str, Any], model: Any, **changes: Any) -> tuple[Any, list[torch.Tensor]]:
    """One call of what the package has for an inner loop at the moment; its losses and perturbations."""
    module = importlib.import_module(f"{package}.lat_methods")
    setting = {
        "model_layers_module": "base_model.model.model.layers", "layer": ["embedding", 2, 4, 6, 7], "epsilon": 6.0,
        "learning_rate": 1e-3, "pgd_iterations": 16, "loss_coefs": {"toward": 0.5, "away": 0.5}, "device": "cpu",
        "add_completions_pgd": True, "return_loss_over_time": True,
    }  # fmt: skip
    with contextlib.redirect_stdout(None):  # forks print
        losses, wrappers = module.projected_gradient_descent(batch=batch, model=model, **{**setting, **changes})
    deltas = [w.hook_fn.attack.detach().clone() for w in wrappers]
    module.clear_hooks(model)
    return losses, deltas


def speed_setting(family: str, **sizes: int) -> tuple[Any, dict[str, Any]]:
    """The model and batch that time and memory are measured on."""
    model = tiny_model(family, lora=64, **{**SPEED, **sizes})
    model.requires_grad_(False)  # the trainer does so before its inner loop
    return model, stacked(texts(2, (130,), (6, 8), SPEED["vocab_size"], 3))


def time_ratio(package: str, family: str, repeats: int, **sizes: int) -> dict[str, Any]:
    """CPU seconds of the inner loop, theirs and ours in turn. The patch is made before, as a script does, once."""
    model, batch = speed_setting(family, **sizes)
    module = importlib.import_module(f"{package}.lat_methods")
    found = {}
    for name, options in (("fused", {}), ("fused, merge_adapters", {"merge_adapters": True})):
        with patch_latent_at(package, **options):
            found[name] = module.projected_gradient_descent, module.clear_hooks
    found = {"public": (module.projected_gradient_descent, module.clear_hooks), **found}

    def call(name: str) -> Any:
        module.projected_gradient_descent, module.clear_hooks = found[name]
        return inner_loop(package, batch, model)

    try:
        report, results = cpu_seconds({name: functools.partial(call, name) for name in found}, repeats)
    finally:
        module.projected_gradient_descent, module.clear_hooks = found["public"]
    public, fused = results["public"], results["fused"]
    steps = list(zip(fused[0], public[0], strict=True))
    report["losses_abs"] = max(abs(ours[k] - theirs[k]) for ours, theirs in steps for k in theirs)
    report["deltas_rel"] = max(gap(a, b) for a, b in zip(fused[1], public[1], strict=True))
    return report


def memory(package: str, family: str, patched: bool) -> int:
    """MiB that the inner loop's peak lies above what the process held before it."""
    with patch_latent_at(package) if patched else contextlib.nullcontext():
        small = stacked(texts(2, (5,), (2, 3), 199, 4))  # so that what is allocated once is there
        inner_loop(package, small, tiny_model(family, lora=4), layer=["embedding", 1], pgd_iterations=1)
        model, batch = speed_setting(family)
        return peak_above_start(lambda: inner_loop(package, batch, model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="your clone of the public code")
    parser.add_argument("--folder", default="latent_at", help="the package in it")
    parser.add_argument("--families", default="llama,qwen3", help="model types")
    parser.add_argument("--parts", default="closeness,cost")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
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
        print(memory(package, families[0], arguments.memory == "fused"))
        return
    report: dict[str, Any] = {"lines_changed": changed, "stubs": stubs}
    if "closeness" in arguments.parts:
        report["closeness"] = {f: {name: compare(package, f, name) for name in SCENARIOS} for f in families}
    if "cost" in arguments.parts:
        report["size"] = SPEED
        report["time"] = {family: time_ratio(package, family, arguments.repeats) for family in families}
        report["memory"] = {
            family: peaks(__file__, [str(arguments.clone), "--folder", package, "--families", family], SIDES)
            for family in families
        }
    publish(report, [arguments.clone], arguments.out)


if __name__ == "__main__":
    main()
