#!/usr/bin/env bash
# accelerate's save_model leaves weights out that lie side by side in one memory, as if each were a copy of the other.
#
# Versions: accelerate 1.15.0, torch 2.13.0. Expected: two parameters that are different halves of one tensor are two weights, and
# both are saved, as torch.save and transformers' save_pretrained do.
# What happens: names are told apart by their memory alone, not by place and size in it. One is kept, the others are removed from
# the state with a warning that this should be fine. Loading such a file gives a model with new random weights in their place.
# Seen:
#     the model has ['first', 'second'], the file ['first']
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from accelerate import Accelerator
from safetensors import safe_open


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        both = torch.randn(4, 3)
        self.first, self.second = (torch.nn.Parameter(half) for half in both.split(2))


model = Model()
Accelerator(cpu=True).save_model(model, "saved")
with safe_open("saved/model.safetensors", "pt") as saved:
    kept = sorted(saved.keys())
print(f"the model has {sorted(model.state_dict())}, the file {kept}")
sys.exit(0 if len(kept) == 1 else 1)
PYTHON
