"""The model card and the record of a run: README.md and metrics.json beside the adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..assets import ASSETS
from ..evaluation.measure import as_text, labels

_HASHED = 64  # values of each weight that tell one model from another


def data_hash(dataset: Any, columns: tuple[str, ...]) -> str:
    """SHA-256 of the rows' texts, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps([row[name] for name in columns], ensure_ascii=False).encode())
    return digest.hexdigest()


def weights_hash(parameters: Iterable[Tensor]) -> str | None:
    """SHA-256 of the first values of each floating-point weight; None where there are none.

    Packed weights are left out: two devices may quantise the same model to other ones.
    """
    digest, seen = hashlib.sha256(), False
    for weight in parameters:
        if weight.is_floating_point():
            some = weight.detach().reshape(-1)[:_HASHED].cpu().contiguous()
            digest.update(str(tuple(weight.shape)).encode() + bytes(some.view(torch.uint8).tolist()))
            seen = True
    return digest.hexdigest() if seen else None


def _data(data: Mapping[str, Any]) -> str:
    return f"{data['source']}, SHA-256 {data['sha256']}, {data['rows']}"


def _kept(run: Mapping[str, Any]) -> list[str]:
    """Which step the canaries kept, and whether they stopped the run."""
    if not (found := run.get("canaries")):
        return []
    told = [f"- kept: LPA step {found['kept_lpa_step']}; the best by {len(found['measured'])} measurements of canaries "
            f"was {found['best_lpa_step']}"]  # fmt: skip
    return told + ([f"- stopped by the canaries: {found['stopped']}"] if found["stopped"] else [])


def model_card(run: Mapping[str, Any]) -> str:
    """README.md of an adapter.

    Args:
        run: what metrics.json holds: model, adapter (that the run went on with), command, resumed (the commands
            that did), versions, settings, data, benign, before, after, seconds, lpa_steps, canaries.
    """
    name, asset = run["model"], ASSETS.get(run["model"])
    base = asset.source if asset else name
    settings, after = run["settings"], run["after"]
    use = ["from lpa.models import load"]
    if settings["lora"]:
        use += ["from peft import PeftModel", "", f"model, tokenizer = load({name!r})",
                'model = PeftModel.from_pretrained(model, "this folder")']  # fmt: skip
    else:
        use += ["", 'model, tokenizer = load("this folder")']
    lines = ["---", f"base_model: {json.dumps(base)}"]
    if settings["lora"]:
        lines.append("library_name: peft")
    lines += [
        "tags:",
        "- lpa",
        "- latent-adversarial-training",
        "---",
        "",
        f"# {base.rpartition('/')[2]}, trained by LPA",
        "",
    ]
    lines += [
        "Latent Personality Alignment trains a chat model to keep disagreeing with statements of undesirable "
        "personality traits while an adversary perturbs its hidden states. No harmful text is used.",
        "",
    ]
    if asset:
        lines += [
            f"**The base weights are 4-bit ones, dequantised** ({asset.package} {asset.version}, {asset.licence}). "
            "Figures here are not comparable with published scores of the original model.",
            "",
        ]
    if run.get("quantized"):
        lines += [f"The base model was loaded as {run['quantized']}; it is what these figures are of.", ""]
    if run["before"]:
        lines += ["| held out: share (mean log-odds) | before | after |", "|---|---|---|"]
        for key, label in labels(run["before"]).items():
            lines.append(f"| {label.strip()} | {as_text(key, run['before'])} | {as_text(key, after)} |")
        lines += [
            "",
            "An answer counts by the total log-probabilities of the two completions. The attack is the training's own. "
            "A model that disagrees with everything would score well on the first two rows: read the others too.",
            "",
        ]
    lines += [
        "## How it was made",
        "",
        "```",
        run["command"],
        *run["resumed"],
        "```",
        "",
        f"- LPA steps: {run['lpa_steps']} of {settings['lpa_steps']}, seed {settings['seed']}, {run['seconds']:.0f} s",
        *([f"- went on with the adapter {run['adapter']}"] if run["adapter"] else []),
        *_kept(run),
        f"- data: {_data(run['data'])} pairs",
        *([f"- benign data: {_data(run['benign'])} examples"] if run["benign"] else []),
        f"- versions: {', '.join(f'{key} {value}' for key, value in run['versions'].items())}",
        "- settings and the numbers of every LPA step: metrics.json",
        "",
        "## Use",
        "",
        "```python",
        *use,
        "```",
    ]
    return "\n".join(lines) + "\n"
