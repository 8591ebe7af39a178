#!/usr/bin/env bash
# A LoRA that PiSSA began by its fast way (init_lora_weights="pissa_niter_4") is another model when peft loads it again.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0. Expected: from_pretrained of what save_pretrained wrote is the model that
# was trained, as for "pissa" and for plain LoRA.
# What happens: the start is not saved. peft makes it anew from the base weights, and for "pissa_niter_N" by a random projection: it
# takes another part out of the base weights than was trained on. Nothing is said, and no two loads are alike.
# Seen, in logits:
#     True           training moved them by 0.149, the loaded model differs by 0.000, two loads by 0.000
#     pissa          training moved them by 0.897, the loaded model differs by 0.000, two loads by 0.000
#     pissa_niter_4  training moved them by 0.937, the loaded model differs by 2.003, two loads by 1.346
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.1)).save_pretrained(f"{sys.argv[1]}/base")
tokens = torch.randint(64, (2, 16))


def base():
    return AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/base", dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens).logits


def furthest(one, other):
    return float((one - other).abs().max())


def trained(start):
    model = get_peft_model(base(), LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=start))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


before, lost = logits(base()), {}
for start in (True, "pissa", "pissa_niter_4"):
    model = trained(start)
    model.save_pretrained(f"{sys.argv[1]}/{start}")
    after = logits(model)
    loaded = [logits(PeftModel.from_pretrained(base(), f"{sys.argv[1]}/{start}")) for _ in range(2)]
    lost[start] = furthest(after, loaded[0])
    print(f"{start!s:14} training moved them by {furthest(after, before):.3f}, the loaded model differs by "
          f"{lost[start]:.3f}, two loads by {furthest(*loaded):.3f}")
sys.exit(0 if max(lost[True], lost["pissa"]) < 1e-3 and lost["pissa_niter_4"] > 0.1 else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder/models" 2> "$folder/errors" ||
    { cat "$folder/errors"; exit 1; }
