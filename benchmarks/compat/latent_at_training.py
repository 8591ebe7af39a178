"""Train one random model with the public code of latent-adversarial-training, as it is or patched, and compare."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compat.stage import gap, tiny_model
from lpa_kernels.compat import patch_latent_at

KL = {"kl": 0.1, "toward": 0.5, "away": 0.5}
DPO = {"lora": 8, "adv": {"dpo": 1.0}, "def": {"dpo": 1.0, "sft": 0.0}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "lora, toward/away/kl": {"lora": 8, "def": KL},
    "lora, toward/away/sft": {"lora": 8, "def": {"sft": 1.5, "toward": 0.5, "away": 0.5}},
    "lora, prompt and completions, 1e-3": {
        "lora": 8, "train": {"inner_learning_rate": 1e-3, "add_completions_pgd": True},
    },
    "no adapters": {},
    "lora, explicit labels": {"lora": 8, "labels": True},
    "lora, dpo": DPO,
    "lora, toward/away/kl, public clip of the weights alone": {"lora": 8, "def": KL, "clip_weights_alone": True},
    "lora, dpo, public clip of the weights alone": {**DPO, "clip_weights_alone": True},
    "lora, l2 penalty": {"lora": 8, "train": {"l2_regularization": 0.5}},
    "no adapters, run_rmu": {"rmu": True},
    "lora, micro-batches of 2, accumulation='upstream'": {
        "lora": 8, "train": {"max_batch_per_acc": 2}, "options": {"accumulation": "upstream"},
    },
    "lora, micro-batches of 2": {"lora": 8, "train": {"max_batch_per_acc": 2}},
}  # fmt: skip
BATCHES = 3


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


class Numbers:
    """A tokenizer of texts such as "5 17 3", for the public `run_rmu`; every batch is padded to 14 tokens."""

    truncation_side = "right"

    def __call__(self, text: Any, **_: Any) -> Any:
        from transformers import BatchEncoding

        if isinstance(text, str):
            return {"input_ids": [int(word) for word in text.split()]}
        ids = [self(one)["input_ids"] for one in text]
        padded = torch.tensor([row + [0] * (14 - len(row)) for row in ids])
        return BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long()})


@torch.no_grad()
def start_model(family: str, lora: int, noise: float) -> Any:
    """The model that every run of a scenario starts from, its weights off by the share `noise`."""
    model = tiny_model(family, lora=lora)
    for p in model.parameters():
        p.mul_(1 + noise * torch.randn(p.shape))
    return model


def train(package: str, family: str, scenario: dict[str, Any], patched: bool, noise: float = 0.0) -> dict[str, Any]:
    """Train one model with the public code; returns what it logged, its perturbations, weights and more.

    Args:
        noise: relative change of every weight at the start: what rounding alone does to the result.
    """
    module = importlib.import_module(f"{package}.lat_methods")
    model = start_model(family, scenario.get("lora", 0), noise)
    run: dict[str, Any] = {"logged": [], "deltas": [], "calls": [], "norms": []}
    patch = patch_latent_at(package, **scenario.get("options", {})) if patched else contextlib.nullcontext()
    clip = watched_clip(model, run["norms"], scenario.get("clip_weights_alone", False))
    with patch, watched_adversary(module, run), clip, contextlib.redirect_stdout(None):  # forks print
        (run_rmu if scenario.get("rmu") else run_trainer)(module, model, family, scenario, run)
    run["weights"] = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    return run


def run_trainer(module: Any, model: Any, family: str, scenario: dict[str, Any], run: dict[str, Any]) -> None:
    """`ProjectedGradLAT.train` on three batches of 8 pairs (the published runs have 16 or so)."""
    data, benign = (texts(8 * BATCHES, (9, 7), (3, 4), 199, seed) for seed in (1, 2))
    if scenario.get("labels"):
        data = with_labels(data)
    loaders = [DataLoader(d, batch_size=8, collate_fn=stacked) for d in (data, benign)]  # type: ignore[arg-type]
    lora = bool(scenario.get("lora"))
    known = inspect.signature(module.ProjectedGradLAT.__init__).parameters
    of_forks = {"languages": ["en"], "sequential": False, "output_folder": tempfile.gettempdir()}
    trainer = module.ProjectedGradLAT(
        model=model, dataloader=loaders[0], sft_dataloader=loaders[1], pgd_layers=["embedding", 1, 3],
        model_layers=[0, 1, 2, 3], epsilon=1.0, num_steps=BATCHES, pgd_iterations_per_step=6,
        model_iterations_per_step=2, device="cpu", only_train_lora=lora, outer_learning_rate=8e-5,
        adv_loss_coefs=scenario.get("adv", {"toward": 0.5, "away": 0.5}),
        def_loss_coefs=scenario.get("def", {"toward": 0.5, "away": 0.5, "sft": 1.0}),
        model_layers_module="base_model.model.model.layers" if lora else "model.layers",
        post_def_callback=lambda losses, *_: run["logged"].append(dict(losses)),
        **{"inner_learning_rate": 5e-2, "reinitialize_dev_optim": True, **scenario.get("train", {})},
        **{name: value for name, value in of_forks.items() if name in known},
    )  # fmt: skip
    watch_defence(trainer, run["calls"])
    trainer.train(project_name="compat")


def run_rmu(module: Any, model: Any, family: str, scenario: dict[str, Any], run: dict[str, Any]) -> None:
    """The public `run_rmu`: unrelated texts without prompt_mask, hooks toggled around its own passes."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(8, 15, (2, BATCHES, 4), generator=draw).tolist()
    forget, retain = (
        [[" ".join(map(str, torch.randint(1, 199, (n,), generator=draw).tolist())) for n in batch] for batch in side]
        for side in lengths
    )
    module.run_rmu(
        model, lambda: tiny_model(family), Numbers(), forget, retain, layer_ids=[1, 2], layer_id=2, pgd_layers=1,
        max_num_batches=BATCHES, model_iterations_per_step=2, pgd_iterations_per_step=6, lr=8e-5,
    )  # fmt: skip
    module.clear_hooks(model)  # the public function leaves the last attack on the model
    trained = {id(p) for p in module.get_params(model, [1, 2], [6])}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)


@contextlib.contextmanager
def watched_adversary(module: Any, run: dict[str, Any]) -> Iterator[None]:
    """Within it, what every inner loop finds is kept: perturbations at attacked positions, and losses."""
    own = module.projected_gradient_descent

    @functools.wraps(own)
    def kept(*args: Any, **kwargs: Any) -> Any:
        losses, wrappers = own(*args, **kwargs)
        run["logged"].append(dict(losses))
        for wrapper in wrappers:
            run["deltas"].append(wrapper.hook_fn.attack.detach()[wrapper.hook_fn.attack_mask.bool()].clone())
        return losses, wrappers

    module.projected_gradient_descent = kept
    try:
        yield
    finally:
        module.projected_gradient_descent = own


def watch_defence(trainer: Any, calls: list[int]) -> None:
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


@contextlib.contextmanager
def watched_clip(model: Any, norms: list[tuple[float, float]], weights_alone: bool) -> Iterator[None]:
    """Within it, each gradient norm that the trainer clips by is kept, and the same without the perturbations'.

    Args:
        weights_alone: clip by the latter.
    """
    own = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, limit: float) -> Tensor:
        given = list(parameters)
        perturbations = {id(p) for name, p in model.named_parameters() if name.endswith("hook_fn.attack")}
        weights = [p for p in given if id(p) not in perturbations]
        both = ([p.grad for p in ps if p.grad is not None] for ps in (given, weights))
        norms.append(tuple(float(torch.nn.utils.get_total_norm(grads)) for grads in both))  # type: ignore[arg-type]
        return own(weights if weights_alone else given, limit)

    torch.nn.utils.clip_grad_norm_ = clip
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = own


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far two runs of `train` are from one another."""
    losses = [abs(a[k] - b[k]) for a, b in zip(ours["logged"], theirs["logged"], strict=True) for k in b]
    apart = torch.cat([(ours["weights"][k] - v).abs().flatten() for k, v in theirs["weights"].items()])
    first = len(theirs["deltas"]) // BATCHES  # of the first batch, before any update of the weights
    gaps = [gap(a, b) for a, b in zip(ours["deltas"], theirs["deltas"], strict=True)]
    return {
        "losses_abs_max": max(losses), "deltas_first_batch_rel_max": max(gaps[:first]), "deltas_rel_max": max(gaps),
        "weights_abs_max": float(apart.max()), "weights_abs_mean": float(apart.mean()),
    }  # fmt: skip


def compare(package: str, family: str, name: str) -> dict[str, Any]:
    """How close the patched code is to the public one in a scenario, and the public one to itself under rounding."""
    scenario = SCENARIOS[name]
    theirs, ours = (train(package, family, scenario, patched) for patched in (False, True))
    noisy = train(package, family, scenario, False, noise=1e-7)
    start = dict(start_model(family, scenario.get("lora", 0), 0.0).named_parameters())
    moved = torch.cat([(v - start[k]).abs().flatten() for k, v in theirs["weights"].items()])
    report: dict[str, Any] = {
        "patched": distance(ours, theirs),
        "public_with_weights_off_by_1e-7": distance(noisy, theirs),
        "weights_moved_abs_mean": float(moved.mean()),
    }
    if theirs["calls"]:
        report["perturbed_passes"] = {"public": theirs["calls"][:4], "patched": ours["calls"][:4]}
    if theirs["norms"]:
        names = ("clipped_by", "of_the_weights")
        report["gradient_norms_of_the_first_batch"] = {
            side: dict(zip(names, zip(*run["norms"][:2], strict=True), strict=True))
            for side, run in (("public", theirs), ("patched", ours))
        }
    return report
