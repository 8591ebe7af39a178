"""Compare the public attacks of ER-CAT and MixAT, from your own clones, with the drop-ins of lpa_kernels.compat.

    python benchmarks/compat/run_rivals.py ERCAT_CLONE MIXAT_CLONE [--out benchmarks/results/compat_rivals.json]

fshp971/continuous-adv-icl: `ContinuousAttacker.attack_embeds` under both norms, and the singular-value term of
`CATTrainer._grad_embed_loss` for an embedding with LoRA. insait-institute/MixAT: `EmbeddingSpaceAttack`.
Closeness on a small random model, CPU seconds in turn on the larger one of `run_latent_at.SPEED`. The clones are used
as they are; HarmBench, which MixAT imports, is stubbed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compat import run_continuous_advtrain as cat
from benchmarks.compat.run_latent_at import SPEED
from benchmarks.compat.stage import Stub, cpu_seconds, gap, publish, stub_missing_imports, tiny_model
from lpa_kernels.compat import continuous_adv_icl, mixat

ERCAT = {"steps": 10, "step_size": 1e-2, "radius": 0.05, "disable_tqdm": True}


def attacked(cls: Any, model: Any, norm: str, data: tuple[Tensor, ...]) -> Tensor:
    """The perturbation of either side's ContinuousAttacker."""
    prompt, prompt_mask, target, target_mask = data
    model.eval()
    return cls(**ERCAT, norm_type=norm).attack_embeds(model, None, prompt, prompt_mask, target, target_mask, "cpu")


def prompts(size: int, prompt: int, target: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Prompts padded on the left and targets padded on the right, with their masks."""
    ids, _, attention = cat.texts(size, prompt, target, vocabulary)
    ends = torch.ones(size, target, dtype=torch.long)
    ends[-1, -1:] = 0
    return ids[:, :prompt], attention[:, :prompt], ids[:, prompt:], ends


def term(theirs: Any) -> tuple[float, float]:
    """The singular-value term of an embedding with LoRA: their trainer's, and ours."""
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=8, target_modules=["embed_tokens"], init_lora_weights=False)
    )
    layer = model.get_input_embeddings()
    public = theirs.CATTrainer._grad_embed_loss(SimpleNamespace(model=model, alpha_embed=0.5))["embed_loss"]
    return public, float(continuous_adv_icl.singular_spread(layer.weight + layer.get_delta_weight("default")).detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", nargs=2, type=Path, help="your clones of continuous-adv-icl and of MixAT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ercat, mix = arguments.clones
    sys.path[:0] = [str(ercat / "src"), str(mix / "Continuous-AdvTrain" / "src")]
    stubbed = [*stub_missing_imports(), "baselines"]
    sys.modules["baselines"] = Stub("baselines")  # HarmBench, which makes discrete prompts with models of its own
    theirs, public = importlib.import_module("cont_at"), importlib.import_module("embedding_attack")
    sides = {"public": theirs.ContinuousAttacker, "here": continuous_adv_icl.ContinuousAttacker}
    model, data = tiny_model("llama"), prompts(4, 9, 4, 199)
    closeness: dict[str, Any] = {}
    for norm in continuous_adv_icl.NORMS:
        found = [attacked(cls, model, norm, data) for cls in sides.values()]
        closeness[f"ER-CAT, {norm}, perturbation"] = gap(found[1], found[0])
    public_term, own_term = term(theirs)
    closeness["ER-CAT, singular-value term"] = abs(own_term - public_term) / public_term
    make = functools.partial(functools.partial, is_zero_a_valid_index=True)
    for kind in cat.OPTIMIZERS:
        small, given = cat.setting(False)
        for name, p in small.named_parameters():
            p.requires_grad_("lora" in name)
        classes = (public.EmbeddingSpaceAttack, mixat.EmbeddingSpaceAttack)
        a, b = (cat.run(make(cls), small, given, kind, 10) for cls in classes)
        assert len(a) == len(b) == 6
        assert a[4:] == b[4:]
        closeness[f"MixAT, {kind}, perturbation"] = gap(b[1], a[1])
        closeness[f"MixAT, {kind}, losses"] = max(abs(x - y) for x, y in zip(a[3], b[3], strict=True))
    large, batch = tiny_model("llama", **SPEED), prompts(2, 130, 8, SPEED["vocab_size"])
    big, given = cat.setting(True)
    runs: dict[str, dict[str, Any]] = {
        "ER-CAT, 10 steps": {k: functools.partial(attacked, cls, large, "l2", batch) for k, cls in sides.items()},
        "MixAT, 8 steps of sign": {
            "public": functools.partial(cat.run, make(public.EmbeddingSpaceAttack), big, given, "sign", 8),
            "here": functools.partial(cat.run, make(mixat.EmbeddingSpaceAttack), big, given, "sign", 8),
        },
    }
    cost = {name: cpu_seconds(calls, arguments.repeats) for name, calls in runs.items()}
    report = {"stubbed": stubbed, "closeness": closeness, "size": SPEED, "cost": cost}
    publish(report, arguments.clones, arguments.out)


if __name__ == "__main__":
    main()
