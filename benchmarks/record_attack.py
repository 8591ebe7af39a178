"""How far the default run's attack goes beside the published one within the same radius: losses, norms and CPU time.

python -m benchmarks.record_attack --adapter RUN   # a run of `lpa train`; into benchmarks/results/attack-cpu.json

Both attack the same three batches of training pairs, on the embedded model and on the model that the run has trained. A
loss "after" n steps is read by one more pass.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import PeftModel

from benchmarks.measure import RESULTS, made_with, table, write_record
from lpa import LPAConfig
from lpa.data import PairCollator, load_pairs
from lpa.evaluation.measure import attack_of
from lpa.models import load
from lpa.presets import DEMO, PUBLISHED_2607
from lpa_kernels.attack import PairBatch

BATCHES, PAIRS = 3, 8
RULES = {name: {"steps": preset["attack_steps"], "step_size": preset["attack_step_size"]}
         for name, preset in (("published", PUBLISHED_2607), ("default", DEMO))}  # fmt: skip


def measured(model: Any, config: LPAConfig, batch: PairBatch, steps: int, step_size: float) -> dict[str, Any]:
    """Losses before and after an attack, the mean norm of a token's perturbation at each site, CPU seconds."""
    attack, longer = (attack_of(model, config, steps=count, step_size=step_size) for count in (steps, steps + 1))
    after = longer.attack(batch).losses[-1]  # first, so that no check of the model is timed
    begun = time.process_time()
    found = attack.attack(batch)
    seconds = time.process_time() - begun
    norms = {site: float(norms[norms > 0].mean()) for site, norms in found.norms.items()}
    return {"before": found.losses[0], "after": after, "norms": norms, "cpu_seconds": seconds}


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, metavar="RUN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LPAConfig(
        "unused", system_prompt=DEMO["system_prompt"], attack_epsilon=DEMO["attack_epsilon"], use_cpu=True, report_to=[]
    )
    model, tokenizer = load(dtype=torch.float32)
    collate = PairCollator(tokenizer, system_prompt=config.system_prompt, attack_on=config.attack_on)
    pairs = load_pairs(kind="both")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [PairBatch.from_dict(collate([pairs[i] for i in order[start : start + PAIRS]]))
               for start in range(0, BATCHES * PAIRS, PAIRS)]  # fmt: skip
    found = []
    for state in ("before training", "after training"):
        if state == "after training":
            model = PeftModel.from_pretrained(model, options.adapter)
        for number, batch in enumerate(batches):
            for name, rule in RULES.items():
                row = {"model": state, "batch": number, "attack": name, **rule}
                found.append(row | measured(model, config, batch, **rule))
    head = [
        "model",
        "batch",
        "attack",
        "toward: before",
        "after",
        "away: before",
        "after",
        "largest mean norm",
        "CPU s",
    ]
    rows = []
    for row in found:
        losses = [f"{row[when][term]:.3f}" for term in ("toward", "away") for when in ("before", "after")]
        norm, seconds = f"{max(row['norms'].values()):.4f}", f"{row['cpu_seconds']:.2f}"
        rows.append([row["model"], row["batch"], row["attack"], *losses, norm, seconds])
    record = made_with() | {"epsilon": config.attack_epsilon, "pairs": PAIRS, "attacks": found}
    write_record(RESULTS / "attack-cpu.json", record, table(head, rows))
    print(table(head, rows))


if __name__ == "__main__":
    main()
