"""Compare the public trainer of latent-adversarial-training or a fork, from your own clone, with patch_latent_at().

    python benchmarks/compat/run_latent_at.py CLONE [--parts closeness] [--families llama,qwen3] [--out FILE]
    python benchmarks/compat/run_latent_at.py CLONE --parts builds --builds CHECKOUT . --repeats 9

Parts: "closeness", each scenario of `latent_at_training` with the public code as it is and patched; "cost", CPU
seconds of both inner loops, in turn in one process; "memory", which "cost" has too, the peak resident set of each in a
process of its own, above what it held before; "builds", the seconds of several checkouts of this repository, a process
each, in turn. The public code is a copy of the clone in which `dim=4096` (or another number) reads the model's width;
its missing imports are stubbed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not __package__:
    here = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, os.environ.get("LPA_BUILD", here))  # maybe another checkout's drop-in, under this benchmark
import lpa_kernels

if not __package__:
    sys.path.insert(0, here)

from benchmarks.compat.latent_at_training import SCENARIOS, compare, stacked, texts
from benchmarks.compat.stage import cpu_seconds, gap, peaks, publish, stage, stub_missing_imports, tiny_model
from benchmarks.measure import median_ratio, revision, seconds
from lpa_kernels.compat import patch_latent_at

SPEED = {  # the setting that the target of 3.5 times less CPU time is stated for
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.02,
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {"fused": {}, "fused, merge_adapters": {"merge_adapters": True}}


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


def speed_setting(family: str) -> tuple[Any, dict[str, Any]]:
    """The model and batch that time and memory are measured on."""
    model = tiny_model(family, lora=64, **SPEED)
    model.requires_grad_(False)  # the trainer does so before its inner loop
    return model, stacked(texts(2, (130,), (6, 8), SPEED["vocab_size"], 3))


def ways(package: str, family: str) -> dict[str, Callable[[], Any]]:
    """The inner loop by each side, on one model. The patches are made before, as a script does, once."""
    model, batch = speed_setting(family)
    module = importlib.import_module(f"{package}.lat_methods")
    sides = {"public": (module.projected_gradient_descent, module.clear_hooks)}
    for name, options in OURS.items():
        with patch_latent_at(package, **options):
            sides[name] = module.projected_gradient_descent, module.clear_hooks

    def call(name: str) -> Any:
        module.projected_gradient_descent, module.clear_hooks = sides[name]
        try:
            return inner_loop(package, batch, model)
        finally:
            module.projected_gradient_descent, module.clear_hooks = sides["public"]

    return {name: functools.partial(call, name) for name in sides}


def cost(package: str, family: str, repeats: int) -> dict[str, Any]:
    """CPU seconds of the inner loop, theirs and ours in turn, and how far they are apart."""
    calls = ways(package, family)
    public, fused = calls["public"](), calls["fused"]()
    return cpu_seconds(calls, repeats) | {
        "losses_abs": max(abs(a[k] - b[k]) for a, b in zip(fused[0], public[0], strict=True) for k in b),
        "deltas_rel": max(gap(a, b) for a, b in zip(fused[1], public[1], strict=True)),
    }


def alone(clone: str, package: str, family: str, patched: bool) -> Callable[[], Any]:
    """The inner loop of one side, for a process of its own; what is allocated once is there."""
    quiet(clone, package)
    if patched:
        patch_latent_at(package)
    small = stacked(texts(2, (5,), (2, 3), 199, 4))
    inner_loop(package, small, tiny_model(family, lora=4), layer=["embedding", 1], pgd_iterations=1)
    model, batch = speed_setting(family)
    return lambda: inner_loop(package, batch, model)


def builds(arguments: argparse.Namespace, family: str) -> dict[str, Any]:
    """CPU seconds of the drop-in of each checkout, in turn, and the median over the rounds of each by the first's.

    Every checkout has a process of its own, which waits for its turn and has warmed up before the first round.
    """
    commits = {str(revision(build)): build for build in arguments.builds}
    words = [sys.executable, __file__, str(arguments.clone), "--folder", arguments.folder, "--families", family]
    workers = {
        commit: subprocess.Popen(
            [*words, "--serve"], env=os.environ | {"LPA_BUILD": str(build.resolve())}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for commit, build in commits.items()
    }  # fmt: skip
    found: dict[str, dict[str, list[float]]] = {way: {commit: [] for commit in workers} for way in OURS}
    for lap in range(arguments.repeats + 1):
        for way, taken in found.items():
            for commit, worker in list(workers.items())[:: 1 if lap % 2 else -1]:
                print(way, file=worker.stdin, flush=True)
                spent = json.loads(worker.stdout.readline())  # type: ignore[union-attr]
                if lap:
                    taken[commit].append(spent)
    for worker in workers.values():
        worker.communicate()
    first = next(iter(workers))
    return {
        way: {"cpu_seconds": taken, "by_the_first": {c: median_ratio(t, taken[first]) for c, t in taken.items()}}
        for way, taken in found.items()
    }


def serve(package: str, family: str) -> None:
    """Answer each way's name on the standard input with its CPU seconds."""
    build = os.environ["LPA_BUILD"]
    assert Path(lpa_kernels.__file__).is_relative_to(build), f"{lpa_kernels.__file__} is not of {build}"
    calls = ways(package, family)
    for line in sys.stdin:
        print(json.dumps(seconds(calls[line.strip()])), flush=True)


def quiet(clone: str, folder: str) -> tuple[list[str], dict[str, int]]:
    """Make the public code importable; the stubs and the changed lines."""
    os.environ["PYTHONBREAKPOINT"] = "0"  # the public code has breakpoints in it
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    stubs = stub_missing_imports()
    place, changed = stage(Path(clone), folder)
    sys.path.insert(0, str(place))
    return stubs, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="your clone of the public code")
    parser.add_argument("--folder", default="latent_at", help="the package in it")
    parser.add_argument("--families", default="llama,qwen3", help="model types")
    parser.add_argument("--parts", default="closeness,cost")
    parser.add_argument("--builds", type=Path, nargs="+", default=[], help="checkouts of this repository")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    package, families = arguments.folder, arguments.families.split(",")
    stubs, changed = quiet(str(arguments.clone), package)
    if arguments.serve:
        serve(package, families[0])
        return
    report: dict[str, Any] = {"lines_changed": changed, "stubs": stubs}
    if "closeness" in arguments.parts:
        report["closeness"] = {f: {name: compare(package, f, name) for name in SCENARIOS} for f in families}
    if arguments.parts != "closeness":
        report["size"] = SPEED
    if "cost" in arguments.parts:
        report["time"] = {family: cost(package, family, arguments.repeats) for family in families}
    if "cost" in arguments.parts or "memory" in arguments.parts:
        clone, it = str(arguments.clone.resolve()), "benchmarks.compat.run_latent_at"
        report["memory"] = {
            family: peaks(it, {side: f"alone({clone!r}, {package!r}, {family!r}, {side == 'fused'})"
                               for side in ("public", "fused")})
            for family in families
        }  # fmt: skip
    if "builds" in arguments.parts:
        report["builds"] = {family: builds(arguments, family) for family in families}
    publish(report, [arguments.clone], arguments.out)


if __name__ == "__main__":
    main()
