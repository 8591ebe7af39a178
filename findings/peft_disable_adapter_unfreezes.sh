#!/usr/bin/env bash
# `with model.disable_adapter():` of peft makes frozen adapters trainable.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0. Expected: a context that leaves `requires_grad` as it was.
# What happens: leaving it sets requires_grad=True on the active adapters, whatever it was before.
# Seen:
#     before: []
#     after:  ['...q_proj.lora_A.default.weight', '...q_proj.lora_B.default.weight']
# So an attack that freezes all weights and asks the base model for its logits on the way computes weight gradients again.
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

size = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=1))
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
for p in model.parameters():
    p.requires_grad_(False)


def trainable():
    return [name for name, p in model.named_parameters() if p.requires_grad]


before = trainable()
with model.disable_adapter():
    pass
print("before:", before, "after:", trainable(), sep="\n")
raise SystemExit(bool(before) or len(trainable()) != 2)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
