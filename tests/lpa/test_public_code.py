"""A lat_config.json of the public LPA code, and its names on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpa.cli import main
from lpa.commands.options import parsed, parser, read_yaml
from lpa.config import LPAConfig
from lpa.public_code import NAMES, translated

FILE = {
    "pgd_iterations_per_step": 8, "model_iterations_per_step": 2, "num_steps": 20, "max_batch_per_acc": 2,
    "l2_regularization": 0, "reinitialize_dev_optim": True, "N_checkpoints": 10, "pgd_layers": ["embedding", 8, 16],
    "adv_loss_coefs": {"toward": 0.4, "away": 0.6}, "def_loss_coefs": {"kl": 0.1, "toward": 0.5, "away": 0.5},
}  # fmt: skip


def test_its_file_becomes_our_settings(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "lat_config.json"
    path.write_text(json.dumps(FILE))
    values, _ = parsed(parser("lpa train", ""), ["--config", str(path), "--model", "none"])
    config = LPAConfig(**{name: values[name] for name in LPAConfig.__annotations__} | {"output_dir": str(tmp_path)})
    assert (config.attack_steps, config.defence_steps, config.lpa_steps) == (8, 2, 20)
    assert config.attack_sites == ["embedding", "mlp:8", "mlp:16"]
    assert config.attack_coefs == {"toward": 0.4, "away": 0.6}
    assert config.coefs == pytest.approx({"toward": 0.5 / 1.1, "away": 0.5 / 1.1, "kl": 0.1 / 1.1})
    assert (config.kl, config.normaliser, config.reset_optimizer) == ("public", "micro", True)
    assert config.benign_eos
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert config.save_steps == 4, "every tenth of 40 updates"
    assert "is of the public LPA code; it is read as attack_steps 8, " in caplog.text


def test_options_without_a_counterpart_are_named(tmp_path: Path) -> None:
    for odd in ({"l2_regularization": 0.1}, {"time_limit": 5}):
        with pytest.raises(ValueError, match=rf"its {next(iter(odd))}=.* has no counterpart here; leave it out"):
            translated(FILE | odd, "lat_config.json")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"max_batch_per_acc": 2, "batch_size": 1}, (1, 1)), ({"batch_size": 12}, (12, 1)),
     ({"max_batch_per_acc": None}, (16, 1)), ({"max_batch_per_acc": 3}, (2, 8)),
     ({"max_batch_per_acc": 4, "batch_size": 18}, (3, 6))],
)  # fmt: skip
def test_a_batch_keeps_its_size_in_equal_micro_batches(sizes: dict[str, Any], expected: tuple[int, int]) -> None:
    found = translated({"num_steps": 1} | sizes, "lat_config.json")
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == expected


def test_a_batch_size_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch_size=-1, max_batch_per_acc=2 must be whole numbers above 0"):
        translated({"batch_size": -1, "max_batch_per_acc": 2}, "lat_config.json")


def test_every_name_is_a_setting_of_ours_and_in_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text(encoding="utf-8")
    section = page.partition("## The public LPA code")[2].partition("\n## ")[0]
    ours = vars(parser("lpa train", "").parse_args([]))
    for name, what in NAMES.items():
        assert f"`{name}" in section or f"`--{name}`" in section, name
        if isinstance(what, str):
            assert what in ours, name
            assert f"`{what}`" in section or name.startswith(("adv_", "def_")), what


@pytest.mark.parametrize(
    ("option", "told"),
    [("--num_steps", "--lpa_steps"), ("--pgd_layers", "--attack_sites"), ("--def_sft", "--sft_coef"),
     ("--adv_loss_coefs", "--attack_toward_coef, --attack_away_coef"), ("--system_prompt_path", "--system_prompt")],
)  # fmt: skip
def test_its_options_are_answered_with_ours(option: str, told: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--model", "none", option, "1"])
    assert f"{option} is an option of the public LPA code; here it is {told}\n" in capsys.readouterr().err


def test_our_own_yaml_is_not_read_as_the_public_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lpa_steps: 3\n")
    assert read_yaml(path, ["lpa_steps"]) == {"lpa_steps": 3}
