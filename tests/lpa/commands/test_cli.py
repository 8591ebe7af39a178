"""The command lpa: quick help, a whole run on a tiny model, stopping, resuming, and what bad use says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lpa import run_folder
from lpa.cli import main
from lpa.commands.options import TrainOptions, read_yaml
from lpa.commands.train import _measure
from lpa.config import RENAMED
from lpa.data import PLAIN_PROMPT, benign_requests
from lpa.data.tables import UnavailableError
from lpa.presets import PRESETS
from tests.support.tiny import saved_tiny, tiny_model, tiny_tokenizer

SMALL = ["--lpa_steps", "2", "--attack_steps", "2", "--defence_steps", "2", "--per_device_train_batch_size", "2",
         "--gradient_accumulation_steps", "1", "--lora_r", "4", "--use_cpu", "--measure_attacked", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> str:
    return saved_tiny(tmp_path_factory.mktemp("model") / "tiny")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def test_help_is_quick() -> None:
    code = (
        "import sys; from lpa.cli import main; main(['--help']); assert 'torch' not in sys.modules, 'torch is loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("train", "traits", "assets"))


def test_a_run_writes_adapter_record_and_card(model: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert train("--model", model, "--output", str(output), "--kl-coef", "0.1", *SMALL) == 0
    shown = capsys.readouterr().out
    assert "disagrees with undesirable statements" in shown
    assert shown.index("measuring before training ...") < shown.index("measuring after training ...")
    record = json.loads((output / "metrics.json").read_text())
    assert [step["lpa_step"] for step in record["steps"]] == [1, 2]
    assert record["settings"]["kl_coef"] == 0.1
    assert record["settings"]["seed"] == 42
    assert record["data"]["rows"] == 64
    assert len(record["data"]["sha256"]) == 64
    assert record["before"].keys() == record["after"].keys()
    card = (output / "README.md").read_text()
    assert record["command"] in card
    assert record["data"]["sha256"] in card
    assert record["versions"]["transformers"] in card

    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny_model(len(tiny_tokenizer())), str(output))
    weights = load_file(output / "adapter_model.safetensors")
    trained = [w for name, w in weights.items() if "lora_B" in name]
    assert trained
    assert all(float(w.abs().max()) > 0 for w in trained)
    assert sum("lora_B" in name for name, _ in loaded.named_parameters()) == len(trained)
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == model
    assert not list(output.glob("*.bin"))


def test_an_earlier_run_is_kept_unless_overwrite_is_given(model: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "checkpoint-5").mkdir()
    before = contents(tmp_path)
    assert train("--model", model, "--output", str(tmp_path), *SMALL) == 2
    assert "is not empty; use --resume" in capsys.readouterr().err
    assert train("--model", model, "--output", str(tmp_path), "--overwrite", *SMALL) == 2
    assert "holds no run (there is no settings.yaml) but other files" in capsys.readouterr().err
    assert contents(tmp_path) == before
    (tmp_path / "settings.yaml").write_text("lpa_steps: 1")
    (tmp_path / "config.json").write_text("{}")  # of a fully trained model
    before = contents(tmp_path)
    for wrong in (
        ["--data", "gone.csv"],
        ["--attack_epsilon", "-1"],
        ["--attack_sites", "mlp:99"],
        ["--model", str(tmp_path)],
    ):
        assert train("--model", model, "--output", str(tmp_path), "--overwrite", *SMALL, *wrong) == 2
        assert contents(tmp_path) == before, wrong
    assert train("--model", model, "--output", str(tmp_path), "--overwrite", "--no_measure", *SMALL) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"]
    assert not (tmp_path / "checkpoint-5").exists()
    assert not (tmp_path / "config.json").exists()


def test_a_folder_that_a_run_writes_to_is_not_written_to_by_another(model: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--model", model, "--output", str(tmp_path / "out"), "--no_measure", *SMALL]
    with run_folder.held(tmp_path / "out"):
        for more in ([], ["--overwrite"]):
            assert train(*arguments, *more) == 2
            assert "out is in use: another process writes to it" in capsys.readouterr().err
            assert [path.name for path in (tmp_path / "out").iterdir()] == [run_folder.LOCK]
    assert train(*arguments) == 0
    assert train(*arguments, "--overwrite") == 0  # the lock went with the run


def test_yaml_settings_and_flags_over_them(model: str, tmp_path: Path) -> None:
    file, output = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"model: {model}\nlpa_steps: 1\nlearning_rate: 1e-3\nattack_sites: [embedding]\nmeasure: false\n")
    small = [word for word in SMALL if word not in ("--lpa_steps",)][1:]
    assert train("--config", str(file), "--output", str(output), "--learning_rate", "2e-3", *small) == 0
    record = json.loads((output / "metrics.json").read_text())
    assert record["settings"]["learning_rate"] == 2e-3
    assert record["settings"]["lpa_steps"] == 1
    assert record["sites"] == ["embedding"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.csv"], "none.csv cannot be read"),
        (["--benign", "none.csv"], "the benign data set is not used"),
        (["--benign", "none.csv", "--kl_coef", "1"], "none.csv cannot be read"),
        (["--canary_set", "none.csv", "--canary_steps", "1"], "canary_set='none.csv' is unavailable: there is no file"),
        (["--attack_adversary", "vector", "--attack_direction", "none.safetensors"], "none.safetensors"),
        (["--attack_adversary", "vector", "--attack_direction", "none.csv", "benign"], "the set 'none.csv' is unav"),
        (["--attack_sites", "embedding", "mlp:99"], "site 'mlp:99' is out of range: the model has layers 0 to"),
        (["--lora_targets", "nothing"], "has no modules nothing"),
        (["--max_length", "100000"], "max_length=100000 is above the model's context"),
    ],
)
def test_what_needs_no_weights_is_checked_before_they_are_loaded(
    model: str, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("the model is loaded")
    )
    assert train("--model", model, *SMALL, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_adapter_is_named_before_a_model_is_loaded(model: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("the model is loaded")
    )
    monkeypatch.setattr("lpa.evaluation.session.load_set", lambda *_, **__: pytest.fail("a set is loaded"))
    for command in (["evaluate"], ["chat"], ["export", "--merge", "--output", "none"]):
        assert main([*command, "--model", model, "--adapter", f"{model}-none"]) == 2
        assert f"the adapter {model}-none cannot be read" in capsys.readouterr().err
        assert main([*command, "--model", model, "--adapter", model]) == 2
        assert "it is a whole model: evaluate it with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limit", "-1"], "--limit=-1 must be at least 1, or 0 for all"),
        (["--benign_limit", "-1"], "--benign-limit=-1 must be at least 1, or 0 for all"),
        (["--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["--curve-epsilon", "1", "0"], "--curve-epsilon=(1.0, 0.0) must be above 0"),
        (["--curve-steps", "0"], "--curve-steps=(0,) must be at least 1"),
        (["--attack", "odd"], "--attack ['odd'] are unknown"),
        (["--set-filter", "odd"], "--set-filter='odd' must be column=value"),
        (["--ladder", "suffix"], "--ladder is read by the suite ladder, which is not among traits, harm, attacks"),
        (["--suite", "harm", "--attack-sites", "mlp:0"], "--attack-sites is read by the suite traits or attacks"),
    ],
)
def test_wrong_settings_are_named_by_their_options(words: list[str], told: str, capsys: Any) -> None:
    assert main(["evaluate", *words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {told}")
    assert "usage:" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "--config none.yaml cannot be read"),
        (["--resume"], "--resume needs --output"),
        (["--resume", "--output", "nowhere"], "nowhere holds no run"),
        (["--kl", "other"], "kl='other' is unknown"),
        (["--measure_attacked", "-1"], "measure_attacked=-1 must be 0"),
        (["--attack_norm", "l7"], "attack_norm='l7' is unknown"),
    ],
)
def test_bad_use_gives_one_line(
    model: str, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("--model", model, *SMALL, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_unknown_names_are_matched(model: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        train("--lpa_stepz", "3")
    assert stop.value.code == 2
    assert "unknown option --lpa_stepz; did you mean 'lpa_steps'?" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text("attack_epsilom: 3")
    assert train("--config", str(file)) == 2
    assert "unknown key 'attack_epsilom'; did you mean 'attack_epsilon'?" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_run_keeps_the_date_that_its_prompts_print(tmp_path: Path, monkeypatch: Any) -> None:
    from lpa.data import rendering
    from lpa.training import prepare

    folder = Path(saved_tiny(tmp_path / "tiny"))
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }} " + template.read_text())
    dates, output = [], tmp_path / "out"
    encode = prepare.encode_pairs
    monkeypatch.setattr(prepare, "encode_pairs", lambda *data, **how: dates.append(how["date"]) or encode(*data, **how))
    new = ["--model", str(folder), "--no_measure", *SMALL]
    for day, more in (("2026-03-09", new), ("2026-03-10", ["--resume"]), ("2026-03-11", [*new, "--overwrite"])):
        monkeypatch.setattr(rendering, "today", lambda day=day: day)
        assert train("--output", str(output), *more) == 0
        kept = json.loads((output / "metrics.json").read_text())["settings"]["chat_template_date"]
        assert kept == dates[-1]
    assert dates == ["2026-03-09", "2026-03-09", "2026-03-11"]


def test_a_finished_run_without_a_checkpoint_is_not_resumed(
    model: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from lpa.commands import train as command

    output = tmp_path / "out"
    args = ["--output", str(output), "--no_measure", "--save_strategy", "no"]
    assert train("--model", model, *args, *SMALL) == 0
    monkeypatch.setattr(command, "_before", lambda *_: pytest.fail("it measures"))
    before = contents(output)
    assert train("--resume", "--output", str(output)) == 2
    assert "has no good checkpoint to go on from" in " ".join(capsys.readouterr().err.split())
    assert contents(output) == before


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_downloads_are_as_they_were(shown: bool, monkeypatch: Any) -> None:
    from lpa.commands import quiet_loading

    bars = [shown]
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: not bars[-1])
    monkeypatch.setattr("huggingface_hub.utils.enable_progress_bars", lambda: bars.append(True))
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: bars.append(False))
    quiet_loading()
    assert bars[-1] == shown


def test_the_templates_variables_are_given_in_json(model: str, tmp_path: Path, capsys: Any) -> None:
    args = ["--model", model, "--output", str(tmp_path / "out"), "--no_measure", *SMALL]
    assert train(*args, "--chat_template_kwargs", '{"thinking_mode": "off"}') == 2
    assert "'thinking_mode' has no effect, the chat template does not read it" in capsys.readouterr().err
    assert train(*args, "--chat_template_kwargs", "thinking_mode=off") == 2
    assert "chat_template_kwargs='thinking_mode=off' is not JSON" in capsys.readouterr().err
    for command in (["traits", "--preview"], ["chat", "--prompt", "I agree"]):
        status = main([*command, "--model", model, "--chat-template-kwargs", '{"thinking_mode": "off"}'])
        shown = capsys.readouterr()
        assert "'thinking_mode' has no effect" in " ".join((shown.err + shown.out).split()), status


def test_data_of_ones_own(model: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,rejected,chosen\nI agree,yes,no\nI do not agree,no,yes\n")
    assert train("--model", model, "--data", str(file), "--output", str(tmp_path / "out"), "--no_measure", *SMALL) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["data"]["rows"] == 2
    file.write_text("prompt,rejected\nI agree,yes\n")
    assert train("--model", model, "--data", str(file), "--output", str(tmp_path / "two"), *SMALL) == 2
    assert "no column chosen" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attack_steps: 2.5", "sets attack_steps to 2.5: invalid literal for int"),
        ("attack_epsilon: true", "sets attack_epsilon to True: could not convert"),
        ("attack_sites: []", "sets attack_sites to []; name at least one"),
        ("dtype: bf16", "sets dtype to 'bf16'; use one of auto, float32"),
        ("resume: true", "sets resume, which belongs on the command line"),
        ("overwrite: true", "sets overwrite, which belongs on the command line"),
        ("attack_epsilon:", "sets attack_epsilon to nothing; leave it out"),
        ("epsilon: 2.0", "sets 'epsilon', which is called 'attack_epsilon' now"),
        ("learning_rate: [1, 2]", "sets learning_rate to [1, 2], a list; it takes one value"),
        ("save_strategy: sometimes", "sets save_strategy to 'sometimes'"),
    ],
)
def test_yaml_is_checked_like_the_command_line(tmp_path: Path, capsys: Any, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with contextlib.suppress(SystemExit):
        assert train("--config", str(file)) == 2
    assert message in capsys.readouterr().err


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lpa-steps: 3\nlearning_rate: 1e-4\n")
    names = ["lpa_steps", "learning_rate"]
    assert read_yaml(file, names) == {"lpa_steps": 3, "learning_rate": "1e-4"}
    for text, message in (
        ("lpa_stepz: 3", "unknown key 'lpa_stepz'; did you mean 'lpa_steps'"),
        ("qqqqqq: 3", "unknown key 'qqqqqq'$"),
        ("- 3", "holds a list; it must be a mapping"),
        ("a: [", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(file, names)
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml", [])
    file.write_text("epsilon: 2.0")
    with pytest.raises(ValueError, match="'epsilon', which is called 'attack_epsilon' now"):
        read_yaml(file, ["attack_epsilon"])
    assert read_yaml(file, ["attack_epsilon"], RENAMED) == {"attack_epsilon": 2.0}  # of an older run


def test_yaml_of_every_kind_is_read_as_words_would_be(tmp_path: Path) -> None:
    from lpa.commands.options import parsed, parser

    file = tmp_path / "run.yaml"
    file.write_text("attack-sites: embedding\nlora_targets: [q_proj, v_proj]\nsave_strategy: no\nmeasure: false\n"
                    "learning_rate: 1e-3\noptim_args: a=-1\nlr_scheduler_kwargs: {min_lr: 0}\n")  # fmt: skip
    wanted = {"attack_sites": ["embedding"], "lora_targets": ["q_proj", "v_proj"], "save_strategy": "no",
              "measure": False, "learning_rate": 1e-3, "optim_args": "a=-1",
              "lr_scheduler_kwargs": '{"min_lr": 0}'}  # fmt: skip
    for more, name, value in ((), "learning_rate", 1e-3), (("--learning_rate", "2"), "learning_rate", 2.0):
        values, _ = parsed(parser("lpa train", ""), ["--config", str(file), *more])
        assert {key: getattr(values[key], "value", values[key]) for key in wanted} == wanted | {name: value}


def test_a_preset_goes_under_everything_else(tmp_path: Path, monkeypatch: Any) -> None:
    from lpa.commands import train as command
    from lpa.commands.options import asked
    from lpa.run_folder import keep_settings

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "_train", lambda values, *rest: seen.append(values) or 0)
    names = ("lpa_steps", "gradient_accumulation_steps", "attack_merge_adapters", "measure_attacked", "benign")
    demo, quick, own = (60, 1, False, 8, "own"), (8, 1, True, 4, "own"), (30, 4, False, 12, None)
    config, run = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text("lpa_steps: 3\n")
    cases: list[tuple[list[str], tuple[Any, ...]]] = [
        ([], demo),
        (["--preset", "none"], own),
        (["--model", "smollm2-135m-instruct"], own),  # defaults do not change with the model that is named
        (["--model", "other", "--preset", "quick"], quick),
        (["--lpa_steps", "30", "--measure_attacked", "12"], (30, 1, False, 12, "own")),
        (["--config", str(config)], (3, 1, False, 8, "own")),
        (["--config", str(config), "--lpa_steps", "5"], (5, 1, False, 8, "own")),
        (
            ["--preset", "quick", "--no_lora", "--kl_coef", "0"],
            (8, 1, False, 4, None),
        ),  # nothing to merge, and no term that takes benign text
        (["--preset", "quick", "--load_in_4bit", "--benign", "own"], (8, 1, False, 4, "own")),
    ]
    for words, _ in cases:
        assert train(*words) == 0
    assert [tuple(values[name] for name in names) for values in seen] == [wanted for _, wanted in cases]
    keep_settings(run, asked(seen[0]), ["lpa train"])
    for words in (["--resume", "--output", str(run)], ["--config", str(run / "settings.yaml")]):
        assert train(*words) == 0
        assert tuple(seen[-1][name] for name in names) == demo
    (run / "settings.yaml").write_text("steps: 3\nmeasure_attacked: 5\n")  # as an earlier release called it
    assert train("--resume", "--output", str(run)) == 0
    assert (seen[-1]["attack_steps"], seen[-1]["lpa_steps"], seen[-1]["measure_attacked"]) == (3, 30, 5)


def test_every_preset_makes_settings_and_they_are_its_own(tmp_path: Path) -> None:
    from lpa import LPAConfig
    from lpa.commands.options import parsed, parser

    for name, preset in PRESETS.items():
        values, _ = parsed(parser("lpa train", ""), ["--preset", name, "--output", str(tmp_path)])
        assert {key: values[key] for key in preset} == preset, name
        own = {key: value for key, value in preset.items() if key in LPAConfig.__annotations__}
        config = LPAConfig(str(tmp_path), use_cpu=True, **own)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if name == "published-2607":
            assert (config.lpa_steps, batch, config.coefs) == (30, 16, {"toward": 0.5, "away": 0.5})
        if name == "published-2605":
            assert (batch, config.kl) == (1, "public")
            assert 7 <= config.lpa_steps <= 20
            assert config.coefs == pytest.approx({"toward": 0.5 / 1.1, "away": 0.5 / 1.1, "kl": 0.1 / 1.1})
        if name == "toward-only":
            assert config.attack_coefs == {"toward": 1.0}
            assert config.coefs["toward"] == config.coefs["away"]


def test_help_has_groups_and_leaves_the_inherited_out(capsys: Any) -> None:
    for flag, inherited in (("--help", False), ("-h", False), ("--help-all", True)):
        with pytest.raises(SystemExit) as end:
            train(flag)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.index("the attack:") < text.index("--attack_epsilon") < text.index("canaries:")
        assert ("--adam_beta1" in text) == inherited


@pytest.mark.parametrize("name", ["steps", "epsilon", "merge_adapters"])
def test_a_former_name_is_answered_with_the_new_one(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train(f"--{name}", "3")
    assert f"--{name} is called --attack_{name} now" in capsys.readouterr().err


def test_benign_data_are_recorded(model: str, tmp_path: Path) -> None:
    file, output = tmp_path / "benign.csv", tmp_path / "out"
    file.write_text("prompt,response\nI agree,yes\nI do not agree,no\n")
    assert train("--model", model, "--benign", str(file), "--sft_coef", "0.5", "--optim", "sgd", "--no_measure",
                 "--output", str(output), *SMALL, "--lpa_steps", "1") == 0  # fmt: skip
    record = json.loads((output / "metrics.json").read_text())
    assert record["benign"]["source"] == str(file)
    assert record["benign"]["rows"] == 2
    assert record["benign"]["sha256"] in (output / "README.md").read_text()
    assert record["settings"]["optim"] == "sgd"


def test_the_models_own_answers_are_benign_data_of_one_kind(model: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert train("--model", model, "--preset", "demo", "--no_measure", "--data", "both",
                 "--output", str(output), *SMALL, "--lpa_steps", "1", "--learning_rate", "1e-5") == 0  # fmt: skip
    preset, loaded, answers, *rest = capsys.readouterr().out.splitlines()
    assert preset.startswith("preset demo: data both, lpa_steps 1, per_device_train_batch_size 2, ")
    assert "learning_rate 1e-05, lr_scheduler_type cosine, " in preset
    assert "kl_coef 2.0, benign_every 2, benign own, " in preset
    assert loaded.startswith(f"{model}: ")
    assert answers == f"the model answers benign requests: 0/{len(benign_requests())}"
    assert "weights are trained" in " ".join(rest)
    assert "| before |" not in (output / "README.md").read_text(), "nothing was measured"
    record = json.loads((output / "metrics.json").read_text())
    assert record["benign"]["source"] == "its own answers to the shipped benign requests"
    assert 0 < record["benign"]["rows"] <= len(benign_requests())
    assert record["data"]["source"] == "the shipped undesirable and desirable statements"
    assert record["settings"]["benign_system_prompt"] == PLAIN_PROMPT, "they are asked for as they are answered"
    assert record["steps"][0]["defence_kl"] < 1e-6 < record["steps"][0]["defence_toward"], "one update from the base"


def test_without_a_benign_term_the_demo_takes_no_benign_data(monkeypatch: Any) -> None:
    from lpa.commands import train as command

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "_train", lambda values, *rest: seen.append(values) or 0)
    assert train() == train("--kl_coef", "0") == train("--kl_coef", "0", "--benign", "mine.csv") == 0
    assert [values["benign"] for values in seen] == ["own", None, "mine.csv"], "what is asked for is told of"
    assert PRESETS["demo"]["system_prompt"] == PLAIN_PROMPT


def test_ranks_agree_on_the_folder(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda given: ["runs/of-rank-0"])
    assert train("--model", model, "--no_measure", *SMALL, "--lpa_steps", "1") == 0
    assert (tmp_path / "runs/of-rank-0/metrics.json").is_file()
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["of-rank-0"]


def test_sigterm_saves_and_a_resumed_run_ends_like_an_uninterrupted_one(
    model: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from lpa.training.step import LPAStep

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--model", model, *SMALL, "--lpa_steps", "3", "--no_measure", "--save_total_limit", "1"]
    attack = LPAStep.attack

    def interrupted(self: Any, *arguments: Any) -> None:
        if self.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        attack(self, *arguments)

    monkeypatch.setattr(LPAStep, "attack", interrupted)
    assert train("--output", str(parts), *more) == 128 + signal.SIGTERM
    monkeypatch.setattr(LPAStep, "attack", attack)
    out = capsys.readouterr().out
    assert "stopped after 1 LPA steps" in out
    assert "go on with: lpa train --resume" in out
    assert not (parts / "metrics.json").exists()
    assert train("--resume", "--output", str(parts)) == 0
    assert "going on from" in capsys.readouterr().out
    assert train("--output", str(whole), *more) == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    record = json.loads((parts / "metrics.json").read_text())
    assert record["command"].startswith(f"lpa train --output {parts} --model")  # not that of the resumption
    steps = [sum(step[f"seconds_{phase}"] for phase in ("attack", "defence", "other")) for step in record["steps"]]
    assert len(steps) == 3
    assert record["seconds"] > sum(steps)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (ImportError("no module named gguf"), "error: no module named gguf", 1),
        (KeyError("rows"), "error: KeyError: 'rows' (this may be a bug of lpa)", 1),
        (TypeError("a float is no int"), "error: TypeError: a float is no int (this may be a bug of lpa)", 1),
        (ValueError("epsilon=-1 must be above 0"), "error: epsilon=-1 must be above 0", 2),
        (UnavailableError("no network"), "error: no network", 1),
    ],
)
def test_errors_give_one_line(monkeypatch: Any, capsys: Any, error: Exception, message: str, status: int) -> None:
    def fail(arguments: Any) -> int:
        raise error

    monkeypatch.setattr("lpa.commands.traits.run", fail)
    assert main(["traits"]) == status
    assert capsys.readouterr().err.startswith(message)
    monkeypatch.setenv("LPA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["traits"])


def test_fetch_takes_the_embedded_model_alone_by_default(monkeypatch: Any, capsys: Any) -> None:
    from lpa import assets

    fetched: list[str] = []
    monkeypatch.setattr(assets, "fetch", lambda name, force=False: fetched.append(name))
    assert main(["assets", "fetch"]) == 0
    assert fetched == ["smollm2-135m-instruct"]
    assert main(["assets", "fetch", "--all"]) == 0
    assert fetched[1:] == list(assets.ASSETS)


def test_traits_and_assets(model: str, capsys: Any) -> None:
    assert main(["traits", "--kind", "desirable", "--split", "heldout"]) == 0
    assert "desirable" in capsys.readouterr().out
    assert main(["traits", "--preview", "--model", model, "--rows", "1"]) == 0
    assert "attacked" in capsys.readouterr().out
    assert main(["assets"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out
    assert main(["assets", "verify", "nothing"]) == 2
    assert "no asset is called 'nothing'" in capsys.readouterr().err


def test_every_command_takes_underscores(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "--max_new_tokens=x_y"])
    assert "argument --max-new-tokens: invalid int value: 'x_y'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--dtype", "float8"])
    assert "argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err


def test_a_model_that_cannot_be_planned_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", "--model", str(tmp_path / "none"), "--use_cpu"]) == 2
    assert f"the configuration of '{tmp_path / 'none'}' cannot be read" in capsys.readouterr().err


def test_a_yaml_names_the_output_folder_too(model: str, tmp_path: Path) -> None:
    file, output = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"output: {output}\nmodel: {model}\n")
    assert train("--config", str(file), "--no_measure", *SMALL) == 0
    assert (output / "metrics.json").is_file()
    assert "output" not in (output / "settings.yaml").read_text().partition("\n")[2]


def test_a_run_resumed_with_other_settings_records_those_in_force(model: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert train("--model", model, "--no_measure", "--output", str(output), *SMALL, "--lpa_steps", "1") == 0
    again = ["--resume", "--output", str(output)]
    assert train(*again, "--attack_epsilon", "2") == 2
    assert "was made with attack_epsilon=6.0, now 2.0" in capsys.readouterr().err
    assert "attack_epsilon" not in (output / "settings.yaml").read_text(), "what was refused is not in force"
    assert train(*again, "--lpa_steps", "2", "--save_total_limit", "5") == 0
    record, card = json.loads((output / "metrics.json").read_text()), (output / "README.md").read_text()
    assert (record["settings"]["lpa_steps"], record["settings"]["save_total_limit"]) == (2, 5)
    assert record["command"].endswith("--lpa_steps 1")
    assert [command.rpartition("--output")[0] for command in record["resumed"]] == ["lpa train --resume "]
    assert record["resumed"][0] in card
    assert record["command"] in card
    text = (output / "settings.yaml").read_text()
    assert "lpa_steps: 2" in text
    assert text.count("# ") == 2


def test_statements_of_a_file_that_is_trained_on_are_left_out_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("lpa.evaluation.measure.measure", lambda *own, **options: seen.update(options))
    rest = dict.fromkeys(("model", "processing_class", "args", "pgd"))
    trainer = SimpleNamespace(is_world_process_zero=lambda: False, train_dataset={"prompt": ["I lie."]}, **rest)
    _measure(trainer, TrainOptions(data="own.csv"), "before")
    assert seen["trained_on"] == ["I lie."]
