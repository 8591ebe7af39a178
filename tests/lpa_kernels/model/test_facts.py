"""Facts about a model: they hold as long as their key does, and what others change about a model changes the key."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lpa_kernels.attack import LatentPGD, shared_prefix
from lpa_kernels.attack.probe import can_pack
from lpa_kernels.model import forget, say_once
from lpa_kernels.model.facts import NotYet, has_foreign_hooks, is_recorder, known, model_key, remembered
from lpa_kernels.model.frozen import can_freeze
from lpa_kernels.model.hooks import forwards, hooked
from tests.support.batches import assert_same, attack_with, llama, pairs, with_lora
from tests.support.models import DEVICE, tiny


def test_a_fact_is_found_out_once_for_a_key() -> None:
    model, asked = llama(), []
    find = lambda: asked.append(1) or len(asked)  # noqa: E731
    assert [remembered(model, "n", key, find) for key in ("a", "a", "b", "a")] == [1, 1, 2, 1]
    assert remembered(model, "m", "a", find) == 3
    forget(model)
    assert remembered(model, "n", "a", find) == 4


def test_an_answer_for_now_is_asked_for_again() -> None:
    model, answers = llama(), [NotYet(0), NotYet(1), 2, 3]

    def find() -> int:
        answer = answers.pop(0)
        if isinstance(answer, NotYet):
            raise answer
        return answer

    assert [remembered(model, "n", None, find) for _ in range(4)] == [0, 1, 2, 2]


def test_facts_die_with_their_model() -> None:
    model = llama()
    LatentPGD(model, ["mlp:2"], steps=1, engine="packed").attack(pairs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def identity(*args: Any) -> None: ...


CHANGES = {
    "a hook": lambda model: model.model.layers[3].mlp.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda model: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda model: model.model.layers[3].mlp.register_full_backward_hook(lambda *_: None),
    "another forward": lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: x),
    "a dtype": lambda model: model.model.norm.to(torch.float64),
    "a setting": lambda model: setattr(model.config, "sliding_window", 3),
    "another class": lambda model: setattr(model.model.layers[2].mlp, "act_fn", torch.nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_others_change_about_a_model_changes_its_key(change: Any) -> None:
    model = llama()
    before = model_key(model)
    assert model_key(model) == before
    change(model)
    assert model_key(model) != before


def test_a_hook_on_all_modules_changes_the_key() -> None:
    model = llama()
    before = model_key(model)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(identity)
        try:
            assert model_key(model) != before
        finally:
            handle.remove()
    assert model_key(model) == before


class Unhashable:
    """A forward that compares by value, so Python gives it no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_forward_without_a_hash_has_a_key() -> None:
    model, keys = llama(), set()
    first, second = Unhashable(), Unhashable()
    for forward in (first, second):
        model.model.layers[1].mlp.forward = forward
        keys.add(model_key(model))
    assert len(keys) == 2


def test_two_hooks_in_one_place_have_two_keys() -> None:
    """As many hooks on the same module as before are not the same hooks."""
    model, keys = llama(), set()
    module = model.model.layers[0].mlp
    for _ in range(5):
        handle = module.register_forward_hook(identity)
        keys.add(model_key(model))
        handle.remove()
    assert len(keys) == 5


def test_our_own_hooks_and_forwards_do_not_change_it() -> None:
    model = llama()
    before = model_key(model)
    layer = model.model.layers[0]
    with hooked(after=[(layer, lambda *_: None)], before=[(layer, lambda *_: None)]), forwards([(layer, lambda x: x)]):
        assert model_key(model) == before
    assert "forward" not in layer.__dict__
    assert not layer._forward_hooks


def test_while_a_model_is_known_its_key_stands() -> None:
    model = llama()
    with known(model):
        key = model_key(model)
        model.model.layers[0].register_forward_hook(identity)
        assert model_key(model) == key
    assert model_key(model) != key


def test_the_state_of_adapters_is_in_the_key() -> None:
    model = with_lora(llama())
    keys = [model_key(model)]
    with model.disable_adapter():
        keys.append(model_key(model))
    model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] *= 2
    keys.append(model_key(model))
    assert len(set(keys)) == 3


def test_a_message_is_logged_once_a_model(caplog: pytest.LogCaptureFixture) -> None:
    first, second = llama(), llama()
    for model in (first, first, second):
        say_once(model, "it is so")
    say_once(first, "and so", logging.INFO)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == ["it is so", "it is so"]


# ---- facts that went stale -------------------------------------------------------------------------------------------


def shift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Every token gets what the feed-forward gave for the one before: it goes by index."""
    return torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], 1)


def test_a_hook_that_mixes_tokens_is_seen_between_two_attacks() -> None:
    """The last feed-forward treated tokens alone before the hook, and does so no more."""
    batch, sites, options = pairs(), ["embedding", "mlp:1"], {"steps": 3, "step_size": 0.05, "capture_graph": "off"}
    model = tiny("llama")
    LatentPGD(model, sites, engine="packed", **options).attack(batch)
    model.model.layers[-1].mlp.register_forward_hook(shift)
    auto = LatentPGD(model, sites, **options).attack(batch)
    assert_same(auto, LatentPGD(model, sites, engine="reference", **options).attack(batch), losses=1e-5)


def test_a_hook_that_mixes_tokens_is_no_longer_packed() -> None:
    model = tiny("llama")
    assert can_pack(model)
    handle = model.model.layers[-1].mlp.register_forward_hook(shift)
    assert not can_pack(model)
    handle.remove()
    assert can_pack(model)


def test_frozen_blocks_know_one_hook_from_another() -> None:
    """With a hook that puts something aside for a later block, the lowest blocks have to run in every pass."""
    model = tiny("llama")
    first, later = model.model.layers[0].mlp, model.model.layers[3].mlp
    handle = first.register_forward_hook(identity)
    assert can_freeze(model, 2)
    handle.remove()
    aside: list[torch.Tensor] = []
    first.register_forward_hook(lambda m, a, out: aside.append(out))
    later.register_forward_hook(lambda m, a, out: out + aside.pop())
    assert not can_freeze(model, 2)


def moved_later(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Other outputs from the fifth token on, which a probe of four tokens has not."""
    return torch.cat([output[:, :4], output[:, 4:] + 0.5], 1)


@pytest.mark.parametrize(("place", "site"), [("layers.1", "mlp:2"), ("layers.3.mlp", "mlp:1")])
def test_a_hook_that_goes_by_place_gets_all_tokens_and_runs_once_a_pass(place: str, site: str) -> None:
    """On the last block that would be replayed, and on a feed-forward that would run on few tokens."""
    model, options = llama(), {"steps": 3, "step_size": 0.05, "capture_graph": "off"}
    model.model.get_submodule(place).register_forward_hook(moved_later)
    want = LatentPGD(model, [site], engine="reference", **options).attack(pairs())
    assert_same(LatentPGD(model, [site], **options).attack(pairs()), want, losses=1e-5)


def test_what_is_found_out_under_an_attack_is_of_the_perturbed_model() -> None:
    model, batch = llama(), pairs()
    found = LatentPGD(model, ["embedding", "mlp:1"], steps=2, step_size=0.1).attack(batch)
    clean = shared_prefix(model, batch)
    with found.applied(), pytest.raises(RuntimeError, match=r"attack is on a batch of 2.* batch of 1"):
        shared_prefix(model, batch)  # its rows are no plain texts: a perturbation by position would be out of place
    assert torch.equal(shared_prefix(model, batch), clean)


def test_the_log_probabilities_of_a_pair_under_its_attack_are_those_of_plain_calls() -> None:
    model, batch = llama(), pairs().pairs([0])
    found = LatentPGD(model, ["embedding", "mlp:1"], steps=2, step_size=0.1, epsilon=3.0).attack(batch)
    clean = shared_prefix(model, batch)
    with found.applied(), torch.no_grad():
        ours = shared_prefix(model, batch)
        logits = model(input_ids=batch.chosen_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    want = logits.gather(2, batch.chosen_ids[:, 1:, None])[..., 0] * batch.chosen_mask[:, 1:]
    torch.testing.assert_close(ours[1:], want, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, clean, atol=1e-2)


def scaled_adapters(module: Any, args: Any, output: Any) -> Any:
    """Other outputs of every LoRA factor, which are the linear layers with few outputs."""
    return output * 3 if type(module) is nn.Linear and output.shape[-1] < 16 else None


@pytest.mark.parametrize("engine", ["auto", "packed", "reference"])
def test_a_hook_on_all_modules_is_run_in_an_attack(engine: str) -> None:
    """Lean layers and the stack call no hooks of the modules that they stand for."""
    model, batch = with_lora(llama()), pairs()
    pgd = LatentPGD(model, ["mlp:1"], steps=1, engine=engine, capture_graph="off")
    without = float(pgd.attack(batch).history["toward"][0])
    handle = nn.modules.module.register_module_forward_hook(scaled_adapters)
    try:
        found = float(pgd.attack(batch).history["toward"][0])
        with torch.no_grad():
            log_probs = model(input_ids=batch.rejected_ids, use_cache=False).logits.log_softmax(-1)
    finally:
        handle.remove()
    wanted = -log_probs[:, :-1][batch.rejected_mask[:, 1:]].gather(1, batch.labels("rejected")[:, None]).mean()
    assert found == pytest.approx(float(wanted), rel=2e-6)
    assert abs(found - without) > 1e-3


def test_a_backward_hook_that_changes_gradients_is_seen_between_two_attacks() -> None:
    batch, options = pairs(), {"steps": 3, "step_size": 0.05, "capture_graph": "off", "rule": "sgd"}
    model = tiny("llama")
    LatentPGD(model, ["embedding"], **options).attack(batch)
    model.model.layers[2].mlp.register_full_backward_hook(lambda module, grads, _: (grads[0] * 0.5,))
    auto = LatentPGD(model, ["embedding"], **options).attack(batch)
    want = LatentPGD(model, ["embedding"], engine="reference", **options).attack(batch)
    assert_same(auto, want)


class Doubles(nn.Module):
    """A hook that is a module, and one that stands in another's place."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * (args[-1] if self.module is None else self.module(*args, **kwargs))


@pytest.mark.parametrize("kind", ["function", "module", "forward pre-hook", "in the module's place"])
@pytest.mark.parametrize("first", [True, False])
def test_a_hook_of_a_user_is_seen_beside_the_recorders_of_transformers(kind: str, first: bool) -> None:
    """output_hidden_states leaves a recorder on every block, which is no user's hook; one before or after it is."""
    model, recorded = llama(), llama()
    block = model.model.layers[1]

    def record(model: Any = model) -> None:
        with torch.no_grad():
            model(torch.arange(8, device=DEVICE)[None], output_hidden_states=True)

    def put() -> None:
        if kind == "function":
            block.register_forward_hook(lambda module, args, output: 2 * output)
        elif kind == "module":
            block.register_forward_hook(Doubles())
        elif kind == "forward pre-hook":
            block.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        else:
            model.model.layers[1] = Doubles(block)

    (put if first else record)()
    (record if first else put)()
    assert any(map(is_recorder, block._forward_hooks.values())), "transformers has put no recorder there"
    held = model.model.layers[1]
    assert has_foreign_hooks(held) == (kind != "in the module's place")
    record(recorded)
    assert model_key(model) != model_key(recorded) == model_key(llama())
    with pytest.raises(RuntimeError, match=r"engine='stack'"):
        attack_with(model, pairs(), ["embedding"], "stack")
    settings = {"epsilon": 0.1, "step_size": 0.02, "steps": 3}
    want = attack_with(model, pairs(), ["embedding"], "reference", **settings)
    assert_same(attack_with(model, pairs(), ["embedding"], "auto", **settings), want, losses=1e-5)
