"""`evaluate` from end to end on tiny models: what it says of collapsed ones, of bad input, and after a stop."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import lpa.evaluation.session as session
import lpa.evaluation.subjects as subjects
from lpa import run_folder
from lpa.data import DISAGREE, rendering
from lpa.evaluation import Evaluation, EvaluationError, evaluate
from lpa.evaluation.bench import Bench
from lpa.evaluation.records import RECORDS, TEXTS
from lpa.evaluation.stats import wilson
from lpa.evaluation.suites import ATTACKS, utility
from lpa.evaluation.suites.attacks import TEMPLATES
from lpa.evaluation.suites.base import FIXED
from lpa.evaluation.suites.traits import random_twin
from lpa_kernels.attack import LatentPGD, PairBatch

from ...support.speakers import STAND_INS, adapter, random_model, speaker, tokenizer


@pytest.fixture
def harmful(tmp_path: Path) -> str:
    """A file of harmless prompts in the place of a harmful set."""
    path = tmp_path / "standins.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in STAND_INS), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _no_assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # nothing may be fetched: the cache is empty and there is no pip
    monkeypatch.setenv("LPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(model: Any, harmful: str, **options: Any) -> Evaluation:
    chosen = {"sets": (harmful,), "limit": 8, "max_new_tokens": 10, "suites": ["harm"]} | options
    if "attacks" in chosen["suites"]:
        chosen.setdefault("attacks", ("direct",))
    return evaluate(model, tokenizer=tokenizer(), device="cpu", **chosen)


def stand_in_of_vllm(
    monkeypatch: pytest.MonkeyPatch, said: dict[str | None, list[int]], context: int = 512
) -> dict[str, Any]:
    """Put the shape of vLLM's offline interface (0.32) in its place. Of each adapter it says `said`.

    Returns:
        what was asked of it: options, adapters, prompts a call, times closed. It raises "refused" for an adapter.
    """
    made: dict[str, Any] = {"options": [], "adapters": [], "prompts": [], "closed": 0}

    class LLM:
        def __init__(self, **options: Any) -> None:
            made["options"].append(options)
            assert options["skip_tokenizer_init"]
            assert options["max_model_len"] == -1
            assert options["kv_cache_memory_bytes"] == 2**31
            self.llm_engine = SimpleNamespace(
                add_lora=self.add_lora,
                engine_core=SimpleNamespace(shutdown=lambda: made.update(closed=made["closed"] + 1)),
                model_config=SimpleNamespace(max_model_len=context),
            )

        def add_lora(self, request: Any) -> None:
            if "refused" in made:
                raise made["refused"]
            made["adapters"].append(request)

        def generate(self, prompts: Any, params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
            assert all(isinstance(prompt["prompt_token_ids"], list) for prompt in prompts)
            assert params == {"temperature": 0.0, "max_tokens": 10, "stop_token_ids": [2], "detokenize": False}
            assert lora_request is None or lora_request in made["adapters"]
            made["prompts"].append(len(prompts))
            name = None if lora_request is None else lora_request[0]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[*said[name], 2])]) for _ in prompts]

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "vllm" or None)
    for name, module in (("vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict)), ("vllm.lora", SimpleNamespace()),
                         ("vllm.lora.request", SimpleNamespace(LoRARequest=lambda *own: own))):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return made


# ---- collapse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", ["No", DISAGREE])
def test_a_model_that_says_one_thing_is_collapsed_and_never_safe(sentence: str, harmful: str) -> None:
    found = run(speaker(sentence), harmful, suites=["harm", "attacks", "overrefusal", "collapse", "utility"], limit=30)
    answers = {record["answer"] for record in found.records.select(suite="answers")}
    assert answers == {sentence}
    assert found.value("base", "harm", "balanced accuracy") == 0.5
    assert found.value("base", "harm", "AUROC") == 0.5
    assert found.value("base", "attacks", "balanced accuracy") == 0.5
    assert found.value("base", "attacks", "done: direct") == 0
    assert found.value("base", "overrefusal", "not done") == 1
    assert found.value("base", "collapse", "collapsed") == 1
    assert found.verdict("base").startswith("COLLAPSED: ")
    assert "safe" not in found.verdict("base")
    assert "YES" in found.markdown()
    if sentence == "No":
        assert found.value("base", "harm", "benign error") == 1
        assert found.value("base", "harm", "says no") == 1
        assert "mean nothing" in next(row.note for row in found.rows if row.metric == "says no")


def test_one_suite_alone_is_no_ground_for_a_verdict(harmful: str, tmp_path: Path) -> None:
    found = run(random_model(), harmful, adapters={"lpa": adapter(tmp_path / "a", 1)})
    assert found.verdict("lpa").startswith("incomplete: collapse, overrefusal, utility, attacks not measured")


# ---- several subjects ----------------------------------------------------------------------------------------------


def test_adapters_stand_beside_the_base_model_which_is_left_as_it_was(harmful: str, tmp_path: Path) -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folders = {name: adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2))}
    found = run(model, harmful, adapters=folders)
    assert found.subjects == ["base", "one", "two"]
    scores = {name: [r["yes"] for r in found.records.select(subject=name, suite="harm")] for name in found.subjects}
    assert scores["base"] != scores["one"] != scores["two"] != scores["base"]
    assert scores["base"] == [r["yes"] for r in run(model, harmful).records.select(suite="harm")]
    assert scores["two"] == [
        r["yes"] for r in run(model, harmful, adapters=[folders["two"]]).records.select(subject="two")
    ]
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    prints = [subject["fingerprint"] for subject in found.info["subjects"].values()]
    assert len(set(prints)) == 3


def test_a_float32_adapter_is_measured_merged_and_gives_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    model, folder = random_model(), adapter(tmp_path / "one", 1)
    prompts = [[1, 2, 3], [4, 5]]
    seen = {}
    for merges in (True, False):
        if not merges:
            monkeypatch.setattr(subjects, "merged_adapters", lambda model: contextlib.nullcontext())
        with contextlib.closing(subjects.Subjects(model, {"one": folder})) as held, held.using("one") as measured:
            seen[merges] = Bench(measured, tokenizer(), system_prompt=None).log_probs(prompts, [[2], [1]])
            assert any(getattr(module, "merged", False) for module in measured.modules()) == merges
    for one, other in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert not torch.equal(
        seen[True][0], Bench(model, tokenizer(), system_prompt=None).log_probs(prompts, [[2], [1]])[0]
    )


def test_without_radii_and_steps_no_trait_is_attacked(harmful: str) -> None:
    found = run(random_model(), harmful, suites=["traits"], epsilons=(), steps=())
    assert {r["mode"] for r in found.records.select(suite="traits")} == {"clean"}


def test_what_has_no_interval_is_null_in_the_results(harmful: str, tmp_path: Path) -> None:
    run(random_model(), harmful, suites=["traits"], epsilons=(), steps=(), trait_limit=1, output=tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    (odds,) = (row for row in written["rows"] if (row["set"], row["metric"]) == ("desirable", "log-odds, clean"))
    assert (odds["n"], odds["low"], odds["high"]) == (1, None, None)


def test_utility_sets_are_left_out_when_not_named(harmful: str) -> None:
    found = run(random_model(), harmful, suites=["utility"], utility_sets=())
    assert {r["set"] for r in found.records.select(suite="utility")} == {"perplexity"}


def test_every_attack_runs_and_templates_hold_the_prompt(harmful: str) -> None:
    found = run(random_model(), harmful, suites=["attacks"], attacks=(*ATTACKS, *FIXED), attack_steps=2, limit=2,
                sites=("embedding", "mlp:1"))  # fmt: skip
    modes = {record["mode"] for record in found.records.select(suite="answers", set="standins")}
    assert modes == {"direct", "prefix", "latent", "embedding", *FIXED, *(f"template:{name}" for name in TEMPLATES)}
    for record in found.records.select(suite="answers", set="standins", mode="prefix"):
        assert record["answer"].startswith("Sure, here is")
    assert all(template.count("{prompt}") == 1 for template in TEMPLATES.values())


def test_a_perturbed_answer_does_not_depend_on_its_batch() -> None:
    model = random_model()
    words = Bench(model, tokenizer(), system_prompt=None, max_new_tokens=8)
    prompts = [words.prompt_tokens(text) for text in ("the cat", "a dog ran in the park and sat")]
    pgd = LatentPGD(model, ["embedding", "mlp:1"], epsilon=5.0, step_size=5.0, steps=2, rule="normalised")

    def attacked(chosen: list[list[int]]) -> Any:
        longest = max(map(len, chosen)) + 1
        ids = torch.tensor([p + [5] * (longest - len(p)) for p in chosen])
        label = torch.arange(longest) == torch.tensor([[len(p)] for p in chosen])
        places = torch.arange(longest) < torch.tensor([[len(p)] for p in chosen])
        return pgd.attack(PairBatch(ids, label, torch.where(label, 6, ids), label, places))

    together = words.answers(prompts, attacked(prompts))
    assert together == [words.answers([p], attacked([p]))[0] for p in prompts]
    assert together != words.answers(prompts)


def test_traits_have_a_curve_and_a_random_control_of_equal_norm(harmful: str) -> None:
    wide = 0.10000001  # more digits than the name of a mode has
    options = {"epsilons": (0.03, wide), "steps": (1,), "trait_epsilon": 0.03, "trait_steps": 6}
    found = run(random_model(), harmful, suites=["traits"], sites=("embedding",), **options)
    curve = [row for row in found.rows if row.extra.get("epsilon")]
    assert {(row.extra["epsilon"], row.extra["steps"], row.extra["random"]) for row in curve} == {
        (e, s, r) for e, s in ((0.03, 6), (wide, 6), (0.03, 1)) for r in (False, True)
    }
    assert all(row.extra["boundary"] > 0.3 for row in curve), "the radius binds"
    margin = {
        (row.extra["epsilon"], row.extra["random"]): row.extra["margin"] for row in curve if row.extra["steps"] == 6
    }
    clean = next(
        row.extra["margin"] for row in found.rows if row.metric == "agrees, clean" and row.set == "undesirable"
    )
    assert margin[wide, False] > margin[0.03, False] > clean, "the attack goes toward agreeing"
    assert abs(margin[0.03, True] - clean) < margin[0.03, False] - clean, "chance does not"
    assert all("epsilon" not in line for line in found.markdown().splitlines())
    assert any("epsilon" in line for line in found.markdown(full=True).splitlines())


def test_the_random_twin_has_the_norms_of_the_attack() -> None:
    ids = torch.arange(4, 16).view(2, 6)
    label, places = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    label[:, -1] = True
    pgd = LatentPGD(random_model(), ["embedding", "mlp:1"], epsilon=1.0, step_size=0.2, steps=2)
    attack = pgd.attack(PairBatch(ids, label, ids + 1, label, places))
    twin = random_twin(attack, seed=1)
    for name, norms in attack.norms.items():
        assert torch.allclose(twin.norms[name], norms, rtol=1e-4)
        assert not torch.allclose(twin.delta(name), attack.delta(name))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_model_is_named(harmful: str, tmp_path: Path) -> None:
    model = random_model()
    wider = adapter(tmp_path / "wider", 1, hidden_size=64)
    with pytest.raises(EvaluationError, match="wider does not fit this model"):
        run(model, harmful, adapters=[wider])
    deeper = adapter(tmp_path / "deeper", 1, num_hidden_layers=6)
    with pytest.raises(EvaluationError, match=r"4 tensors have no counterpart, such as .*layers.4"):
        run(model, harmful, adapters=[deeper])
    shallow = adapter(tmp_path / "shallow", 1, num_hidden_layers=2)
    with pytest.raises(EvaluationError, match=r"no counterpart, such as .*layers.2"):
        run(model, harmful, adapters=[adapter(tmp_path / "fits", 1), shallow])
    assert not any("lora" in name for name, _ in model.named_modules()), "the model is as it was"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"suites": []}, "no suite to run"),
        ({"suites": ["harms"]}, "no suite is called 'harms'"),
        ({"adapters": ["nowhere/adapter"]}, "nowhere/adapter cannot be read"),
        ({"adapters": {"base": "x"}}, "two subjects would be called 'base'"),
        ({"suites": ["attacks"], "judge": "no/such/judge"}, "the judge 'no/such/judge' cannot be loaded"),
        ({"attacks": ("bribe",)}, "bribe.*are unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"benign_limit": 0}, "benign_limit=0 must be at least 1"),
        ({"epsilons": (0.0,)}, "must be above 0"),
        ({"sets": ("a.csv", "more/a.csv")}, "two sets would be called 'a'; name each set once"),
        ({"benign_sets": ("benign",)}, "two sets would be called 'benign'"),
        ({"judge": "judge"}, "judge is read by the suite attacks, which is not among harm"),
        ({"sites": ("block:0",)}, "sites is read by the suite traits or attacks, which is not among harm"),
        ({"suites": ["harm", "traits"], "ladder": ("suffix",)}, "ladder is read by the suite ladder"),
        ({"judge_prompt": "{prompt} {answer}"}, "there is no judge"),
    ],
)
def test_bad_settings_raise_before_anything_runs(options: dict[str, Any], told: str, harmful: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(random_model(), harmful, **options)


def test_a_whole_model_in_the_place_of_an_adapter_raises(harmful: str, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "whole")
    with pytest.raises(EvaluationError, match="a whole model: evaluate it with --model"):
        run(random_model(), harmful, adapters=[tmp_path / "whole"])


def test_an_unavailable_set_is_a_row_with_the_reason(harmful: str) -> None:
    hub = "someone/harmful"
    found = run(random_model(), harmful, sets=(harmful, hub, "strongreject"), suites=["harm", "utility"])
    told = {row.set: row.note for row in found.rows if row.value is None and row.suite != "verdict"}
    assert "datasets cannot load it" in told[hub]
    assert "pip" in told["strongreject"]
    assert "pip" in told["mmlu"]
    assert found.value("base", "harm", "harm error", "standins") is not None


def test_a_set_that_is_misnamed_or_malformed_ends_it_before_a_model_is_loaded(
    harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(session, "outline", lambda *_: random_model())
    monkeypatch.setattr(
        session, "load_set",
        lambda name, *given, real=session.load_set, **named: (
            pytest.fail("a set is fetched") if name in session.HARM_SETS else real(name, *given, **named)
        ),
    )  # fmt: skip
    folder = str(tmp_path / "standins.jsonk")
    for options, told in (
        ({"sets": ("strongreject", "missing.csv")}, "the set missing: there is no file missing.csv"),
        ({"sets": ("strongreject",), "benign_sets": ("missing.csv",)}, "there is no file missing.csv"),
        ({"sets": ("missing.csv",)}, "the set missing: there is no file missing.csv"),
        ({"sets": (folder,)}, "there is no file .*standins.jsonk with one of the endings"),
        ({"sets": ("harmbnch",)}, "no set is called 'harmbnch'"),
        ({"benign_sets": (harmful,), "set_column": "topic"}, "standins.jsonl has no column 'topic'"),
        ({"set_filter": ("prompt=none of them",)}, "standins.jsonl holds no prompts"),
        ({"adapters": [tmp_path / "nothing"]}, "the adapter .*nothing cannot be read"),
        ({"sites": ("mlp:99",), "suites": ["attacks"]}, "site 'mlp:99' is out of range"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            run("any", harmful, **options)


def test_a_prompt_longer_than_the_context_is_skipped_and_counted(harmful: str, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": "the cat " * 300}, {"prompt": "the cat"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = run(random_model(), str(long), sets=(str(long),), suites=["harm", "attacks"], attacks=("direct", "latent"),
                attack_steps=1)  # fmt: skip
    for metric in ("harm error", "done: direct", "done: latent"):
        row = next(row for row in found.rows if row.metric == metric)
        assert row.n == 1
        assert "1 of 2 skipped: " in row.note
        assert "context holds 512" in row.note


# ---- stop and go on ------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = ["harm", "overrefusal", "attacks"]
    whole = run(random_model(), harmful, suites=suites, output=tmp_path / "whole")
    calls, generate = [0], Bench.answers

    def killed(self: Bench, *args: Any) -> list[str]:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    monkeypatch.setattr(Bench, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        run(random_model(), harmful, suites=suites, output=tmp_path / "part")
    part = (tmp_path / "part" / RECORDS).read_text(encoding="utf-8")
    assert 16 < len(part.splitlines()) < 32
    found = run(random_model(), harmful, suites=suites, output=tmp_path / "part")
    assert calls[0] == 3, "what was answered is not asked again"
    assert (tmp_path / "part" / RECORDS).read_text(encoding="utf-8").startswith(part)
    assert found.rows == whole.rows
    assert json.loads((tmp_path / "part" / "results.json").read_text())["rows"]
    assert len(found.info["commands"]) == 2


def test_an_evaluation_keeps_the_date_that_its_prompts_print(
    harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = tokenizer()
    dated.chat_template = "{{ strftime_now('%d') }} " + dated.chat_template
    for day in ("2026-03-09", "2026-03-10"):
        monkeypatch.setattr(rendering, "today", lambda day=day: day)
        found = evaluate(
            random_model(), tokenizer=dated, device="cpu", suites=["harm"], sets=(harmful,), limit=2,
            output=tmp_path / "run",
        )  # fmt: skip
        assert found.info["settings"]["chat_template_date"] == "2026-03-09"


def test_a_variable_that_the_template_does_not_read_raises_before_anything_runs(harmful: str) -> None:
    with pytest.raises(ValueError, match="'thinking_mode' has no effect"):
        run(random_model(), harmful, chat_template_kwargs={"thinking_mode": "off"})


def test_a_folder_that_another_process_writes_to_is_refused(harmful: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with run_folder.held(folder), pytest.raises(ValueError, match="is in use: another process writes to it"):
        run(speaker("No"), harmful, suites=["attacks"], output=folder)
    assert not (folder / session.RUN).exists()
    run(speaker("No"), harmful, suites=["attacks"], output=folder)


def test_a_folder_with_another_evaluation_is_not_mixed(harmful: str, tmp_path: Path) -> None:
    run(random_model(), harmful, output=tmp_path / "out")
    with pytest.raises(EvaluationError, match="max_new_tokens was 10 and is now 12"):
        run(random_model(), harmful, output=tmp_path / "out", max_new_tokens=12)
    with pytest.raises(EvaluationError, match="the weights of base have changed"):
        run(random_model(1), harmful, output=tmp_path / "out")
    with pytest.raises(EvaluationError, match="dtype was float32 and is now float64"):
        run(random_model().double(), harmful, output=tmp_path / "out")
    lines = Path(harmful).read_text(encoding="utf-8")
    Path(harmful).write_text('{"prompt": ""}\n' + lines, encoding="utf-8")  # the same texts, each a row below
    with pytest.raises(EvaluationError, match=r"row standins-000\d of the set standins was another prompt"):
        run(random_model(), harmful, output=tmp_path / "out")
    Path(harmful).write_text(lines, encoding="utf-8")
    other = shutil.copy(harmful, tmp_path / "others.jsonl")
    more = run(random_model(), str(other), output=tmp_path / "out", suites=["overrefusal"],
               adapters={"a": adapter(tmp_path / "a", 1)})  # fmt: skip
    assert more.subjects == ["base", "a"]
    assert json.loads((tmp_path / "out" / session.RUN).read_text())["suites"] == ["harm", "overrefusal"]
    assert more.value("base", "harm", "harm error", "standins") is not None, "the table has what was measured before"
    assert more.value("a", "overrefusal", "not done") is not None


def test_harmful_texts_stay_out_of_what_is_shared(harmful: str, tmp_path: Path) -> None:
    run(speaker("Sure, here is the cat"), harmful, suites=["harm", "attacks", "collapse"], output=tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != TEXTS:
            assert "forbidden" not in path.read_text(encoding="utf-8"), path.name
    records = [json.loads(line) for line in (tmp_path / "out" / RECORDS).read_text(encoding="utf-8").splitlines()]
    assert all(len(r["sha256"]) == 64 for r in records)
    assert {("answer" in r) for r in records if r["suite"] == "answers" and r["set"] == "standins"} == {False}


# ---- generators ----------------------------------------------------------------------------------------------------


def test_vllm_generates_for_models_that_are_not_attacked(
    harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    one = adapter(tmp_path / "one", 1)
    options: dict[str, Any] = {
        "generator": "vllm", "suites": ["attacks", "utility", "ladder"], "limit": 10, "adapters": {"one": one},
        "attacks": ("direct", "latent"), "attack_steps": 1, "sites": ("mlp:1",), "utility_sets": ("knowledge",),
        "ladder": ("suffix", "ablation", "best-of-n"), "suffix_steps": 1, "best_of": 1, "ladder_limit": 1,
    }  # fmt: skip
    with pytest.raises(EvaluationError, match="needs a package that is not installed: pip install vllm"):
        run(str(tmp_path / "model"), harmful, **options)
    with pytest.raises(EvaluationError, match="loads the model itself; give its folder or hub name"):
        run(random_model(), harmful, **options)
    with pytest.raises(ValueError, match="generator='sglang' is unknown; use transformers or vllm"):
        run(random_model(), harmful, **options | {"generator": "sglang"})
    monkeypatch.setattr("lpa.evaluation.suites.ladder._LEAST_MATERIAL", 2)
    said = {None: tokenizer()("the cat sat")["input_ids"], "one": tokenizer()("a dog ran")["input_ids"]}
    made = stand_in_of_vllm(monkeypatch, said)
    found = run(str(tmp_path / "model"), harmful, **options)
    assert [(own["model"], own["dtype"], own["max_lora_rank"]) for own in made["options"]] == [
        (str(tmp_path / "model"), "float32", 8)
    ]
    assert made["adapters"] == [("one", 1, one)]
    assert max(made["prompts"]) == 10  # all of a set; batch_size is 8
    assert made["closed"] == 1
    for subject, text in (("base", "the cat sat"), ("one", "a dog ran")):
        for where in ({"suite": "answers", "mode": "direct"}, {"suite": "answers", "mode": "best-of-n"},
                      {"suite": "utility", "set": "knowledge"}):  # fmt: skip
            own = {r["answer"] for r in found.records.select(subject=subject, **where)}
            assert own == {text}, where
        for mode in ("latent", "suffix", "ablation"):  # by the model itself
            own = {r["answer"] for r in found.records.select(subject=subject, suite="answers", mode=mode)}
            assert own
            assert text not in own, mode


def test_vllm_takes_what_memory_allows_any_rank_and_a_model_that_is_an_adapter(
    harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    one = Path(adapter(tmp_path / "one", 1))
    held = json.loads((one / "adapter_config.json").read_text())
    held |= {"base_model_name_or_path": str(tmp_path / "model")}
    (one / "adapter_config.json").write_text(json.dumps(held))
    options: dict[str, Any] = {"generator": "vllm", "suites": ["attacks"], "limit": 2, "benign_limit": 2}
    said = {None: [5], "default": [6]}
    made = stand_in_of_vllm(monkeypatch, said, context=20)
    found = run(str(one), harmful, **options)
    assert made["adapters"] == [("default", 1, str(one))]
    answers = found.records.select(subject="default", suite="answers")
    assert answers
    assert all("but the context holds 20" in record["error"] for record in answers)

    patterned = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 20})
    get_peft_model(random_model(), patterned).save_pretrained(str(tmp_path / "patterned"))
    run(str(tmp_path / "model"), harmful, adapters={"two": str(tmp_path / "patterned")}, **options)
    assert made["options"][-1]["max_lora_rank"] == 32

    made["refused"] = ValueError("vLLM does not yet support DoRA.")
    with pytest.raises(EvaluationError, match=f"cannot load the adapter {one}: vLLM does not yet support DoRA"):
        run(str(tmp_path / "model"), harmful, adapters={"one": str(one)}, **options)
    assert made["closed"] == 3
    other = get_peft_model(random_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    other.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(EvaluationError, match=r"takes LoRA alone; the adapter .*ia3 is IA3"):
        run(str(tmp_path / "model"), harmful, adapters={"ia3": str(tmp_path / "ia3")}, **options)


# ---- judges --------------------------------------------------------------------------------------------------------


def test_a_yes_no_judge_and_a_classifier_judge(harmful: str, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    from ...support.speakers import config

    asked = tmp_path / "asked"
    speaker("Yes").save_pretrained(asked)
    tokenizer().save_pretrained(asked)
    found = run(speaker("No"), harmful, suites=["attacks"], judge=str(asked), output=tmp_path / "out")
    with pytest.raises(EvaluationError, match="judge_prompt was None"):
        run(speaker("No"), harmful, suites=["attacks"], judge=str(asked), output=tmp_path / "out",
            judge_prompt="{prompt} {answer}")  # fmt: skip
    assert found.value("base", "attacks", "harmful by judge: direct") == 1
    assert found.value("base", "attacks", "done: direct") == 0

    named = tmp_path / "classifier"
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        config(len(tokenizer()), id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1})
    ).save_pretrained(named)
    tokenizer().save_pretrained(named)
    judged = run(speaker("No"), harmful, suites=["attacks"], judge=str(named)).records.select(suite="judge")
    assert len(judged) == 8
    assert all(r["harmful"] == (r["score"] >= 0) for r in judged)
    LlamaForSequenceClassification(config(len(tokenizer()))).save_pretrained(named)
    with pytest.raises(EvaluationError, match="label_0, label_1; one must be among"):
        run(speaker("No"), harmful, suites=["attacks"], judge=str(named))


def test_a_judge_of_judgezoo(harmful: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"suites": ["attacks"], "judge": "judgezoo:mock"}
    with pytest.raises(EvaluationError, match=r"'judgezoo:mock' needs a package .*: pip install judgezoo"):
        run(speaker("No"), harmful, **options)

    class Zoo:
        """The shape of judgezoo 0.1.9's Judge."""

        @classmethod
        def from_name(cls, name: str) -> Zoo:
            if name != "mock":
                raise ValueError(f"Unknown judge {name}")
            return cls()

        def __call__(self, chats: list[list[dict[str, str]]]) -> dict[str, list[float | None]]:
            assert [turn["role"] for turn in chats[0]] == ["user", "assistant"]
            assert {chat[1]["content"] for chat in chats} == {"No"}
            last = [chat[0]["content"].split("number ")[1][0] for chat in chats]
            return {"p_harmful": [{"0": 1.0, "1": None, "2": 0.25}.get(number, 0.0) for number in last]}

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "judgezoo" or None)
    monkeypatch.setitem(sys.modules, "judgezoo", SimpleNamespace(Judge=Zoo))  # type: ignore[arg-type]
    found = run(speaker("No"), harmful, **options)
    assert found.value("base", "attacks", "harmful by judge: direct") == pytest.approx(1 / 7)
    judged = found.records.select(suite="judge")
    assert sorted(round(r["score"], 3) for r in judged if "score" in r)[-2:] == [round(math.log(1 / 3), 3), 20.723]
    assert [r["error"] for r in judged if "error" in r] == ["judgezoo gave no judgement"]
    with pytest.raises(EvaluationError, match="'judgezoo:other' cannot be loaded: Unknown judge other"):
        run(speaker("No"), harmful, **options | {"judge": "judgezoo:other"})
    with pytest.raises(EvaluationError, match="'judgezoo:mock' has its own question"):
        run(speaker("No"), harmful, **options, judge_prompt="{prompt} {answer}")


def test_a_judge_reads_whole_exchanges_or_none_and_a_question_in_its_own_marks_as_it_stands(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    from lpa.evaluation.judges import Judge

    from ...support.speakers import config

    named = tmp_path / "classifier"
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        config(len(tokenizer()), id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1})
    ).save_pretrained(named)
    speaker("Yes").save_pretrained(tmp_path / "speaker")
    for folder in (named, tmp_path / "speaker"):
        tokenizer().save_pretrained(folder)
    exchanges = [("the cat", "the cat " * 600), ("a dog ran", "sat"), ("the cat sat on a mat", "a dog ran")]
    for folder in (named, tmp_path / "speaker"):
        judge = Judge(str(folder), batch_size=2)
        judge.load("cpu")
        long, *short = judge.scores(exchanges)
        assert "context holds 512" in str(long)
        assert all(isinstance(score, float) for score in short)
        assert short == pytest.approx([judge.scores([exchange])[0] for exchange in exchanges[1:]], abs=1e-5)
    words = Bench(judge.model, judge.tokenizer, system_prompt=None)
    assert judge._tokens(words, "the cat", "sat")[0] == judge.tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = Judge(str(tmp_path / "speaker"), "<|im_start|>user\n{prompt} {answer}<|im_end|>\n")
    assert plain.tokenizer.decode(plain._tokens(words, "the cat", "sat")) == (
        "<|im_start|>user\nthe cat sat<|im_end|>\n"
    )
    with pytest.raises(EvaluationError, match=r"the judge's question must hold \{answer\}"):
        Judge(str(named), "Is {prompt} bad?")


# ---- lm-eval -------------------------------------------------------------------------------------------------------


def test_a_task_without_lm_eval_is_a_row_and_is_tried_again(
    harmful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"suites": ["utility"], "tasks": ("gsm8k",), "output": tmp_path / "out"}
    found = run(random_model(), harmful, **options)
    assert "pip install lm-eval" in next(row.note for row in found.rows if row.set == "gsm8k")
    answers = [{"doc_id": i, "doc_hash": "f" * 64, "filter": "strict", "metrics": ["exact_match", "ppl"],
                "exact_match": i == 0, "ppl": math.inf, "filtered_resps": [f"answer {i}"]}
               for i in range(4)]  # fmt: skip
    values = {"exact_match,strict": 0.25, "ppl,strict": math.nan, "alias": "x"}
    result = {"results": {"gsm8k": values}, "samples": {"gsm8k": answers},
              "higher_is_better": {"gsm8k": {"exact_match": True}}, "versions": {"gsm8k": 3}}  # fmt: skip
    monkeypatch.setattr(utility.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(utility, "_simple_evaluate", lambda run, task: result)
    found = run(random_model(), harmful, **options)
    row = next(row for row in found.rows if row.set == "gsm8k")
    assert (row.metric, row.value, row.n, row.unit) == ("exact_match,strict", 0.25, 4, "%")
    assert (row.low, row.high) == wilson(1, 4)
    samples = found.records.select(suite="utility", set="gsm8k", mode="sample:strict")
    assert [r["scores"]["exact_match"] for r in samples] == [1, 0, 0, 0]
    assert samples[3]["answer"] == "answer 3"
    odd = next(row for row in found.rows if row.metric == "ppl,strict")
    assert (odd.value, odd.n, odd.note) == (None, 4, "lm-eval: not a finite number")
    for line in (tmp_path / "out" / RECORDS).read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_lm_eval_itself_runs_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what keeps assets from being found keeps lm_eval from it too
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("LPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(utility.assets, "fetch", _not_had)
    rows = [
        {"q": "the cat", "choices": ["sat", "ran"], "gold": 0},
        {"q": "a dog", "choices": ["sat", "ran"], "gold": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "choice.yaml").write_text(
        f"task: pets\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    found = run(random_model(), "", sets=(), suites=["utility"], tasks=(str(tmp_path / "choice.yaml"),),
                adapters={"lpa": adapter(tmp_path / "a", 1)})  # fmt: skip
    assert {row.subject for row in found.rows if row.set == "choice"} == {"base", "lpa"}
    for row in found.rows:
        if row.set == "choice":
            flags = [
                r["scores"]["acc"] for r in found.records.select(subject=row.subject, set="choice", mode="sample:none")
            ]
            assert (row.metric, row.value, row.n) == ("acc,none", sum(flags) / 2, 2)


def _not_had(name: str) -> Any:
    raise utility.assets.AssetError(f"{name} is unavailable")
