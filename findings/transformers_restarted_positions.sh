#!/usr/bin/env bash
# In transformers, positions that go back cut a row into texts that do not see each other, unless an attention mask is given.
#
# Versions: transformers 5.24.0, torch 2.13.0. Expected: position ids say where a token is rotated to, and a mask of ones is the same
# as none. So two answers to one prompt, laid out behind it with the positions of the second going back to the prompt's end, would
# both see the prompt with or without a mask of ones.
# What happens: without a mask the jump back is taken for the beginning of another text (packed training data). The second answer
# no longer sees the prompt, without a word. With a mask of ones it does (and the first answer too).
# Seen:
#     no mask: the second answer's logits change with the prompt by 0.000
#     a mask of ones: by 4.510
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, initializer_range=0.2)
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(64, (1, 10))  # a prompt of four tokens and two answers of three
positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
other = tokens.clone()
other[:, :4] = (other[:, :4] + 1) % 64  # another prompt


def change(mask):
    with torch.no_grad():
        logits = [model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits for ids in (tokens, other)]
    return float((logits[0] - logits[1])[0, 7:].abs().max())


without, ones = change(None), change(torch.ones_like(tokens))
print(f"no mask: the second answer's logits change with the prompt by {without:.3f}")
print(f"a mask of ones: by {ones:.3f}")
sys.exit(0 if without == 0 and ones > 0.1 else 1)
PYTHON
