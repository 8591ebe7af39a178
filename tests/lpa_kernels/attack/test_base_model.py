"""Where a model with its adapters off is the base model: what every setting of peft leaves in it is tried out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LNTuningConfig, LoraConfig, OFTConfig, TrainableTokensConfig, VeraConfig, get_peft_model
from torch import Tensor

from lpa_kernels.attack import adapters_off, left_in_base, takes_from_base
from tests.support.models import DEVICE, tiny

TOKENS = torch.arange(40, device=DEVICE)[None]
TARGETS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def off(model: Any) -> Tensor:
    """As peft itself switches adapters off."""
    with warnings.catch_warnings(), model.disable_adapter():
        warnings.simplefilter("ignore")
        return logits(model)


def trained(model: Any) -> Any:
    """Everything that peft would train, moved."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.1 * torch.randn(parameter.shape, generator=draw)).to(parameter)
    return model.eval()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**TARGETS | settings)


# by name: the family (qwen2 has biases of queries, keys and values alone, llama none), and the configurations put on it
SETTINGS: dict[str, tuple[str, list[Callable[[], Any]]]] = {
    "LoRA": ("qwen2", [lora]),
    "LoRA with biases of its own": ("qwen2", [lambda: lora(lora_bias=True)]),
    "all": ("qwen2", [lambda: lora(bias="all")]),
    "lora_only": ("qwen2", [lambda: lora(bias="lora_only")]),
    "all of other layers": ("qwen2", [lambda: lora(target_modules=["o_proj"], bias="all")]),
    "lora_only of layers without": ("qwen2", [lambda: lora(target_modules=["o_proj"], bias="lora_only")]),
    "all of none": ("llama", [lambda: lora(bias="all")]),
    "all of the adapter's own": ("llama", [lambda: lora(bias="all", lora_bias=True)]),
    "all and a module": ("qwen2", [lambda: lora(bias="all", modules_to_save=["k_proj"])]),
    "all of one of two": ("qwen2", [lambda: lora(bias="all"), lora]),
    "two": ("qwen2", [lora, lora]),
    "modules_to_save": ("qwen2", [lambda: lora(modules_to_save=["norm", "embed_tokens", "lm_head"])]),
    "trainable_token_indices": ("qwen2", [lambda: lora(trainable_token_indices=[1, 2])]),
    "tokens": ("qwen2", [lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2])]),
    "norms": ("qwen2", [lambda: LNTuningConfig(target_modules=["input_layernorm"])]),
    "OFT": ("qwen2", [lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=4, bias="all")]),
    "VeRA": ("qwen2", [lambda: VeraConfig(target_modules=["q_proj"], r=2, bias="vera_only")]),
    "VeRA without biases": ("qwen2", [lambda: VeraConfig(target_modules=["q_proj"], r=2)]),
    "layers twice": ("llama", [lambda: lora(layer_replication=[[0, 4], [2, 4]])]),
}
LEFT = {
    "all": "bias='all', which trains biases of the base model (model.layers.0.self_attn.q_proj.bias and 11 more)",
    "lora_only": "bias='lora_only', which trains biases of the base model (model.layers.0.self_attn.q_proj.bias and 7",
    "all of other layers": "bias='all'",
    "all and a module": "bias='all', which trains biases of the base model (model.layers.0.self_attn.q_proj.bias and 7",
    "all of one of two": "bias='all'",
    "OFT": "bias='all'",
    "VeRA": "bias='vera_only'",
    "layers twice": "layer_replication=[[0, 4], [2, 4]]",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_an_adapter_leaves_in_the_base_model_is_known(name: str) -> None:
    family, configs = SETTINGS[name]
    model = tiny(family)
    before = logits(model)
    model = get_peft_model(model, configs[0](), adapter_name="one")
    for config in configs[1:]:
        model.add_adapter("two", config())
        model.set_adapter("two")  # peft warns where the active adapter has biases, and of no other
    moved = float((off(trained(model)) - before).abs().max())
    assert (moved > 1e-3) == (name in LEFT), moved
    assert (left_in_base(model) is not None) == (name in LEFT)
    if name in LEFT:
        with pytest.raises(ValueError, match=re.escape(f"the adapter 'one' has {LEFT[name]}")), adapters_off(model):
            pass
    else:
        with adapters_off(model):
            assert torch.allclose(logits(model), before, atol=1e-6)


# ---- starts that peft takes out of the base weights ----------------------------------------------------------------


def started_corda(model: Any) -> LoraConfig:
    pytest.importorskip("attr")  # which peft.tuners.lora.corda imports and peft does not install
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    tokens = torch.randint(0, 101, (1, 200), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    preprocess_corda(model, config, run_model=lambda: model(tokens))
    return config


def started_loftq(model: Any) -> LoraConfig:
    for name in ("scipy", "bitsandbytes"):  # peft asks for them here alone
        pytest.importorskip(name)
    return lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())


def started_lora_ga(model: Any) -> LoraConfig:
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(model, config, torch.enable_grad()(lambda: model(TOKENS, labels=TOKENS).loss.backward()))
    return config


STARTS: dict[str, tuple[str, Callable[[Any], LoraConfig], str]] = {  # by name: what it needs of peft, and how it begins
    "pissa": ("LoraConfig", lambda model: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "pissa_niter": (
        "LoraConfig", lambda model: lora(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'",
    ),
    "olora": ("LoraConfig", lambda model: lora(init_lora_weights="OLoRA"), "init_lora_weights='OLoRA'"),
    "corda": ("LoraConfig", started_corda, "init_lora_weights='corda'"),
    "loftq": ("LoftQConfig", started_loftq, "init_lora_weights='loftq'"),
    "lora_ga": ("LoraGAConfig", started_lora_ga, "init_lora_weights='lora_ga'"),
    "kasa": ("KasaConfig", lambda model: lora(kasa_config=peft.KasaConfig()), "kasa_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_a_start_out_of_the_base_weights_is_refused(name: str) -> None:
    needed, start, setting = STARTS[name]
    if not hasattr(peft, needed):
        pytest.skip(f"peft {peft.__version__} has no {needed}")
    model = tiny("llama")
    before = logits(model)
    model = get_peft_model(model, start(model)).eval()
    assert float((off(model) - before).abs().max()) > 1e-2, "peft itself would do"
    assert takes_from_base(model.peft_config["default"]) == setting
    with (
        pytest.raises(
            ValueError, match=re.escape(f"the adapter 'default' has {setting}, which changes the base weights")
        ),
        adapters_off(model),
    ):
        pass


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_a_start_beside_the_base_weights_is_taken(start: Any) -> None:
    model = tiny("llama")
    before = logits(model)
    try:
        config = lora(init_lora_weights=start)
        model = get_peft_model(model, config).eval()
    except ValueError as error:
        pytest.skip(f"peft {peft.__version__} has no {start}: {error}")
    assert torch.allclose(off(model), before, atol=1e-6)
    assert not takes_from_base(config)
    assert left_in_base(model) is None
