"""The compared models: adapters with similar names are kept apart, and a model keeps its train and eval modes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpa.evaluation.subjects import BASE, EvaluationError, Subjects, warn_of_templates
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
