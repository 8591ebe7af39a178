"""The model card: README.md beside the adapter, from what metrics.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ..assets import ASSETS
from ..evaluation.measure import as_text, labels


def _data(data: Mapping[str, Any]) -> str:
    return f"{data['source']}, SHA-256 {data['sha256']}, {data['rows']}"


def _kept(run: Mapping[str, Any]) -> list[str]:
    """Which step the canaries kept, and whether they stopped the run."""
    if not (found := run.get("canaries")):
        return []
    kept = [f"- kept: LPA step {found['kept_lpa_step']}; the best by {len(found['measured'])} measurements of canaries "
            f"was {found['best_lpa_step']}"]  # fmt: skip
    return kept + ([f"- stopped by the canaries: {found['stopped']}"] if found["stopped"] else [])


def model_card(run: Mapping[str, Any]) -> str:
    """README.md of an adapter.

    Args:
        run: what metrics.json holds: model, adapter (that the run went on with), command, resumed (the commands
            that did), versions, settings, data, benign, before, after, seconds, lpa_steps, canaries.
    """
    name, asset, settings = run["model"], ASSETS.get(run["model"]), run["settings"]
    base = asset.source if asset else name
    head = ModelCardData(
        base_model=base, library_name="peft" if settings["lora"] else None, tags=["lpa", "latent-adversarial-training"]
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {base.rpartition('/')[2]}, trained by LPA",
        "Latent Personality Alignment trains a chat model to keep disagreeing with statements of undesirable "
        "personality traits while an adversary perturbs its hidden states. No harmful text is used.",
    ]
    if asset:
        parts.append(
            f"**The base weights are 4-bit ones, dequantised** ({asset.package} {asset.version}, {asset.licence}). "
            "Figures here are not comparable with published scores of the original model."
        )
    if run.get("quantized"):
        parts.append(f"The base model was loaded as {run['quantized']}; it is what these figures are of.")
    if run["before"]:
        rows = [
            f"| {label.strip()} | {as_text(key, run['before'])} | {as_text(key, run['after'])} |"
            for key, label in labels(run["before"]).items()
        ]
        parts += [
            "\n".join(["| held out: share (mean log-odds) | before | after |", "|---|---|---|", *rows]),
            "An answer counts by the total log-probabilities of the two completions. The attack is the training's own. "
            "A model that disagrees with everything would score well on the first two rows: read the others too.",
        ]
    facts = [
        f"- LPA steps: {run['lpa_steps']} of {settings['lpa_steps']}, seed {settings['seed']}, {run['seconds']:.0f} s",
        *([f"- went on with the adapter {run['adapter']}"] if run["adapter"] else []),
        *_kept(run),
        f"- data: {_data(run['data'])} pairs",
        *([f"- benign data: {_data(run['benign'])} examples"] if run["benign"] else []),
        f"- versions: {', '.join(f'{key} {value}' for key, value in run['versions'].items())}",
        "- settings and the numbers of every LPA step: metrics.json",
    ]
    commands = "\n".join([run["command"], *run["resumed"]])
    use = _ADAPTER_USE.format(repr(name)) if settings["lora"] else _MODEL_USE
    parts += ["## How it was made", f"```\n{commands}\n```", "\n".join(facts), "## Use", f"```python\n{use}\n```"]
    return "\n\n".join(parts) + "\n"


_ADAPTER_USE = """from lpa.models import load
from peft import PeftModel

model, tokenizer = load({})
model = PeftModel.from_pretrained(model, "this folder")"""
_MODEL_USE = """from lpa.models import load

model, tokenizer = load("this folder")"""
