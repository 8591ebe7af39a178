#!/usr/bin/env bash
# Whether transformers' hidden states hold what a forward hook did depends on whether any were asked for before it was set.
#
# Versions: transformers 5.24.0, torch 2.13.0. Expected: `hidden_states[1]` is what block 1 is given, steered or attacked by a hook on
# block 0 as it may be; at the least it does not depend on calls made before.
# What happens: the states are recorded by forward hooks of transformers' own, which are set at the first call that asks for them and
# stay. torch runs hooks in the order they were set. So a hook set before that call is seen by `hidden_states`, one set after it is
# not, while the next block and the logits have it in both cases: a loss on such states, or a look at them, leaves the vector out.
# Seen:
#     asked first after the hook was set:  hidden_states[1] is off from block 1's input by 0.000
#     asked once before the hook was set:  hidden_states[1] is off from block 1's input by 13.839
#     the vector's norm over 8 tokens is 13.839; the logits are the same: True
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
plain = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=4)).state_dict()
tokens, vector = torch.randint(64, (1, 8)), torch.randn(32)


@torch.no_grad()
def steered(asked_before):
    """How far hidden_states[1] is off from the input of block 1, and the logits."""
    model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=4)).eval()
    model.load_state_dict(plain)
    if asked_before:
        model(tokens, output_hidden_states=True)
    given = []
    model.model.layers[0].register_forward_hook(lambda block, inputs, output: output + vector)
    model.model.layers[1].register_forward_pre_hook(lambda block, inputs: given.append(inputs[0]))
    found = model(tokens, output_hidden_states=True)
    return float((found.hidden_states[1] - given[0]).norm()), found.logits


(after, logits), (before, again) = steered(False), steered(True)
norm, same = float(vector.norm()) * tokens.numel() ** 0.5, torch.equal(logits, again)
print(f"asked first after the hook was set:  hidden_states[1] is off from block 1's input by {after:.3f}")
print(f"asked once before the hook was set:  hidden_states[1] is off from block 1's input by {before:.3f}")
print(f"the vector's norm over 8 tokens is {norm:.3f}; the logits are the same: {same}")
sys.exit(0 if after == 0 and abs(before - norm) < 1e-3 and same else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
