#!/usr/bin/env bash
# LoRA beside torchao's int8 layers with dynamic activations is trained on other gradients than those of its loss.
#
# Versions: torchao 0.18.0, transformers 5.24.0, peft 0.21.2, torch 2.13.0. Expected: transformers says `is_trainable` of both int8
# configurations, and their losses are within 1% of the unquantised model's, so an adapter's gradients are close too.
# What happens: weight-only layers pass on the gradient of their inputs. Those that also quantise their inputs give an output that
# is a constant to autograd, without a word. What reaches an adapter comes by the residual stream and other adapters alone.
# Seen:
#     Int8WeightOnlyConfig                   is_trainable True, loss off by 0.0%, cosine with the unquantised gradient 1.000
#     Int8DynamicActivationInt8WeightConfig  is_trainable True, loss off by 0.1%, cosine with the unquantised gradient 0.547
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 torchao==0.18.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

torch.manual_seed(0)
size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=4, initializer_range=0.1)).save_pretrained(sys.argv[1])
tokens = torch.randint(64, (2, 16))


def measured(config=None):
    """Whether it may be trained, its loss, and the gradient of the adapter of the lowest layer."""
    quantised = {} if config is None else {"quantization_config": TorchAoConfig(config)}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **quantised)
    trainable = config is None or model.hf_quantizer.is_trainable
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    of_lowest = [p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad and ".layers.0." in name]
    return trainable, float(loss), torch.cat(of_lowest)


_, loss, gradient = measured()
cosines = []
for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    trainable, other_loss, other = measured(config)
    cosines.append(float(torch.nn.functional.cosine_similarity(gradient, other, 0)))
    print(f"{type(config).__name__:38} is_trainable {trainable}, loss off by {abs(other_loss - loss) / loss:.1%}, "
          f"cosine with the unquantised gradient {cosines[-1]:.3f}")
    if not trainable or abs(other_loss - loss) > 0.01 * loss:
        sys.exit(1)
sys.exit(0 if cosines[0] > 0.99 and cosines[1] < 0.9 else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder/model" 2> "$folder/errors" ||
    { cat "$folder/errors"; exit 1; }
