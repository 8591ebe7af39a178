#!/usr/bin/env bash
# A weighted sum of rank-stabilised adapters by peft is too strong by the square root of its rank.
#
# Versions: peft 0.21.2, torch 2.13.0. Expected: `add_weighted_adapter` gives half of one adapter and half of the other, with the
# combination "cat" (its page says that it is precise) as with any other; whether they were trained with use_rslora does not matter.
# What happens: each adapter's scale is multiplied into its weights, and the sum's alpha is set to its rank, so that alpha / rank is 1.
# But use_rslora is taken over from the first adapter, and makes that alpha / sqrt(rank).
# It is known there (peft's issue 3761), and this release has it.
# Seen:
#     use_rslora=False: the sum's weights are 1.000 of half of each
#     use_rslora=True:  the sum's weights are 4.000 of half of each
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model


def strength(**settings):
    """The sum of two adapters of rank 8 over what half of each adds up to, and whether they point the same way."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False, **settings)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config, adapter_name="first")
    model.add_adapter("second", config)
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum", combination_type="cat")
    layer, x = model.base_model.model[0], torch.randn(4, 32)
    wanted = x @ sum(0.5 * layer.get_delta_weight(name) for name in ("first", "second")).T
    with torch.no_grad():
        model.set_adapter("sum")
        found = model(x) - layer.base_layer(x)
    return float(found.norm() / wanted.norm()), float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0))


found = {wanted: strength(use_rslora=wanted) for wanted in (False, True)}
for wanted, (ratio, _) in found.items():
    print(f"{f'use_rslora={wanted}:':18}the sum's weights are {ratio:.3f} of half of each")
same_way = all(cosine > 0.999 for _, cosine in found.values())
sys.exit(0 if same_way and abs(found[False][0] - 1) < 1e-3 and abs(found[True][0] - 4) < 1e-3 else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
