"""`lpa chat` and `lpa export`: side by side answers, and a merged folder that answers as its adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from lpa.commands.evaluate import run as evaluate_command
from lpa.evaluation import EvaluationError, export
from lpa.evaluation.chat import answers, chat
from lpa.evaluation.export import ExportError, export_merged
from lpa.evaluation.subjects import Subjects
from lpa.evaluation.suites import Row
from lpa.models import load
from lpa.report.plots import over_steps
from lpa.report.runs import EvaluationRun, read_run

from ...support.speakers import adapter, random_model, speaker, tokenizer


def typed(lines: list[str]) -> Any:
    """An `input` that types these lines and then ends."""
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def spoken(model: Any, adapters: Any, **options: Any) -> str:
    out = io.StringIO()
    chat(model, tokenizer(), adapters, console=Console(file=out, width=100), max_new_tokens=8, **options)
    return out.getvalue()


def test_answers_stand_side_by_side_until_the_end_of_input(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lpa", 1)
    shown = spoken(random_model(), [folder], read=typed(["the cat", "", "a dog", "/quit", "never"]))
    assert shown.count("┃ base") == 2
    assert "┃ lpa" in shown
    model = random_model()
    subjects = Subjects(model, {"lpa": folder})
    found = answers(subjects, tokenizer(), "the cat", system_prompt=None, max_new_tokens=8)
    assert found["base"] != found["lpa"]
    subjects.close()
    assert spoken(model, [], read=typed([])).startswith("base; every prompt stands alone")


def test_a_given_prompt_is_answered_and_a_long_one_ends_nothing() -> None:
    shown = spoken(speaker("I agree with this statement."), [], prompts=["the cat " * 300, "the dog"])
    assert "but the context holds 512" in shown.replace("\n", " ")
    assert "I agree with this statement." in shown


def test_a_merged_folder_answers_as_the_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lpa", 1)
    check = export_merged(random_model(), tokenizer(), folder, tmp_path / "out" / "merged")
    assert (check.prompts, check.equal) == (4, 4)
    assert check.kl < 1e-5
    merged, own = load(tmp_path / "out" / "merged")
    ids = torch.tensor([own("the cat sat on a mat")["input_ids"]])
    subjects = Subjects(random_model(), {"lpa": folder})
    with torch.no_grad(), subjects.using("lpa") as adapted, subjects.using("base"):
        base = adapted(ids).logits
    with torch.no_grad(), subjects.using("lpa") as adapted:
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, base, atol=1e-2)
    assert not any("lora" in name for name in merged.state_dict())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"], "nothing temporary is left"


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapters_that_change_the_base_model_are_merged_and_not_compared(tmp_path: Path, settings: Any) -> None:
    """No base model is needed to merge one."""
    options = {"init_lora_weights": False, "target_modules": ["q_proj"]} | settings
    adapted = get_peft_model(random_model(attention_bias=True), LoraConfig(r=2, **options))
    with torch.no_grad():
        for weight in adapted.parameters():
            weight += 0.3 * weight.requires_grad
    adapted.save_pretrained(tmp_path / "lpa")
    with pytest.raises(EvaluationError, match="no base model is left to compare with"):
        chat(random_model(attention_bias=True), tokenizer(), [str(tmp_path / "lpa")], prompts=["the cat"])
    export_merged(random_model(attention_bias=True), tokenizer(), str(tmp_path / "lpa"), tmp_path / "merged")
    merged, own = load(tmp_path / "merged")
    ids = torch.tensor([own("the cat sat on a mat")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-4)


@pytest.mark.parametrize("start", ["lora_ga", "pissa_niter_4", "corda"])
def test_a_start_that_cannot_be_made_again_is_not_merged(tmp_path: Path, start: str) -> None:
    """By the file alone peft makes another adapter of it, or none."""
    folder = Path(adapter(tmp_path / "lpa", 1))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(EvaluationError, match=f"'{start}', which peft cannot make again.* where it was trained"):
        export_merged(random_model(), tokenizer(), str(folder), tmp_path / "merged")


def test_a_folder_that_answers_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(tmp_path / "lpa", 1)
    monkeypatch.setattr(export, "load", lambda where, dtype: (random_model(7), tokenizer()))
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        export_merged(random_model(), tokenizer(), folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lpa"]


def test_bad_exports_raise_before_anything_is_written(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lpa", 1)
    with pytest.raises(ExportError, match="is there already and not empty"):
        export_merged(random_model(), tokenizer(), folder, folder)
    with pytest.raises(EvaluationError, match="does not fit this model"):
        export_merged(random_model(hidden_size=64), tokenizer(), folder, tmp_path / "out")
    model = random_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ExportError, match="is quantised"):
        export_merged(model, tokenizer(), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_evaluates_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speaker("No").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    prompts = tmp_path / "standins.txt"
    prompts.write_text("the cat\na dog\n", encoding="utf-8")
    command = [
        "--model",
        str(tmp_path / "model"),
        "--suite",
        "harm",
        "collapse",
        "--set",
        str(prompts),
        "--limit",
        "12",
    ]
    assert evaluate_command([*command, "--max-new-tokens", "4", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "COLLAPSED" in shown
    assert "lpa report" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "run.json",
        "results.json",
        "records.jsonl",
        "table.md",
    }
    assert evaluate_command(["--list"]) == 0
    assert "overrefusal" in capsys.readouterr().out


def test_the_checkpoints_of_a_run_are_measured_and_drawn_over_its_updates(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    for number in (10, 4):
        adapter(run / f"checkpoint-{number}", number)
    random_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--checkpoints", str(run), "--suite", "overrefusal", "collapse",
               "--limit", "4", "--max-new-tokens", "4", "--output", str(tmp_path / "out")]  # fmt: skip
    assert evaluate_command(command) == 0
    (found,) = read_run(tmp_path / "out")
    assert isinstance(found, EvaluationRun)
    assert found.subjects == ["base", "step 4", "step 10"]
    (made,) = over_steps(found)
    lines = {line.get_label(): line.get_xydata().tolist() for line in made.axes[0].lines}
    distinct = {row.subject: row.value for row in found.rows if row.metric == "distinct answers"}
    expected = [distinct[name] for name in found.subjects]
    assert lines["distinct answers"] == [list(point) for point in zip((0, 4, 10), expected, strict=True)]
    shares = {"benign": (0.1, 30), "benign (plain)": (0.1, 20), "benign (alarming)": (0.1, 10), "x (benign)": (0.4, 30)}
    found.rows = [Row(name, "overrefusal", where, "not done", value, n=n)
                  for name in found.subjects for where, (value, n) in shares.items()]  # fmt: skip
    (made,) = over_steps(found)
    drawn = [value for line in made.axes[0].lines for value in line.get_ydata()]
    assert drawn == pytest.approx([0.25] * 3), "each request once, not in the whole set and in its part"
    capsys.readouterr()
    with pytest.raises(EvaluationError, match="has no checkpoint with an adapter"):
        evaluate_command(["--checkpoints", str(tmp_path / "model")])


@pytest.mark.parametrize(("former", "now"), [("--epsilon", "--curve-epsilon"), ("--sites", "--attack-sites")])
def test_an_option_by_its_former_name_is_answered_with_the_new_one(former: str, now: str) -> None:
    with pytest.raises(ValueError, match=f"{former} is called {now} now"):
        evaluate_command([former, "1"])


def test_a_limit_bounds_every_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lpa.commands import time_left
    from lpa.evaluation.suites.traits import Traits

    seen: list[Any] = []

    def stop(*args: Any, settings: Any, **kwargs: Any) -> None:
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("lpa.evaluation.evaluate", stop)
    for words in ([], ["--limit", "3"], ["--limit", "3", "--utility-limit", "9"], ["--limit", "0"]):
        with pytest.raises(ValueError, match="enough"):
            evaluate_command(["--model", "none", *words])
    limits = [(s.limit, s.benign_limit, s.trait_limit, s.utility_limit, s.ladder_limit) for s in seen]
    assert limits == [(100, 300, None, 200, 20), (3, 3, 3, 3, 3), (3, 3, 3, 9, 3), (None, None, None, None, 20)]
    asked = Traits().data(seen[1])
    assert {found["rows"] for found in asked.values()} == {3}
    assert time_left(30.0, 10, 20) == ", about 1:00 left"
    assert time_left(30.0, 0, 20) == time_left(30.0, 20, 0) == ""
