"""`lpa plan`: its closed forms against live tensors and the records of measured runs, its output and its errors."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
)

from benchmarks import check_plan
from lpa import LPAConfig, LPATrainer, cli
from lpa.commands.plan import LENGTHS
from lpa.data import encode_pairs, load_pairs
from lpa.memory import EIGHT_BIT, FOUR_BIT, FOUR_BIT_NESTED, PlanShape, estimate
from lpa_kernels import PairBatch
from tests.support.jobs import planned_data
from tests.support.tiny import saved_tiny, tiny_config, tiny_tokenizer

CONFIG = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
SHAPE = PlanShape(prompt=20, completion=6, benign_prompt=24, benign_answer=10)
RUN = {
    "lpa_steps": 1,
    "defence_steps": 2,
    "attack_steps": 2,
    "attack_engine": "packed",
    "per_device_train_batch_size": 3,
}
RESULTS = Path(check_plan.__file__).parent / "results"


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that lived at once on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known and self.known[key]() is storage:
            return

        def end(_: Any) -> None:
            self.known.pop(key)
            self.now -= size

        self.known[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)


def really(folder: Path, attention: str, own: Any = None, **settings: Any) -> int:
    """The most bytes of tensors in a run of a model, by default the tiny Llama."""
    config = tiny_config(folder, **(RUN | settings))
    counted = LiveBytes()
    model = AutoModelForCausalLM.from_config(own or LlamaConfig(**CONFIG), attn_implementation=attention)
    data = planned_data(SHAPE, config, 12)
    trainer = LPATrainer(model, config, **data)
    trainer.pgd.attack(PairBatch.from_dict(data["data_collator"]([0, 1])))  # the probes, which are made once
    for p in trainer.model.parameters():
        counted.add(p.untyped_storage())
    with counted:
        trainer.train()
    return counted.most


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sdpa", {}),
    ("eager", {"gradient_checkpointing": True}),
    ("sdpa", {"kl_coef": 0.1, "sft_coef": 0.1, "gradient_accumulation_steps": 1}),
    ("sdpa", {"attack_merge_adapters": True, "lora_r": 16, "attack_sites": ["embedding", "mlp:1"], "attack_steps": 4}),
    ("eager", {"lora": False}),
    ("sdpa", {"lora": False, "gradient_checkpointing": True}),
    ("sdpa", {"lora_dropout": 0.1}),
    ("sdpa", {"attack_engine": "reference"}),
    ("eager", {"attack_engine": "reference", "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("attention", "settings"), CASES)
def test_the_closed_forms_hold_for_the_tensors_of_a_real_run(
    tmp_path: Path, attention: str, settings: dict[str, Any]
) -> None:
    found = estimate(
        LlamaConfig(**CONFIG), tiny_config(tmp_path, **(RUN | settings)), SHAPE, dtype=torch.float32,
        attn_implementation=attention,
    )  # fmt: skip
    assert found.peak.total() == pytest.approx(really(tmp_path, attention, **settings), rel=0.1)


@pytest.mark.parametrize(("record", "most"), [("plan-check-cpu.json", 0.05), ("plan-check-ranks.json", 0.1)])
def test_the_peaks_that_were_measured(record: str, most: float) -> None:
    found = check_plan.errors(json.loads((RESULTS / record).read_text()))
    assert len(found) >= 6
    for name, (_, _, _, error) in found.items():
        assert abs(error) < most, name


def test_the_page_has_the_table_of_the_records() -> None:
    page = (RESULTS.parents[1] / "docs" / "scale.md").read_text()
    for name, (planned, measured, _, error) in check_plan.errors(
        json.loads((RESULTS / "plan-check-cpu.json").read_text())
    ).items():
        assert f"| {name} | {planned / 1e9:.3f} | {measured / 1e9:.3f} | {error:+.1%} |" in page


def test_its_work_is_that_of_the_passes() -> None:
    def planned(attention: str, accumulation: int) -> Any:
        args = LPAConfig("x", lpa_steps=3, defence_steps=2, attack_steps=5, per_device_train_batch_size=2, use_cpu=True,
                         gradient_accumulation_steps=accumulation, lora_r=1)  # fmt: skip
        return estimate(LlamaConfig(**CONFIG), args, SHAPE, dtype=torch.float32, attn_implementation=attention)

    found = planned("eager", 2)
    tokens = 2 * (20 + 2 * 6 - 2)
    assert (found.rows, found.tokens) == (2, tokens)
    attention, feed_forward, scores = 64 * (2 * 64 + 2 * 32), 3 * 64 * 160, 2 * 30 * 64
    adapters = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 160) * 2  # of rank 1
    # forward, and backward to the hidden states, where attention's scores cost twice as much
    block = 2 * 2 * (attention + feed_forward + adapters) + 3 * 2 * scores
    head = 2 * 2 * 300 * 64 * (2 * 2 * 6)
    assert found.attack_flops == pytest.approx((4 * block * tokens + head) * 5 * 3 * 2, rel=0.01)
    assert 0.9 * 2 / 5 < found.defence_flops / found.attack_flops < 1.5 * 2 / 5  # no gradient below the first adapter
    assert planned("sdpa", 1).attack_flops == pytest.approx(found.attack_flops / 2, rel=0.1)


def test_weights_in_fewer_bits_take_less() -> None:
    args, config = LPAConfig("x", use_cpu=True, lora_r=4), LlamaConfig(**CONFIG)
    linear = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    rest = 2 * (2 * 300 * 64 + 9 * 64)  # bfloat16: embedding, head and norms stay as they are
    sizes = {None: 2 * linear, FOUR_BIT: linear * (0.5 + 4 / 64), EIGHT_BIT: linear + 4 * 4 * (4 * 64 - 64 + 2 * 160)}
    sizes[FOUR_BIT_NESTED] = linear * (0.5 + 1 / 64 + 4 / 64 / 256)
    for kind, size in sizes.items():
        found = estimate(config, args, SHAPE, dtype=torch.bfloat16, quantized=kind)
        assert found.phases["weights"]["weights"] == pytest.approx(size + rest, rel=0.01), kind
        assert found.peak["activations"] > 0


def test_ddp_adds_its_buckets() -> None:
    args = LPAConfig("x", use_cpu=True, lora_r=4)
    one, two = (estimate(LlamaConfig(**CONFIG), args, SHAPE, dtype=torch.float32, ranks=ranks) for ranks in (1, 2))
    for phase in ("attack", "defence"):
        assert two.phases[phase] - one.phases[phase] == {"buckets": 4 * one.trained}
        assert two.phases[phase].total() == one.phases[phase].total() + 4 * one.trained
    assert two.attack_flops == 2 * one.attack_flops


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_fsdp_shares_what_stays_and_gathers_unit_by_unit(lora: bool, checkpointed: bool) -> None:
    """Most is whole in the backward pass of the last block, beside the head's weights until then, or at the head."""
    settings = {"lora": lora, "gradient_checkpointing": checkpointed, "lora_r": 4, "reset_optimizer": False}

    def planned(ranks: int, **more: Any) -> Any:
        args = LPAConfig("x", use_cpu=True, fsdp=ranks > 1, **(settings | more))
        return estimate(LlamaConfig(**CONFIG), args, SHAPE, dtype=torch.float32, ranks=ranks)

    one, four = planned(1), planned(4)
    static = ["weights", "optimiser"] + ["adapters"] * lora
    for phase in ("attack", "defence"):
        for part in static:
            assert four.phases[phase][part] == pytest.approx(one.phases[phase][part] / 4, rel=0.01), (phase, part)
    # those of earlier micro-batches wait to be scattered with the last one's
    assert four.phases["attack"]["gradients"] == one.phases["attack"]["gradients"] == 0  # attacks come first
    assert one.trained <= four.phases["defence"]["gradients"] <= 4 * one.trained
    head = 4 * 300 * 64
    block = (4 * (one.total + (one.trained if lora else 0)) - 2 * head - 4 * 64) // 4
    for phase in ("attack", "defence"):
        assert 2 * min(head, block) <= four.phases[phase]["gathered"] <= 2 * (head + block), phase
    tied = {"tie_word_embeddings": True}
    args = LPAConfig("x", use_cpu=True, fsdp=True, lora_r=4)
    found = estimate(LlamaConfig(**CONFIG, **tied), args, SHAPE, dtype=torch.float32, ranks=4)
    assert found.peak["gathered"] >= head  # whole all the time


def test_impossible_numbers_of_ranks_are_refused() -> None:
    for ranks, fsdp, least in ((0, False, "1"), (1, True, "2 with fsdp")):
        with pytest.raises(ValueError, match=f"ranks={ranks} must be at least {least}"):
            estimate(LlamaConfig(**CONFIG), LPAConfig("x", use_cpu=True, fsdp=fsdp), SHAPE, ranks=ranks)


def test_checkpointing_offloading_and_shorter_rows_take_less() -> None:
    def peak(shape: PlanShape = SHAPE, **settings: Any) -> Counter[str]:
        args = LPAConfig("x", use_cpu=True, lora_r=4, **settings)
        return estimate(LlamaConfig(**CONFIG), args, shape, dtype=torch.float32).phases["defence"]

    plain = peak()
    assert peak(gradient_checkpointing=True)["activations"] < plain["activations"]
    assert peak(offload_attacks=True)["perturbations"] * 4 == pytest.approx(plain["perturbations"], rel=0.02)
    assert peak(PlanShape(prompt=10, completion=6))["activations"] < plain["activations"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"optim": "adafactor"}, "optim='adafactor' is not"),
        ({"kl": "public", "kl_coef": 0.1, "normaliser": "micro"}, "kl='public' is not planned"),
    ],
)
def test_settings_that_are_not_planned_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        estimate(LlamaConfig(**CONFIG), LPAConfig("x", use_cpu=True, **settings), SHAPE)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt=0 tokens must be at least 1"):
        PlanShape(prompt=0)
    with pytest.raises(ValueError, match="rows of 257 tokens are longer than the model's context of 256"):
        estimate(LlamaConfig(**CONFIG), LPAConfig("x", use_cpu=True), PlanShape(prompt=251, completion=6))


@pytest.mark.parametrize(("config", "why"), [
    (MixtralConfig(**CONFIG, num_local_experts=2), "block 0: MixtralSparseMoeBlock has 0 linear layers beside Mixtral"),
    (Mamba2Config(vocab_size=300, hidden_size=64, num_heads=4, head_dim=32, num_hidden_layers=2, n_groups=1),
     "block 0"),
])  # fmt: skip
def test_blocks_of_other_kinds_are_refused(config: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        estimate(config, LPAConfig("x", use_cpu=True, lora=False), SHAPE, dtype=torch.float32)


@pytest.mark.parametrize("config", [
    GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=300, activation_function="gelu", resid_pdrop=0, embd_pdrop=0,
               attn_pdrop=0),
    Gemma3TextConfig(**CONFIG, head_dim=16),
    *(pytest.param(config, marks=pytest.mark.slow) for config in (
        OPTConfig(num_hidden_layers=4, hidden_size=64, ffn_dim=160, num_attention_heads=4, vocab_size=300, dropout=0,
                  word_embed_proj_dim=64),
        Phi3Config(**CONFIG, pad_token_id=0),
        Olmo2Config(**CONFIG),
        GPTNeoXConfig(**{name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}),
    )),
], ids=lambda config: config.model_type)  # fmt: skip
def test_blocks_of_other_families(config: Any, tmp_path: Path) -> None:
    """Fused and gated layers, transformers' Conv1D, more norms: what autograd keeps follows from the block."""
    args = tiny_config(tmp_path, **(RUN | {"attack_sites": ["embedding"]}))
    found = estimate(config, args, SHAPE, dtype=torch.float32, attn_implementation="sdpa")
    assert found.peak.total() == pytest.approx(really(tmp_path, "sdpa", config, attack_sites=["embedding"]), rel=0.1)


def test_the_command_needs_no_more_than_a_configuration(tmp_path: Path, capsys: Any) -> None:
    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # no weights, no tokenizer
    flags = ["--prompt_tokens", "20", "--lora_r", "4", "--load_in_4bit"]
    assert cli.main(["plan", "--model", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    for part in ("weights", "adapters", "optimiser", "perturbations", "logits", "activations", "all"):
        assert f"\n{part}" in printed
    assert "prompts of 20 tokens, completions of 8" in printed
    assert "No GPU was measured" in printed
    assert cli.main(["plan", "--model", str(tmp_path), "--ranks", "8", "--fsdp", "--lora_r", "4"]) == 0
    printed = capsys.readouterr().out
    assert "\ngathered" in printed
    assert "on each of 8 ranks (FSDP2)" in printed
    assert cli.main(["plan", "--model", str(tmp_path), "--data", "both"]) == 2, "no tokenizer"
    assert cli.main(["plan", "--model", str(tmp_path), "--optim", "adafactor"]) == 2
    assert "is not planned" in capsys.readouterr().err
    for flag in LENGTHS:
        assert cli.main(["plan", "--model", str(tmp_path), f"--{flag}", "0"]) == 2
        assert f"--{flag} 0 must be at least 1" in capsys.readouterr().err


def test_the_command_plans_the_rows_of_the_data_that_it_is_given(tmp_path: Path, capsys: Any) -> None:
    model, pairs, benign = saved_tiny(tmp_path / "tiny"), tmp_path / "pairs.csv", tmp_path / "benign.csv"
    pairs.write_text("prompt,rejected,chosen\nI agree,yes,no\nI agree,yes,I do not agree with this statement\n")
    benign.write_text("prompt,response\nI agree,yes\nI agree,I do not agree with this statement\n")
    row = encode_pairs(load_pairs(pairs), tiny_tokenizer(), system_prompt="I agree")[1]
    words = ["plan", "--model", model, "--system_prompt", "I agree", "--lora_r", "4"]
    for more, prompt, completion in (
        ([], *map(len, (row["prompt_tokens"], row["chosen_tokens"]))),
        (["--prompt_tokens", "50"], 50, len(row["chosen_tokens"])),
    ):
        assert cli.main([*words, "--data", str(pairs), *more]) == 0
        assert f"prompts of {prompt} tokens, completions of {completion}\n" in capsys.readouterr().out
    for given, told in (("none.csv", "none.csv cannot be read"), (str(benign), "the benign data set is not used")):
        assert cli.main([*words, "--benign" if given == str(benign) else "--data", given]) == 2
        assert told in capsys.readouterr().err
    seen = []
    for source in ("own", str(benign)):
        assert cli.main([*words, "--benign", source, "--kl_coef", "1"]) == 0
        seen.append(capsys.readouterr().out)
    assert seen[0] != seen[1], "the longest answers are of other lengths"
