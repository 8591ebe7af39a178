"""The compared models: adapters with similar names are kept apart, and a model keeps its train and eval modes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lpa.evaluation.subjects import BASE, EvaluationError, Subjects, check_start, warn_of_templates
from tests.support.speakers import adapter, random_model, tokenizer


def test_a_subject_keeps_its_fingerprint_beside_ten_others(tmp_path: Path) -> None:
    """The second's inner name, lpa_1, begins that of the eleventh, lpa_10."""
    paths = {f"a{number}": adapter(tmp_path / str(number), number) for number in range(11)}
    few = Subjects(random_model(), {name: paths[name] for name in ("a0", "a1")})
    alone = few.fingerprint("a1")
    few.close()
    many = Subjects(random_model(), paths)
    assert many.fingerprint("a1") == alone
    assert len({many.fingerprint(name) for name in paths}) == 11
    many.close()


def test_every_module_is_left_in_its_own_mode(tmp_path: Path) -> None:
    """A frozen tower in eval mode within a model in training mode, and the other way round."""
    model = random_model()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    subjects = Subjects(model, {"a": adapter(tmp_path, 0)})
    for name in (BASE, "a"):
        with subjects.using(name) as held:
            assert not any(module.training for module in held.modules())
    subjects.close()
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_adapter_that_started_from_the_weights_is_refused(tmp_path: Path) -> None:
    """Put on, it would change the base model that the others are compared with."""
    model = random_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    started = get_peft_model(random_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"))
    started.save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match=r"the adapter .* has init_lora_weights='olora'"):
        Subjects(model, {"a": str(tmp_path)})
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(EvaluationError, match=r"the model's adapter 'default' has init_lora_weights='olora'"):
        Subjects(started, {})


def with_biases(folder: Path, moved: float, **settings: Any) -> tuple[LlamaForCausalLM, str]:
    """A base model, and the folder of an adapter whose biases of it are `moved`."""
    model = random_model(attention_bias=True)
    options = {"target_modules": ["q_proj"], "bias": "all", "init_lora_weights": False} | settings
    adapted = get_peft_model(random_model(attention_bias=True), LoraConfig(r=2, **options))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if name.endswith((".bias", "embed_tokens.base_layer.weight")):
                weight += moved
    adapted.save_pretrained(folder)
    return model, str(folder)


def test_an_adapter_that_moves_the_biases_of_the_base_model_is_refused(tmp_path: Path) -> None:
    """Loaded, they would take the place of the base model's own, for every subject and after `close`."""
    model, folder = with_biases(tmp_path, 0.3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    said = r"\(bias='all'\) holds base weights that are not this model's \(model.layers.0.self_attn.q_proj.bias and 15"
    with pytest.raises(EvaluationError, match=said):
        Subjects(model, {"a": folder})
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    given = PeftModel.from_pretrained(model, folder)
    with pytest.raises(EvaluationError, match=r"the model's adapter 'default' has bias='all', which trains biases"):
        Subjects(given, {})


@pytest.mark.parametrize("settings", [{}, {"bias": "none", "target_modules": ["q_proj", "embed_tokens"]}])
def test_weights_of_the_base_model_beside_an_adapter_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    """As they were; peft saves the embeddings too where these have an adapter."""
    model, folder = with_biases(tmp_path / "same", 0.0, **settings)
    file = next((tmp_path / "same").glob("*.safetensors"))
    rounded = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(rounded, file)  # loaded, it would round the base model's
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(8)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model(ids).logits
        subjects = Subjects(model, {"a": folder})
        with subjects.using(BASE) as base:
            assert torch.equal(base(ids).logits, wanted)
        with subjects.using("a") as adapted:
            assert not torch.allclose(adapted(ids).logits, wanted, atol=1e-2)
    subjects.close()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    model, folder = with_biases(tmp_path / "other", 0.3, **settings)
    with pytest.raises(EvaluationError, match="holds base weights that are not this model's"):
        Subjects(model, {"a": folder})


PLAIN = "save it where it was trained as a plain LoRA"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"init_lora_weights": "olora"}, f"{PLAIN}.* or merge it with lpa export"),
        ({"init_lora_weights": "pissa", "rank_pattern": {"v_proj": 1}}, PLAIN),
        ({"init_lora_weights": "pissa", "use_rslora": True}, PLAIN),
        ({"init_lora_weights": "pissa_niter_2"}, f"{PLAIN}.* or merge it where it was trained"),
        ({"init_lora_weights": "corda", "corda_config": {}}, f"{PLAIN}.* or merge it where it was trained"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, f"{PLAIN}.* or merge it where it was trained"),
        (
            {"init_lora_weights": "pissa", "use_dora": True},
            "train one with init_lora_weights=True, or merge it with lpa",
        ),
        ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 1}}, "train one with init_lora"),
        ({"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}, "train one with init_lora_weights=True"),
        ({"init_lora_weights": "pissa", "trainable_token_indices": [1]}, "train one with init_lora_weights=True"),
        ({"init_lora_weights": "pissa", "bias": "all"}, "train one with init_lora_weights=True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "train one with layer_replication=None, or merge it with lpa export"),
    ],
)
def test_the_advice_is_what_peft_can_do(settings: dict[str, Any], advice: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    for name, value in settings.items():  # as a file gives them, which some of peft's releases check only when applied
        setattr(config, name, value)
    with pytest.raises(EvaluationError, match=f"the adapter x has .*{advice}"):
        check_start("the adapter x", config)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"v_proj": 1}}, {"use_rslora": True}, {"use_dora": True}])
def test_what_peft_converts_is_the_same_adapter_on_the_base_model(
    tmp_path: Path, start: str, settings: dict[str, Any]
) -> None:
    """By the advice's way; DoRA, for which it is not given, loses its magnitudes."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=start, **settings)
    model = get_peft_model(random_model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.requires_grad
    ids = torch.arange(8)[None]
    wanted = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    if "use_dora" in settings:
        with pytest.raises(EvaluationError, match=r"8 tensors have no counterpart, such as .*lora_magnitude_vector"):
            Subjects(random_model(), {"a": str(tmp_path / "plain")})
        return
    subjects = Subjects(random_model(), {"a": str(tmp_path / "plain")})
    with subjects.using("a") as found:
        assert torch.allclose(found(ids).logits, wanted, atol=1e-4)
    subjects.close()


def test_an_adapter_with_a_chat_template_of_its_own_is_named(tmp_path: Path) -> None:
    asked, own = tokenizer(), tokenizer()
    paths = {name: adapter(tmp_path / name, 0) for name in ("none", "same", "other")}
    own.save_pretrained(paths["same"])
    own.chat_template += "!"
    own.save_pretrained(paths["other"])
    with pytest.warns(UserWarning, match="the adapter other was saved with a chat template of its own"):
        warn_of_templates(paths, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_templates({name: paths[name] for name in ("none", "same")}, asked)
