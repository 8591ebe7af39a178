"""The inner-loop benchmarks: one attack, or one LPA step, by each engine and by the conventional loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import device
from benchmarks.op_cases import project_eagerly, public_away
from lpa_kernels import LatentPGD, PairBatch, token_loss
from lpa_kernels.model.sites import resolve_sites
from lpa_kernels.ops import registry

LORA = {"r": 64, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
EPSILON, STEP_SIZE = 6.0, 1e-3


@dataclass(frozen=True)
class Shape:
    """A model (random weights) and a batch of pairs.

    Attributes:
        name: what it stands for.
        config: of a model of `family`.
        sites: where to attack.
        pairs, prompt, rejected, chosen: how many pairs, and the length of each part in tokens.
        dtype: of the weights; adapters are float32, as peft makes them.
        ragged: prompts are of lengths from 30 to `prompt`, evenly, instead of all of `prompt`.
        late: completions alone are attacked, not prompts.
    """

    name: str
    config: dict[str, Any]
    sites: tuple[str, ...]
    pairs: int
    prompt: int
    rejected: int
    chosen: int
    dtype: torch.dtype = torch.float32
    family: str = "llama"
    ragged: bool = False
    late: bool = False


SMALL = Shape(
    "hidden 256, 8 layers, vocabulary 32000; prompt 130, completions 6 and 8, batch 2",
    {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    ("embedding", "mlp:2", "mlp:4", "mlp:6"), 2, 130, 6, 8,
)  # fmt: skip
SMOLLM2 = Shape(
    "SmolLM2-135M's shape, 30 layers; prompt 42, completions 6 and 8, batch 4",
    {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    ("embedding", "mlp:7", "mlp:15", "mlp:22", "mlp:28"), 4, 42, 6, 8,
)  # fmt: skip
LONG = Shape(
    "hidden 256, 2 layers, vocabulary 128256; prompt 64, completions 256 and 256, batch 4",
    {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    ("embedding", "mlp:1"), 4, 64, 256, 256,
)  # fmt: skip
LATE = replace(SMALL, name=f"{SMALL.name}; completions alone attacked", late=True)
RAGGED = replace(SMALL, name="hidden 256, 8 layers, vocabulary 32000; 16 pairs of 40 to 200 tokens in a batch",
                 pairs=16, prompt=190, rejected=8, chosen=10, ragged=True)  # fmt: skip
SHAPES = {"small": SMALL, "smollm2": SMOLLM2, "long": LONG, "late": LATE, "ragged": RAGGED}


def shape_of(shape: str | Shape) -> Shape:
    """A shape by name, or itself."""
    return SHAPES[shape] if isinstance(shape, str) else shape


def model_of(name: str | Shape) -> Any:
    """The random model of a shape with LoRA of rank 64, whose second factors are not zero; the last one is kept."""
    shape = shape_of(name)
    return _model(shape.family, json.dumps(shape.config), shape.dtype)


def base_model(shape: Shape) -> Any:
    """The random model of a shape without adapters, a new one each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device()):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family, **shape.config), dtype=shape.dtype)


@lru_cache(maxsize=1)
def _model(family: str, config: str, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = base_model(Shape("", json.loads(config), (), 0, 0, 0, 0, dtype, family))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    for part, p in model.named_parameters():
        if "lora_B" in part:
            nn.init.normal_(p, std=0.01)
    return model


def forget_model() -> None:
    """Keep no model: the next one is made anew."""
    _model.cache_clear()


def batch_of(name: str | Shape) -> PairBatch:
    """A random batch of a shape; prompt and completions are attacked, unless the shape says otherwise."""
    shape = shape_of(name)
    generator = torch.Generator().manual_seed(0)
    vocabulary = shape.config["vocab_size"]
    first = torch.full((shape.pairs, 1), shape.prompt)  # where completions begin
    if shape.ragged:
        first = torch.linspace(30, shape.prompt, shape.pairs).long()[:, None]
    width = shape.prompt + max(shape.rejected, shape.chosen)
    index = torch.arange(width)
    prompt = torch.randint(3, vocabulary, (shape.pairs, width), generator=generator)

    def text(length: int) -> tuple[Tensor, Tensor]:
        completion = torch.randint(3, vocabulary, (shape.pairs, width), generator=generator)
        mask = (index >= first) & (index < first + length)
        end = int((first + length).max())
        return torch.where(index < first, prompt, completion)[:, :end], mask[:, :end]

    rejected_ids, rejected_mask = text(shape.rejected)
    chosen_ids, chosen_mask = text(shape.chosen)
    attack_mask = index < first + max(shape.rejected, shape.chosen)
    if shape.late:
        attack_mask &= index >= first
    return PairBatch(rejected_ids, rejected_mask, chosen_ids, chosen_mask, attack_mask).to(device())


def conventional(name: str | Shape, steps: int, autocast: torch.dtype | None = None) -> Callable[[], object]:
    """The loop as LAT code bases run it: two passes, all logits, one AdamW over one dense delta a site.

    Args:
        autocast: the public code's is float16, whatever the weights are; None for none.
    """
    model, batch, shape = model_of(name), batch_of(name), shape_of(name)
    mask = batch.attack_mask

    def run() -> float:
        deltas: list[Tensor] = []
        handles = []
        for site in resolve_sites(model, shape.sites):
            delta = torch.zeros(*mask.shape, shape.config["hidden_size"], device=mask.device, requires_grad=True)
            deltas.append(delta)

            def hook(module: nn.Module, args: Any, out: Tensor, delta: Tensor = delta) -> Tensor:
                attacked = mask[:, : out.shape[1]]
                out = out.clone()
                out[attacked] = out[attacked] + delta[:, : out.shape[1]][attacked].to(out.dtype)
                return out

            handles.append(site.module.register_forward_hook(hook))
        for p in model.parameters():
            p.requires_grad_(False)
        optimizer = torch.optim.AdamW(deltas, lr=STEP_SIZE)
        for _ in range(steps):
            optimizer.zero_grad()
            total = 0.0
            for ids, labels, away in (
                (batch.rejected_ids, batch.rejected_mask, False),
                (batch.chosen_ids, batch.chosen_mask, True),
            ):
                with torch.autocast(mask.device.type, dtype=autocast, enabled=autocast is not None):
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][labels[:, 1:]]
                    wanted = ids[:, 1:][labels[:, 1:]]
                    loss = public_away(logits, wanted) if away else F.cross_entropy(logits, wanted)
                (0.5 * loss).backward()
                total += loss.item()
            for delta in deltas:
                if torch.isnan(delta.grad).any():  # type: ignore[arg-type]
                    delta.grad[torch.isnan(delta.grad)] = 0  # type: ignore[index, arg-type]
            optimizer.step()
            with torch.no_grad():
                for delta in deltas:
                    project_eagerly(delta)
        for handle in handles:
            handle.remove()
        for key, p in model.named_parameters():
            p.requires_grad_("lora_" in key)
        return total  # of the last iteration, before its update

    return run


def ours(name: str | Shape, steps: int, **options: Any) -> Callable[[], object]:
    """The same attack by `LatentPGD`."""
    pgd, batch = _pgd(name, steps, **options), batch_of(name)
    return lambda: pgd.attack(batch)


def lpa_step(name: str | Shape, steps: int, **options: Any) -> Callable[[], object]:
    """One LPA step: the attack and four model updates under it."""
    pgd = _pgd(name, steps, **options)
    model, batch = model_of(name), batch_of(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-5)

    def run() -> None:
        attack = pgd.attack(batch)
        for _ in range(4):
            rows = pgd.rows(batch, attack)
            losses, _ = token_loss(rows.logits, rows.labels, rows.rejected, inplace=True)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _pgd(name: str | Shape, steps: int, **options: Any) -> LatentPGD:
    model = model_of(name)
    return LatentPGD(model, shape_of(name).sites, epsilon=EPSILON, step_size=STEP_SIZE, steps=steps, **options)


def _ops() -> dict[str, str]:
    """What the ops run on, by what to add to a way's name: on a GPU what "auto" takes, on a CPU each that is there."""
    if device() == "cuda":
        return {"": "auto"}
    return {"": "reference"} | ({", native ops": "native"} if ("pgd_update_", "native") in registry.table() else {})


WAYS: dict[str, Callable[[str, int], Callable[[], object]]] = {
    "conventional": conventional,
    "reference engine": lambda name, steps: ours(name, steps, engine="reference"),
}
LPA_STEPS: dict[str, Callable[[str, int], Callable[[], object]]] = {
    "reference engine": lambda name, steps: lpa_step(name, steps, engine="reference"),
}
for _ending, _backend in _ops().items():
    WAYS |= {
        f"packed engine{_ending}": partial(ours, engine="packed", backend=_backend),
        f"packed engine, merged adapters{_ending}": partial(
            ours, engine="packed", backend=_backend, merge_adapters=True
        ),
        f"frozen stack{_ending}": partial(ours, engine="stack", backend=_backend),
        f"frozen stack, merged adapters{_ending}": partial(ours, engine="stack", backend=_backend, merge_adapters=True),
    }
    LPA_STEPS[f"packed engine{_ending}"] = partial(lpa_step, engine="packed", backend=_backend)
