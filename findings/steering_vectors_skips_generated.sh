#!/usr/bin/env bash
# steering-vectors steers from a token on, but not the tokens that are generated: the cache of keys and values hides them.
#
# Versions: steering-vectors 0.12.2, transformers 4.57.6 (it takes none of 5), torch 2.13.0. Expected: `min_token_index=5` steers
# the token at index 5 and all after it, generated ones too; and `use_cache` changes how fast tokens come, not which.
# What happens: the index is counted in the pass at hand. With a cache, transformers' default, each pass after the first holds one
# token, at index 0, so nothing that is generated is steered. Without a cache everything is. No index at all steers both alike.
# Seen:
#     all tokens steered:  [57, 57, 57, 57, 57, 57, 57, 57] with a cache, [57, 57, 57, 57, 57, 57, 57, 57] without
#     from the prompt's last token on: [57, 40, 4, 45, 18, 22, 18, 4] with a cache, [57, 57, 57, 57, 57, 57, 57, 57] without
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==4.57.6 steering-vectors==0.12.2
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
prompt = torch.randint(1, 64, (1, 6))
vector = SteeringVector({1: 20 * torch.randn(32)})


def generated(cache, **where):
    with vector.apply(model, **where):
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache)[0, 6:].tolist()


every, last = [[generated(cache, **where) for cache in (True, False)] for where in ({}, {"min_token_index": 5})]
print(f"all tokens steered:  {every[0]} with a cache, {every[1]} without")
print(f"from the prompt's last token on: {last[0]} with a cache, {last[1]} without")
sys.exit(0 if every[0] == every[1] == last[1] != last[0] else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
