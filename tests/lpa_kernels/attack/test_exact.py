"""Exact or refused: every kind of model, adapter and layer that was once attacked wrongly without a word."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import (
    C3AConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoraConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.oracle import CUT_OFF, plain_attack
from benchmarks.sweep_models import LONG, SHORT, off_by, pairs
from benchmarks.tiny_models import VOCAB, build, draw_weights
from lpa_kernels.attack import AttackResult, LatentPGD, PairBatch
from lpa_kernels.attack.verdicts import way_of
from lpa_kernels.model.modes import not_repacked

SITES = ["embedding", "block:1"]
SETTINGS: dict[str, Any] = {"steps": 3, "step_size": 0.02, "epsilon": 0.15}
TRIGGER = 11
ALL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
SHARED = ("stack", "packed")  # the engines that run a prompt once


def attacked(model: Any, batch: PairBatch, **settings: Any) -> AttackResult:
    return LatentPGD(model, SITES, threshold=CUT_OFF, **SETTINGS | settings).attack(batch)


def assert_exact(model: Any, batch: PairBatch, **settings: Any) -> AttackResult:
    """The attack gives the losses and perturbations of the oracle, which runs every text alone."""
    found = attacked(model, batch, **settings)
    modules = [site.module for site in LatentPGD(model, SITES).sites]
    rows = [torch.cat([delta[i][batch.attack_mask[i]] for i in range(len(batch))]) for delta in found.deltas.values()]
    off = off_by((found.history["total"].double(), rows), plain_attack(model, modules, batch, **SETTINGS))
    assert off.exact, off
    return found


def randomised(model: Any) -> Any:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape, generator=draw) * 0.1).to(p.dtype))
    return model.eval()


# ---- 1: what short texts do not show


def test_a_window_by_index_binds_in_longer_rows_alone() -> None:
    model = build("gpt_neo")
    assert assert_exact(model, pairs(SHORT)).engine in SHARED
    long = assert_exact(model, pairs(LONG))
    assert (long.engine, "packed logits differ" in long.reason) == ("unshared", True)
    assert assert_exact(model, pairs(SHORT)).engine in SHARED


def test_a_window_that_binds_for_a_few_rows_shows_in_half_precision() -> None:
    """Only the last tokens of the second completion reach beyond it; over all rows that is less than rounding."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=24, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):  # weights as small as they are at the start of training
        model = GPTNeoForCausalLM(config).to(dtype).eval()
        assert way_of(model, pairs([(20, 12, 6, 0)])).engine == "unshared"


def test_an_alora_is_switched_on_by_each_text_s_own_tokens() -> None:
    model = randomised(
        get_peft_model(
            build("llama"),
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[TRIGGER]),
        )
    )
    attacked(model, pairs(LONG))  # without the tokens first
    found = assert_exact(model, pairs(LONG, TRIGGER))
    assert (found.engine, "aLoRA" in found.reason) == ("alone", True)


# ---- 2: plain passes whose rows, padding or later tokens matter


class RowMean(nn.Module):
    """Adds the mean of all rows' first tokens: what stands in a pass beside a text moves its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x[:, :1].mean(0, keepdim=True)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_rows_that_depend_on_each_other_run_alone(engine: str) -> None:
    model = build("llama")
    model.model.layers[2].mlp = RowMean(model.model.layers[2].mlp)
    found = assert_exact(model, pairs(SHORT), engine=engine)
    assert (found.engine, "padded pass" in found.reason) == ("alone", True)
    rows = LatentPGD(model, SITES, engine=engine).rows(found.batch, found)
    assert rows.logits.shape[0] == sum(found.batch.counts)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_batch_of_one_pair_says_nothing_of_rows_that_depend_on_each_other(engine: str) -> None:
    model = build("llama")
    model.model.layers[2].mlp = RowMean(model.model.layers[2].mlp)
    assert_exact(model, pairs(SHORT).pairs([0]), engine=engine)
    assert_exact(model, pairs(SHORT), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_of_one_length_say_nothing_of_shorter_ones_beside_them(kind: str, engine: str) -> None:
    """Beyond a length these positions change for all rows of a pass, and by its longest one."""
    own = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 32} | own
    model = build("llama", rope_parameters=rope, max_position_embeddings=128 if kind == "longrope" else 32)
    assert_exact(model, pairs([(34, 6, 6, 0)] * 2), engine=engine)
    assert_exact(model, pairs([(34, 6, 6, 0), (8, 4, 4, 0)]), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_tokens_that_see_later_ones_are_refused(engine: str) -> None:
    with pytest.raises(RuntimeError, match="lets tokens see later ones"):
        LatentPGD(build("xlnet"), "embedding", engine=engine).attack(pairs(SHORT))


class SeesAll(nn.Module):
    """Adds the mean of a whole row where that is longer than 24 tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (x.mean(1, keepdim=True) if x.shape[1] > 24 else 0.0)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_later_tokens_that_longer_rows_alone_see_are_refused_there(engine: str) -> None:
    model = build("llama")
    model.model.layers[0].mlp = SeesAll(model.model.layers[0].mlp)
    assert_exact(model, pairs([(6, 4, 3, 0), (5, 3, 3, 0)]), engine=engine)
    with pytest.raises(RuntimeError, match="lets tokens see later ones"):
        attacked(model, pairs(LONG), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_router_that_averages_over_a_pass_gets_one_text_a_pass(engine: str) -> None:
    lily = LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = get_peft_model(build("llama"), lily).eval()
    for trained in (False, True):  # a new adapter changes nothing yet, and what is remembered of it must hold later
        model = randomised(model) if trained else model
        before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        found = assert_exact(model, pairs(SHORT), engine=engine)
        assert (found.engine, "move the logits before them" in found.reason) == ("alone", True)
        for name, p in model.named_parameters():
            assert p.data_ptr() == before[name][0]
            assert torch.equal(p, before[name][1])


# ---- 3: gradients that are not the model's


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.saved_tensors[0].flip(0), None


class Repacked(nn.Linear):
    """As bitsandbytes' 4-bit layers on a CPU: a pass without gradients changes the weights' order for a kernel that
    has no backward of its own, and later gradients are those of other weights."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = plain.weight
        self.support_avx512bf16_for_cpu, self.packed = True, False

    def forward(self, x: Tensor) -> Tensor:
        self.packed |= self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        return _Wrong.apply(x, self.weight) if self.packed else super().forward(x)


def test_layers_are_not_repacked_by_passes_without_gradients() -> None:
    model, plain = build("llama"), build("llama")
    for block in model.model.layers:
        block.mlp.down_proj = Repacked(block.mlp.down_proj)
    found, wanted = attacked(model, pairs(SHORT)), attacked(plain, pairs(SHORT))
    assert not any(block.mlp.down_proj.packed for block in model.model.layers)
    assert all(block.mlp.down_proj.support_avx512bf16_for_cpu for block in model.model.layers)
    assert torch.allclose(found.history["total"], wanted.history["total"])


def wrong() -> Any:
    """A model with wrong gradients."""
    model = build("llama")
    for block in model.model.layers:
        block.mlp.down_proj = Repacked(block.mlp.down_proj)
        block.mlp.down_proj.packed = True
    return model


def test_wrong_gradients_are_refused_by_the_layers_name() -> None:
    with pytest.raises(RuntimeError, match=r"not those of its losses.*Repacked.*finite differences"):
        attacked(wrong(), pairs(SHORT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wrong_gradients_are_refused_in_half_precision(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=r"not those of its losses.*Repacked"):
        attacked(wrong().to(dtype), pairs(SHORT))


def test_gradients_that_rounding_turns_are_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Weights this large: along bfloat16's gradient the loss rises by less than half of what its norm says."""
    model = build("llama")
    draw_weights(model, 0, 0.6)
    attacked(model.to(torch.bfloat16), pairs(LONG))
    assert "one rounding of its embeddings turns the gradients" in caplog.text


class _Weaker(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 0.7 * grads[0]


def test_a_layer_whose_backward_is_wrong_is_refused_however_little_it_adds() -> None:
    """peft 0.21.2 turns the gradient of C3A's inputs about: a few percent here, at right angles to the rest."""
    config = C3AConfig(task_type="CAUSAL_LM", block_size=8, target_modules=["q_proj", "o_proj"])
    with pytest.raises(RuntimeError, match=r"not those of its losses: \S*C3ALinear passes on other"):
        attacked(randomised(get_peft_model(build("llama"), config)), pairs(SHORT))


def test_merged_adapters_say_nothing_of_the_gradients_of_others() -> None:
    config = C3AConfig(task_type="CAUSAL_LM", block_size=8, target_modules=["q_proj", "o_proj"])
    model = randomised(get_peft_model(build("llama"), config))
    attacked(model, pairs(SHORT), merge_adapters=True)
    with pytest.raises(RuntimeError, match=r"not those of its losses: \S*C3ALinear passes on other"):
        attacked(model, pairs(SHORT))


class _InEightBits(Tensor):
    """As torchao's int8 weights with dynamic activations: a product with one is a constant to autograd."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        return nn.functional.linear(_in_eight_bits(args[0]), args[1].as_subclass(Tensor).detach(), *args[2:])


@torch.no_grad()
def _in_eight_bits(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def with_weights_of(layer: Any) -> None:
    layer._parameters["weight"] = layer.weight.detach().as_subclass(_InEightBits)


def with_another_forward(layer: Any) -> None:  # as compressed-tensors does
    layer.forward = lambda x: nn.functional.linear(_in_eight_bits(x), layer.weight.detach())


@pytest.mark.parametrize("quantise", [with_weights_of, with_another_forward])
@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_quantise_their_inputs_without_a_gradient_are_refused(quantise: Any, lora: bool) -> None:
    """All layers do. What is left is the residual stream's gradient, along which the losses rise still."""
    model = build("llama")
    for name, module in model.model.named_modules():
        if name.endswith("_proj"):
            quantise(module)
    named = quantise.__name__.replace("_", " ")
    with pytest.raises(RuntimeError, match=rf"not those of its losses: torch.nn.modules.linear.Linear {named}"):
        attacked(get_peft_model(model, LoraConfig(**ALL)) if lora else model, pairs(SHORT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_other_tuners_pass_on_their_own_gradients(dtype: torch.dtype) -> None:
    for config in (HRAConfig(**ALL), IA3Config(feedforward_modules=["down_proj"], **ALL)):
        attacked(randomised(get_peft_model(build("llama").to(dtype), config)), pairs(SHORT))


def test_gradients_are_checked_on_a_text_that_has_some() -> None:
    """The longest text has no attacked position."""
    batch = pairs(SHORT)
    batch.attack_mask[0] = False
    with pytest.raises(RuntimeError, match="not those of its losses"):
        attacked(wrong(), batch)


def test_gradients_that_could_not_be_checked_are_checked_later() -> None:
    batch, model = pairs(SHORT), wrong()
    batch.attack_mask[0] = False
    batch.rejected_mask[1] = batch.chosen_mask[1] = False  # no text has both a label and an attacked position
    attacked(model, batch)
    with pytest.raises(RuntimeError, match="not those of its losses"):
        attacked(model, pairs(SHORT))


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
@pytest.mark.parametrize("spoilt", [Tensor.detach, _Weaker.apply], ids=["detached", "weaker"])
def test_gradients_of_a_part_are_missing(part: str, spoilt: Any) -> None:
    """Autograd's own gradient is then another direction, along which the loss rises still: by some percent more."""
    model = build("llama")

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        return (spoilt(output[0]), *output[1:]) if isinstance(output, tuple) else spoilt(output)

    getattr(model.model.layers[1], part).register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="not those of its losses"):
        attacked(model, pairs(SHORT))


def test_gradients_that_a_model_cuts_off_by_design_are_followed(caplog: pytest.LogCaptureFixture) -> None:
    """hrm_text runs its first cycles without gradients."""
    pytest.importorskip("transformers.models.hrm_text")
    assert LatentPGD(build("hrm_text"), "embedding", **SETTINGS).attack(pairs(SHORT)).engine in SHARED
    assert "HrmTextForCausalLM passes on a part of its gradients by its own code" in caplog.text


def test_a_site_that_no_gradient_reaches_is_named() -> None:
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(RuntimeError, match=r"passes no gradient on to 'embedding', though its losses depend on it"):
        attacked(model, pairs(SHORT))


def test_the_only_site_that_no_gradient_reaches_is_named() -> None:
    """Its gradients are zero, not missing."""
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.detach() + 0 * output)
    with pytest.raises(RuntimeError, match=r"passes no gradient on to 'embedding', though its losses depend on it"):
        LatentPGD(model, "embedding", **SETTINGS).attack(pairs(SHORT))


def test_bitsandbytes_weights_come_back_in_order() -> None:
    pytest.importorskip("bitsandbytes")
    from benchmarks.adapted_models import quantised

    model, clean = quantised("bitsandbytes-nf4"), quantised("bitsandbytes-nf4")
    with torch.no_grad():
        model(input_ids=torch.arange(5, 20)[None], use_cache=False)
    with not_repacked(model):
        own = dict(clean.named_parameters())
        assert all(torch.equal(p.data, own[name].data) for name, p in model.named_parameters())


# ---- 4: merging


def test_layers_that_merging_exchanges_come_back() -> None:
    names = ["input_layernorm", "post_attention_layernorm"]
    model = randomised(get_peft_model(build("llama"), LNTuningConfig(task_type="CAUSAL_LM", target_modules=names)))
    before = {name: id(p) for name, p in model.named_parameters()}
    merged = attacked(model, pairs(SHORT), merge_adapters=True)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())
    assert torch.allclose(merged.history["total"], attacked(model, pairs(SHORT)).history["total"], atol=1e-5)


def test_what_peft_cannot_merge_is_named() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"], lora_bias=True)
    model = randomised(get_peft_model(build("llama"), config))  # whose layers have no bias to merge into
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"peft cannot merge Linear: .*lora_bias.*use merge_adapters=False"):
        attacked(model, pairs(SHORT), merge_adapters=True)
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())


class Subclass(Tensor):
    """As torchao's quantised weights: not a plain tensor."""


def test_weights_that_are_no_plain_tensors_are_not_merged_into() -> None:
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Subclass), requires_grad=False)
    with pytest.raises(ValueError, match=r"is a Subclass, which peft.*merge_adapters=False"):
        attacked(model, pairs(SHORT), merge_adapters=True)


def test_merging_that_changes_the_answer_is_refused() -> None:
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    own = layer.get_delta_weight
    layer.get_delta_weight = lambda adapter: 3 * own(adapter)
    with pytest.raises(ValueError, match="merging Linear moves the logits"):
        attacked(model, pairs(SHORT), merge_adapters=True)


def test_a_fault_shows_in_new_adapters_that_begin_at_one() -> None:
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=[])
    model = get_peft_model(build("llama"), ia3)
    for block in model.get_base_model().model.layers:
        layer = block.mlp.down_proj
        assert bool((layer.ia3_l["default"] == 1).all())
        layer.merge = lambda *_, layer=layer, **__: layer.merged_adapters.append("default")  # merges nothing
    with pytest.raises(ValueError, match="merging Linear moves the logits"):
        attacked(model, pairs(SHORT), merge_adapters=True)
    assert all(bool((block.mlp.down_proj.ia3_l["default"] == 1).all()) for block in model.get_base_model().model.layers)


# ---- 5: virtual tokens


@pytest.mark.parametrize("engine", ["auto", "stack", "packed", "reference"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, partial(PromptEncoderConfig, encoder_hidden_size=16)])
def test_virtual_tokens_are_refused_by_every_engine(kind: Any, engine: str) -> None:
    model = get_peft_model(build("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    for sites in (SITES, ["embedding"]):
        with pytest.raises((ValueError, RuntimeError), match="prompt tuning does"):
            LatentPGD(model, sites, engine=engine).attack(pairs(SHORT))


def test_virtual_keys_are_exact() -> None:
    model = get_peft_model(build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert assert_exact(randomised(model), pairs(LONG)).engine == "unshared"


# ---- gradients that are not finite


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        spoilt = grads[0].clone()
        spoilt[0, 1] = torch.inf
        return spoilt


def spoilt_model() -> Any:
    model = build("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, output: _Infinite.apply(output))
    return model


@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_gradients_that_are_not_finite_are_named(engine: str) -> None:
    with pytest.raises(FloatingPointError, match=r"site 'embedding' at inner step 0 is not finite in \d+ of \d+ rows"):
        attacked(spoilt_model(), pairs(SHORT), engine=engine)


def test_gradients_that_are_not_finite_count_as_zero_on_request(caplog: pytest.LogCaptureFixture) -> None:
    found = attacked(spoilt_model(), pairs(SHORT), nonfinite="zero")
    assert all(bool(delta.isfinite().all()) for delta in found.deltas.values())
    assert "rows of gradients were not finite, the first at site 'embedding' in inner step 0" in caplog.text


# ---- 6: dtypes


def test_adapters_other_than_lora_keep_their_dtype() -> None:
    model = build("llama").to(torch.bfloat16)
    tuned = get_peft_model(model, VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj"]))
    for p in tuned.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    found = attacked(randomised(tuned), pairs(SHORT))
    assert float(found.history["total"][-1]) < float(found.history["total"][0])


# ---- 7: depth


def test_a_vision_tower_as_deep_as_the_text_model() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        text_config={"model_type": "llama", "vocab_size": 128, "num_key_value_heads": 2, **sizes},
        image_token_index=127,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    tower = {id(module) for module in model.model.vision_tower.modules()}
    assert not any(id(site.module) in tower for site in LatentPGD(model, ["mlp:1", "attn:3"]).sites)
    assert_exact(model, pairs(SHORT))


# ---- 8: needless slow paths


@pytest.mark.parametrize("kind", ["roberta", "longcat_flash"])
def test_what_is_exact_is_packed(kind: str) -> None:
    assert assert_exact(build(kind), pairs(LONG)).engine in SHARED


def test_chosen_keys_are_exact_until_they_are_chosen() -> None:
    """Texts with no more keys than the attention chooses are packed, longer ones run alone: equal keys go by length."""
    model = build("deepseek_v32")
    assert assert_exact(model, pairs(SHORT)).engine in SHARED
    assert assert_exact(model, pairs(LONG)).engine == "alone"


def test_positions_that_skip_padding_tokens_skip_them_within_a_text() -> None:
    model, batch = build("roberta"), pairs(SHORT)
    assert assert_exact(model, batch).engine in SHARED
    batch.rejected_ids[:, 1] = batch.chosen_ids[:, 1] = model.config.pad_token_id
    assert assert_exact(model, batch).engine == "unshared"


def test_peft_s_mixed_model_is_packed() -> None:
    mixed = PeftMixedModel(build("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert assert_exact(randomised(mixed), pairs(SHORT)).engine in SHARED


# ---- 9: checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_after_the_attack_was_applied(reentrant: bool) -> None:
    """Blocks whose activations are checkpointed run again for their gradients, under the attack."""
    batch, grads = pairs(SHORT), []
    for checkpointed in (False, True):
        model = build("llama")
        found = LatentPGD(model, ["embedding", "attn:1"], **SETTINGS | {"step_size": 0.5, "epsilon": 3.0}).attack(batch)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        with found.applied():
            logits = model(input_ids=batch.rejected_ids, use_cache=False).logits
        logits.float().log_softmax(-1)[..., 5].mean().backward()
        grads.append(model.model.layers[2].self_attn.q_proj.weight.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6 * float(grads[0].abs().max()))


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_blocks_wrapped_by_torch_s_checkpointing(implementation: CheckpointImpl, engine: str) -> None:
    """As accelerate wraps them for FSDP: the attack, and the gradients of the defence, are those of plain blocks."""
    batch, found = pairs(SHORT), []
    for wrapped in (False, True):
        model = build("llama")
        if wrapped:
            blocks = model.model.layers
            for index, block in enumerate(list(blocks)):
                blocks[index] = checkpoint_wrapper(block, checkpoint_impl=implementation)
        pgd = LatentPGD(model, ["embedding", "attn:1"], engine=engine, **SETTINGS)
        attack = pgd.attack(batch)
        pgd.rows(batch, attack).logits.float().log_softmax(-1)[:, 5].mean().backward()
        grads = [p.grad for name, p in model.named_parameters() if "layers.2" in name and "q_proj" in name]
        found.append((attack.history["total"], grads[0]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4 * float(found[0][1].abs().max()))


def test_a_packed_row_may_be_longer_than_the_positions_that_the_model_has() -> None:
    model = build("gpt2", max_position_embeddings=64)
    batch = pairs([(59, 3, 1, 0), (0, 50, 50, 0)])
    assert_exact(model, batch)
