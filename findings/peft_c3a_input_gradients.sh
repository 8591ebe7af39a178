#!/usr/bin/env bash
# C3A of peft passes on wrong gradients to its inputs: the adapter's share is turned about (a correlation for a convolution).
#
# Versions: peft 0.21.2, torch 2.13.0. Expected: the same gradients before and after merge_adapter(), as the outputs are the same.
# What happens: outputs agree to 1e-6, gradients of the input differ by as much as the adapter adds. Those of the adapter's own
# weights are right, so training one adapted layer works; every layer below gets other gradients, and so does an attack.
# Seen:
#     outputs   differ by 1.8e-07
#     gradients differ by 1.7e+00 where the adapter's share is 1.4e+00
#     along a direction: -3.4968 by finite differences, -4.4756 by autograd, -3.4968 by autograd of the merged layer
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import torch
from peft import C3AConfig, get_peft_model

torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
model = get_peft_model(plain, C3AConfig(block_size=4, target_modules=["0"], init_weights="gaussian"))
with torch.no_grad():
    for name, p in model.named_parameters():
        if "c3a" in name:
            p.copy_(3 * torch.randn_like(p))
x, onto, along = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8)


def outputs_and_gradients():
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    return out.detach(), torch.autograd.grad((out * onto).sum(), leaf)[0]


with torch.no_grad():  # linear, so that a long step is as good as a short one
    slope = float(((model(x + along) - model(x - along)) * onto).sum() / 2)
out, gradient = outputs_and_gradients()
with model.disable_adapter():
    _, without = outputs_and_gradients()
model.merge_adapter()
merged_out, merged = outputs_and_gradients()
apart = float((out - merged_out).abs().max())
wrong, share = float((gradient - merged).abs().max()), float((merged - without).abs().max())
print(f"outputs   differ by {apart:.1e}")
print(f"gradients differ by {wrong:.1e} where the adapter's share is {share:.1e}")
print(f"along a direction: {slope:.4f} by finite differences, {float((gradient * along).sum()):.4f} by autograd, "
      f"{float((merged * along).sum()):.4f} by autograd of the merged layer")
sides = abs(float((merged * along).sum()) - slope) < 1e-4 < abs(float((gradient * along).sum()) - slope)
raise SystemExit(not (apart < 1e-5 and wrong > 0.1 * share and sides))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
