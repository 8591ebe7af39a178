"""fused_latent_pgd does what an eager loop of the public kind does, and its hooks stay out of the way."""

import copy
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lpa_kernels.compat import clear_hooks, fused_latent_pgd
from lpa_kernels.compat.latent_at import _autocast
from lpa_kernels.compat.latent_at_hooks import GDAdversary
from lpa_kernels.model.facts import model_key
from tests.support import foreign
from tests.support.lat_setting import LAYERS, assert_same, call, lat_batch, small_model

PUBLIC = {
    "batch": None, "model": None, "model_layers_module": None, "layer": None, "epsilon": None, "learning_rate": None,
    "pgd_iterations": None, "loss_coefs": None, "l2_regularization": 0, "device": "cuda", "log_loss": True,
    "return_loss_over_time": False, "clip_grad": None, "accelerator": None, "add_completions_pgd": False,
}  # fmt: skip


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["adv_tokens"]).logits


def test_signature_is_the_public_one_then_keywords():
    parameters = list(inspect.signature(fused_latent_pgd).parameters.values())
    positional, rest = parameters[: len(PUBLIC)], parameters[len(PUBLIC) :]
    defaults = {p.name: None if p.default is p.empty else p.default for p in positional}
    assert list(defaults) == list(PUBLIC)
    assert defaults == PUBLIC
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in positional)
    assert rest
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer": 2},
        {"layer": "embedding"},
        {"add_completions_pgd": True, "learning_rate": 1e-3},
        {"loss_coefs": {"toward": 1.0, "away": 0.0}},
        {"loss_coefs": {"away": 0.7}},
        {"loss_coefs": {"dpo": 1.0}},
        {"l2_regularization": 0.5},
        {"l2_regularization": 0.5, "log_loss": False},
        {"log_loss": False},
        {"clip_grad": 0.05, "layer": [2]},
    ],
    ids=str,
)
def test_same_as_the_eager_loop(changes):
    ours, theirs = (
        call(f, lat_batch(), small_model(), **changes) for f in (fused_latent_pgd, foreign.projected_gradient_descent)
    )
    assert_same(ours, theirs)


def test_plain_model_last_losses_positional_call():
    batch, results = lat_batch(), []
    for function in (fused_latent_pgd, foreign.projected_gradient_descent):
        losses, wrappers = function(
            batch, small_model(lora=False), LAYERS[False], [1], 1.0, 5e-2, 3, {"toward": 1, "away": 1}, 0, "cpu"
        )
        results.append(([losses], wrappers))
    assert_same(*results)


def test_unrelated_texts_without_prompt_mask():
    batch = lat_batch(prompt_mask=False)
    ours, theirs = (
        call(f, batch, small_model(lora=False), lora=False, layer=2, loss_coefs={"toward": 1, "away": 1})
        for f in (fused_latent_pgd, foreign.projected_gradient_descent)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("form", ["lists", "tensors"])
def test_explicit_labels_with_ignored_ones(form):
    batch = lat_batch()
    batch["adv_labels"], batch["def_labels"] = [[5, 6], [7, -100]], [[1, -100, 3], [4, 5, 6]]
    if form == "tensors":
        batch |= {k: torch.tensor([x for row in batch[k] for x in row]) for k in ("adv_labels", "def_labels")}
    ours, theirs = (call(f, batch, small_model()) for f in (fused_latent_pgd, foreign.projected_gradient_descent))
    assert_same(ours, theirs)


def test_kept_wrappers_leave_what_is_known_of_the_model():
    """Else every micro-batch would find out anew how the model can be run."""
    model, batch = small_model(), lat_batch()
    _, first = call(fused_latent_pgd, batch, model)
    for wrapper in first:
        wrapper.enabled = False
    key = model_key(model)
    _, second = call(fused_latent_pgd, batch, model)
    assert len(first) == len(second) == 3
    assert model_key(model) != key  # an attack in force makes another model of it
    for wrapper in second:
        wrapper.enabled = False
    assert model_key(model) == key


def test_half_a_batch_is_enough_for_one_term():
    batch = {k: v for k, v in lat_batch().items() if not k.startswith("def")}
    model = small_model()
    alone = call(fused_latent_pgd, batch, model, loss_coefs={"toward": 1.0})
    assert_same(alone, call(fused_latent_pgd, lat_batch(), small_model(), loss_coefs={"toward": 1.0}))
    with pytest.raises(KeyError, match="def_tokens"):
        call(fused_latent_pgd, batch, model)


@pytest.mark.parametrize("coefs", [{"toward": 0.5, "away": 0.5}, {"dpo": 1.0}], ids=str)
def test_accelerator_places_the_batch_and_scales_the_loss(coefs):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gradient_accumulation_steps=4, backward=lambda loss: (loss / 4).backward()
    )
    changes = {"accelerator": accelerator, "l2_regularization": 0.5, "device": "meta", "loss_coefs": coefs}
    ours, theirs = (
        call(f, lat_batch(), small_model(), **changes) for f in (fused_latent_pgd, foreign.projected_gradient_descent)
    )
    assert_same(ours, theirs)


def test_clip_grad_is_joint_and_says_so(caplog):
    both, last = (
        call(f, lat_batch(), small_model(), layer=[1, 2], clip_grad=1e-9, pgd_iterations=1)[1]
        for f in (fused_latent_pgd, foreign.projected_gradient_descent)
    )
    # Adam's eps makes tiny gradients visible: the first site is clipped here and not there
    first = [float(wrappers[0].hook_fn.attack.detach().norm()) for wrappers in (both, last)]
    assert first[0] < 0.5 * first[1]
    caplog.clear()
    model = small_model()
    for _ in range(2):
        call(fused_latent_pgd, lat_batch(), model, clip_grad=1.0)
    assert sum("jointly" in message for message in caplog.messages) == 1


def test_wrappers_toggle_and_serve_several_updates():
    model, batch = small_model(), lat_batch()
    clean, names = logits(model, batch), list(model.state_dict())
    _, wrappers = call(fused_latent_pgd, batch, model)
    assert list(model.state_dict()) == names
    assert not any(w.hook_fn.attack is p for w in wrappers for p in model.parameters())  # no part in a defence's clip
    attacked = logits(model, batch)
    assert not torch.allclose(attacked, clean)
    for _ in range(2):
        for wrapper in wrappers:
            wrapper.enabled = False
        assert torch.equal(logits(model, batch), clean)
        for wrapper in wrappers:
            wrapper.enabled = True
        assert torch.equal(logits(model, batch), attacked)
    model(input_ids=batch["adv_tokens"]).logits.sum().backward()
    assert all(w.hook_fn.attack.grad is None for w in wrappers)
    clear_hooks(model)
    wrappers[0].enabled = True
    assert torch.equal(logits(model, batch), clean)


def test_two_micro_batches_keep_their_own_attack():
    model, batches = small_model(), [lat_batch(seed=1), lat_batch(seed=2)]
    alone = []
    for batch in batches:
        _, wrappers = call(fused_latent_pgd, batch, model)
        alone.append(logits(model, batch))
        clear_hooks(model)
    kept = []
    for batch in batches:
        kept.append(call(fused_latent_pgd, batch, model)[1])
        for wrapper in kept[-1]:
            wrapper.enabled = False
    for batch, wrappers, expected in zip(batches, kept, alone, strict=True):
        for wrapper in wrappers:
            wrapper.enabled = True
        # kept wrappers are hooks, beside which the stack is not taken: the same up to the order of sums
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-3)
        for wrapper in wrappers:
            wrapper.enabled = False


def test_a_new_attack_replaces_one_in_force_and_starts_from_the_clean_model():
    model, batch = small_model(), lat_batch()
    first = call(fused_latent_pgd, batch, model)
    second = call(fused_latent_pgd, batch, model)
    assert [step["adv_total"] for step in first[0]] == [step["adv_total"] for step in second[0]]
    attacked = logits(model, batch)
    for wrapper in first[1]:
        wrapper.enabled = False
    assert torch.equal(logits(model, batch), attacked)


def test_generation_under_the_attack():
    model, batch = small_model(lora=False), lat_batch()
    batch = {k: v[:1] for k, v in batch.items()}
    prompt = batch["adv_tokens"][:, :4]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    attention = torch.ones_like(prompt)
    clean = model.generate(prompt, attention_mask=attention, **settings)
    _, wrappers = call(fused_latent_pgd, batch, model, lora=False, epsilon=50.0, learning_rate=1.0)
    cached = model.generate(prompt, attention_mask=attention, **settings)
    expected = prompt
    for _ in range(5):  # no cache: the whole text again, perturbed at the prompt's positions
        with torch.no_grad():
            last = model(input_ids=expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, expected)
    assert not torch.equal(cached, clean)
    assert all(w.enabled for w in wrappers)
    with pytest.raises(ValueError, match=r"batch of 1.*batch of 2"):
        model(input_ids=prompt.repeat(2, 1))
    clear_hooks(model)
    assert torch.equal(model.generate(prompt, attention_mask=attention, **settings), clean)


def test_hooks_leave_with_their_wrappers(caplog):
    model, batch = small_model(), lat_batch()
    clean = logits(model, batch)
    _, wrappers = call(fused_latent_pgd, batch, model)
    assert not torch.allclose(logits(model, batch), clean)
    del wrappers
    assert torch.equal(logits(model, batch), clean)
    assert not caplog.messages  # it was used
    call(fused_latent_pgd, batch, model)[0]
    assert torch.equal(logits(model, batch), clean)
    assert "keep the second value" in caplog.text
    assert not any(m._forward_hooks for m in model.modules())


def test_a_copy_of_an_attacked_model_is_clean_when_the_model_is():
    model, batch = small_model(lora=False), lat_batch()
    clean = logits(model, batch)
    _, wrappers = call(fused_latent_pgd, batch, model, lora=False)
    twin = copy.deepcopy(model)
    clear_hooks(model)
    assert wrappers
    assert torch.equal(logits(twin, batch), clean)


def test_a_model_saved_under_an_attack_is_clean(tmp_path):
    model, batch = small_model(lora=False), lat_batch()
    clean = logits(model, batch)
    _, wrappers = call(fused_latent_pgd, batch, model, lora=False)
    attacked = logits(model, batch)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), batch), clean)
    assert torch.equal(logits(copy.deepcopy(model), batch), attacked)
    assert wrappers


def test_adapters_on_adapters():
    from peft import LoraConfig, get_peft_model

    results = []
    for function in (fused_latent_pgd, foreign.projected_gradient_descent):
        model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")).eval()
        results.append(call(function, lat_batch(), model, model_layers_module="base_model.model." + LAYERS[True]))
    assert_same(*results)


def test_models_in_threads_do_not_meet():
    models = [small_model(seed=seed) for seed in range(3)]

    def attacked(seed):
        model, batch = models[seed], lat_batch(seed=seed)
        losses, wrappers = call(fused_latent_pgd, batch, model)
        assert wrappers
        return losses, logits(model, batch)

    alone = [attacked(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(attacked, range(3)))
    for got, want in zip(together, alone, strict=True):
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1])


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, batch = small_model(), lat_batch()
        wrapped = nn.parallel.DistributedDataParallel(small_model())
        theirs = call(fused_latent_pgd, batch, plain)
        ours = call(fused_latent_pgd, batch, wrapped, model_layers_module="module." + LAYERS[True])
        assert_same(ours, theirs)
        assert torch.equal(logits(wrapped, batch), logits(plain, batch))
        clear_hooks(wrapped)
        assert not torch.equal(logits(wrapped, batch), logits(plain, batch))
    finally:
        torch.distributed.destroy_process_group()


def test_public_autocast_is_for_cuda_alone():
    assert _autocast("public", "cuda:0") is torch.float16
    assert _autocast("public", "cpu") is None
    assert _autocast(torch.bfloat16, "cpu") is torch.bfloat16
    results = [call(fused_latent_pgd, lat_batch(), small_model(), autocast=value)[0] for value in ("public", None)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": [1, 9]}, "no layer 9"),
        ({"layer": ["mlp"]}, "layer numbers"),
        ({"model_layers_module": "transformer.h"}, "transformer.h"),
        ({"accumulation": "all"}, "accumulation='all'"),
        ({"autocast": "half"}, "autocast='half'"),
        ({"model": nn.Linear(2, 2)}, "Linear is no causal language model"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(fused_latent_pgd, lat_batch(), changes.pop("model", small_model()), **changes)


def test_an_error_in_the_loop_leaves_the_model_clean():
    model, batch = small_model(), lat_batch()
    broken = {**batch, "adv_tokens": batch["adv_tokens"] + 10_000}
    with pytest.raises(IndexError):
        call(fused_latent_pgd, broken, model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert any(p.requires_grad for p in model.parameters())


def test_the_adversary_alone():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    adversary = GDAdversary(4, 1.0, mask)
    adversary.attack.data.fill_(1.0)
    adversary.clip_attack()
    torch.testing.assert_close(adversary.attack.norm(dim=-1), torch.ones(2, 3))
    hidden = torch.zeros(2, 5, 4)
    out, other = adversary((hidden, "kept"))
    assert other == "kept"
    assert not hidden.any()
    assert torch.equal(out[:, :3].any(-1), mask)
    assert not out[:, 3:].any()
    assert torch.equal(adversary(hidden[:, :2]).any(-1), mask[:, :2])
    assert adversary(hidden[:, :1]).sum() == 0
    first = GDAdversary(4, 1.0, mask[:, :1])
    first.attack.data.fill_(1.0)
    assert first(hidden)[0, 0].all()
    assert not first(hidden[:, :1]).any()  # a step of generation
    half = GDAdversary(4, 1.0, mask, dtype=torch.bfloat16)
    half.attack.data.fill_(0.5)
    assert torch.equal(half(hidden.bfloat16())[:, :3].any(-1), mask)


class TuplePiece(nn.Module):
    def forward(self, x):
        return x * 1.0, "state"


def test_an_attack_as_a_plain_forward_hook_of_any_module():
    from lpa_kernels import LatentPGD
    from lpa_kernels.compat.latent_at import pair_batch

    pairs = pair_batch(lat_batch(), {"toward": 1, "away": 1}, False, "cpu")
    attack = LatentPGD(small_model(), ["mlp:1", "embedding"], steps=2, step_size=1e-2).attack(pairs)
    for module in (nn.Identity(), TuplePiece()):
        handle = module.register_forward_hook(attack.hook("mlp:1"))
        hidden = torch.zeros(2, 10, 32)
        out = module(hidden)
        out = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(out, attack.delta("mlp:1"))
        handle.remove()


def test_dropped_micro_batches_do_not_pile_up():
    model = small_model()
    for seed in range(3):
        _, wrappers = call(fused_latent_pgd, lat_batch(seed=seed), model)
        for wrapper in wrappers:
            wrapper.enabled = False
    del wrappers, wrapper
    gc.collect()
    assert not any(m._forward_hooks for m in model.modules())
