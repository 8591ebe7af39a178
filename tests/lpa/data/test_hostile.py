"""Nothing that comes from outside runs: not from data cells, nor checkpoints, adapters or model folders."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from rich.console import Console

from lpa import models
from lpa.data import ASSESSMENT_PROMPT, DataError, encode_pairs, load_pairs, preview
from lpa.evaluation.subjects import EvaluationError, Subjects
from tests.support.hostile import PLAIN, cells, check_cells
from tests.support.tiny import tiny_model
from tests.support.trainers import TOKENIZER, trainer_of


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=cells, rejected=cells, chosen=cells)
def test_no_cell_ends_its_turn_or_changes_the_template(prompt: str, rejected: str, chosen: str) -> None:
    check_cells(prompt, rejected, chosen)


def test_template_language_in_a_cell_is_text() -> None:
    (tokens, *_), _ = PLAIN.row("{{ messages }} {{ 7 * 7 }}", ("I agree",))
    (other, *_), _ = PLAIN.row("{ messages } 7 * 7", ("I agree",))
    assert len(tokens) >= len(other)
    assert "49" not in TOKENIZER.decode(tokens)
    assert TOKENIZER.decode(tokens).count(ASSESSMENT_PROMPT.split()[0]) == 1


def test_files_of_odd_cells_are_read_as_text_or_refused_by_name(tmp_path: Path) -> None:
    formula = tmp_path / "formula.csv"
    formula.write_text('prompt,rejected,chosen\n"=HYPERLINK(""x"")",+1,@SUM(1)\n"a\x00b",c,d\n', encoding="utf-8")
    rows = load_pairs(formula)
    assert rows["prompt"] == ['=HYPERLINK("x")', "a\x00b"]
    assert rows["rejected"][0] == "+1"
    assert len(encode_pairs(rows, TOKENIZER)) == 2
    half = tmp_path / "half.jsonl"
    half.write_text('{"prompt": "a \\ud800", "rejected": "b", "chosen": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"half.jsonl row 1 \(prompt\): half a character"):
        load_pairs(half)
    with pytest.raises(DataError, match="row 7: half a character"):
        PLAIN.row("a \udfff", ("b",), "row 7")
    huge = tmp_path / "huge.csv"
    huge.write_text(f"prompt,rejected,chosen\n{'x' * 200_000},b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"huge.csv cannot be read: field larger than field limit"):
        load_pairs(huge)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "I agree " * 100_000, "rejected": "b", "chosen": "c"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"long.jsonl row 1: prompt and completion have 2000\d\d tokens"):
        encode_pairs(load_pairs(long), TOKENIZER, max_length=128)


def test_a_preview_does_not_steer_the_terminal() -> None:
    out = io.StringIO()
    text = "\x1b[2J \x07 agree"

    class Spelling:
        """Decodes every token of the prompt as the hostile text."""

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return TOKENIZER(*args, **kwargs)

        def decode(self, tokens: Any) -> str:
            return text

    row = {"prompt": "I agree", "rejected": "I agree", "chosen": "no"}
    preview(Spelling(), [row], console=Console(file=out, force_terminal=True, color_system=None, width=200))
    assert r"\x1b[2J" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\x07" not in out.getvalue()


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "lpa_steps": 1, "reset_optimizer": False}
    trainer_of(tmp_path / "run", **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    monkeypatch.setattr("lpa.training.durable.checked", lambda path: path)  # else damage ends the run before it loads
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        torch.save({"state": Touch(tmp_path / "owned")}, checkpoint / name)
        with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
            trainer_of(tmp_path / "run", **options | {"lpa_steps": 2}).train(resume_from_checkpoint=str(checkpoint))
        assert not (tmp_path / "owned").exists(), name
        (checkpoint / name).write_bytes(whole)


def test_runs_write_safetensors_and_adapters_of_pickles_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", save_strategy="steps", lpa_steps=1)
    trainer.train()
    trainer.save_model()
    held = {p.name for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert held <= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tmp_path / "run" / "adapter_config.json", pickled)
    torch.save({"a": Touch(tmp_path / "owned")}, pickled / "adapter_model.bin")
    with pytest.raises(EvaluationError, match=r"holds no adapter_model.safetensors; adapters in pickles"):
        Subjects(tiny_model(len(TOKENIZER)), {"pickled": str(pickled)})
    assert not (tmp_path / "owned").exists()


def test_a_models_own_code_runs_only_when_asked(tmp_path: Path) -> None:
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    with pytest.raises(models.ModelError, match="cannot load"):
        models.load(tmp_path)
    assert not (tmp_path / "owned").exists()
