"""Direct preference optimisation (arXiv 2305.18290) in a loop of one's own, each prompt run once for both completions.

    python examples/dpo.py --steps 8

Trains LoRA on the shipped statements: disagreeing is preferred to agreeing. Policy and reference passes are one packed
pass each; any other loss of the two log-probabilities fits in (IPO, KTO's pairs), as do more completions of a prompt
(`Completions`).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from lpa.data import PairCollator, load_pairs
from lpa.models import DEFAULT_MODEL, load
from lpa_kernels import PairBatch, shared_prefix
from lpa_kernels.attack import adapters_off


def train(
    model: Any, tokenizer: Any, pairs: Any, steps: int, batch_size: int = 4, beta: float = 0.1, lr: float = 2e-4
) -> list[float]:
    """Train the adapters of `model` for so many updates; the loss of each.

    Args:
        pairs: rows of prompt, rejected and chosen, of which each update takes the next `batch_size`.
    """
    collate = PairCollator(tokenizer)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        rows = [pairs[(step * batch_size + i) % len(pairs)] for i in range(batch_size)]
        batch = PairBatch.from_dict(collate(rows))
        with torch.no_grad(), adapters_off(model):
            reference = shared_prefix(model, batch).sum(1)
        rejected, chosen = (shared_prefix(model, batch).sum(1) - reference).chunk(2)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        margin = float((chosen - rejected).detach().mean())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, margin {margin:.3f}", flush=True)
    return losses


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    torch.manual_seed(0)
    train(get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")), tokenizer, load_pairs(), options.steps)


if __name__ == "__main__":
    main()
