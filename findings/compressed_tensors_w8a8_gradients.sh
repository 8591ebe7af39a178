#!/usr/bin/env bash
# A checkpoint of compressed-tensors in W8A8 gives other gradients than its own loss has; one in W8A16 does not.
#
# Versions: compressed-tensors 0.20.1, transformers 5.24.0, torch 2.13.0. Expected: transformers says `is_trainable` of both
# checkpoints, and both losses are within 1% of the unquantised model's, so the gradients of its input embeddings are close too.
# What happens: where inputs are quantised as well, their rounding runs without autograd. The output of every such layer is a
# constant, without a word, and what reaches the embeddings comes by the residual stream alone.
# Seen:
#     W8A16  is_trainable True, loss off by 0.1%, cosine with the unquantised gradient 0.999
#     W8A8   is_trainable True, loss off by 0.1%, cosine with the unquantised gradient 0.024
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 accelerate==1.15.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

size = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))


def unquantised():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=4, initializer_range=0.1)).eval()


def saved(preset, folder):
    """A checkpoint in which every layer but the head has 8-bit weights, scaled by the largest of each row."""
    model, scheme = unquantised(), preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 127)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def measured(model):
    """The loss, and its gradient by the input embeddings."""
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    loss = model(inputs_embeds=inputs, labels=tokens).loss
    loss.backward()
    return float(loss), inputs.grad.flatten()


loss, gradient = measured(unquantised())
cosines = []
for preset in ("W8A16", "W8A8"):
    model = AutoModelForCausalLM.from_pretrained(saved(preset, f"{sys.argv[1]}/{preset}"), dtype=torch.float32)
    trainable, (other_loss, other) = model.hf_quantizer.is_trainable, measured(model)
    cosines.append(float(torch.nn.functional.cosine_similarity(gradient, other, 0)))
    print(f"{preset:6} is_trainable {trainable}, loss off by {abs(other_loss - loss) / loss:.1%}, "
          f"cosine with the unquantised gradient {cosines[-1]:.3f}")
    if not trainable or abs(other_loss - loss) > 0.01 * loss:
        sys.exit(1)
sys.exit(0 if cosines[0] > 0.99 and cosines[1] < 0.5 else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder/models" 2> "$folder/errors" ||
    { cat "$folder/errors"; exit 1; }
