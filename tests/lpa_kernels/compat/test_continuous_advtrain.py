"""EmbeddingSpaceAttack gives what a plain one-hot loop of its kind gives, without its faults and its memory."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lpa_kernels.compat import EmbeddingSpaceAttack
from tests.support.lat_setting import small_model
from tests.support.models import VOCAB, tiny


class SignSGD(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["lr"] * p.grad.sign())


OPTIMIZERS = {"adam": torch.optim.Adam, "rms": torch.optim.RMSprop, "sign": SignSGD}


def one_hot_loop(model, weights, ids, targets, attention, kind, lr, iters, eps):
    """The same attack in the plain way: one-hots of the vocabulary, full logits, torch's optimisers."""
    ids, scored = ids.clamp(min=0), targets >= 0
    embeds = F.one_hot(ids, len(weights)).to(weights.dtype) @ weights
    wanted = F.one_hot(targets.clamp(min=0), len(weights)).to(weights.dtype)[:, 1:][scored[:, 1:]]
    mask = (~scored & attention.bool())[..., None]
    delta = torch.zeros_like(embeds, requires_grad=True)
    optimizer, losses, hit = OPTIMIZERS[kind]([delta], lr=lr), [], []
    for _ in range(iters):
        optimizer.zero_grad()
        logits = model(inputs_embeds=embeds + delta * mask, attention_mask=attention).logits[:, :-1]
        loss = F.cross_entropy(logits[scored[:, 1:]], wanted)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.div_((delta.norm(dim=-1, keepdim=True) / eps).clamp(min=1))
        losses.append(loss.item())
        right = (logits.argmax(-1) == targets[:, 1:]) | ~scored[:, 1:]
        hit.append(int(right.all(1).sum()))
    return embeds, delta.detach(), mask.long(), losses, hit


def batch(size=3, left=False, first_target=None):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (size, 9), generator=draw)
    targets = torch.where(torch.arange(9) >= 5, ids, -100)
    if first_target is not None:
        targets[:, 5] = ids[:, 5] = first_target
    attention = torch.ones_like(ids)
    if left:
        attention[0, :2] = 0
    else:
        attention[0, 8:] = 0
        targets[0, 8:] = -100
    return ids, targets, attention


def weights_of(model):
    return model.get_input_embeddings().weight.detach()


def make(model, **changes):
    setting = {"iters": 4, "opt_config": {"type": "adam", "lr": 0.05}, "eps": 0.1}
    return EmbeddingSpaceAttack(weights_of(model), "### Response:", None, **{**setting, **changes})


@pytest.mark.parametrize("left", [True, False], ids=["left padded", "right padded"])
@pytest.mark.parametrize("kind", ["adam", "sign", "rms"])
def test_same_as_the_one_hot_loop(kind, left):
    model, data = small_model(), batch(left=left)
    attack = make(model, opt_config={"type": kind, "lr": 0.02}, iters=8)
    ours = attack.attack(model, *data)
    expected = one_hot_loop(model, weights_of(model), *data, kind, 0.02, 8, float(attack.eps))
    for got, want in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))
        assert got.dtype == want.dtype
    assert ours[3] == pytest.approx(expected[3], abs=5e-6)
    assert ours[4] == expected[4]
    assert ours[3][-1] < ours[3][0]
    norms = ours[1].norm(dim=-1)
    assert float(norms.max()) <= float(attack.eps) * 1.0001
    adv = attack.get_adv_embeddings(*ours[:3])
    torch.testing.assert_close(adv, expected[0] + expected[1] * expected[2], rtol=0, atol=1e-3)


def test_affirmative_responses_count_whole_examples():
    model, data = small_model(), batch()
    attack = make(model, iters=30, eps=20.0, opt_config={"type": "adam", "lr": 0.3})
    result = attack.attack(model, *data)
    expected = one_hot_loop(model, weights_of(model), *data, "adam", 0.3, 30, float(attack.eps))
    assert result[4] == expected[4]
    assert max(result[4]) > 0
    assert min(result[4]) < 3


def test_token_zero_is_a_target_like_any_other():
    model, data = small_model(), batch(first_target=0)
    attack = make(model)
    result = attack.attack(model, *data)
    expected = one_hot_loop(model, weights_of(model), *data, "adam", 0.05, 4, float(attack.eps))
    assert result[3] == pytest.approx(expected[3], abs=5e-6)
    assert not result[2][:, 5].any()


def test_relative_lr_is_a_share_of_the_radius_and_the_callers_setting_is_left_alone():
    model, data, config = small_model(), batch(), {"type": "adam", "lr": 0.5}
    relative = make(model, opt_config=config, relative_lr=True)
    assert config == {"type": "adam", "lr": 0.5}
    mean = weights_of(model).norm(dim=-1).mean()
    torch.testing.assert_close(relative.eps, 0.1 * mean)
    absolute = make(model, opt_config={"type": "adam", "lr": 0.5 * 0.1 * float(mean)})
    assert relative.attack(model, *data)[3] == pytest.approx(absolute.attack(model, *data)[3], abs=1e-6)


def test_defaults_are_the_public_ones():
    model = tiny("llama", device="cpu")
    attack = EmbeddingSpaceAttack(weights_of(model), response_key="x", tokenizer=None)
    assert (attack.iters, attack.opt_config) == (8, {"type": "sign", "lr": 0.01})
    torch.testing.assert_close(attack.eps, 0.01 * attack.embedding_norm)
    assert (attack.vocab_size, attack.embedding_size) == (VOCAB, 32)


def test_the_model_is_left_as_it_was():
    model, data = small_model(), batch()
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # the loop needs gradients, whatever is around it
        make(model).attack(model, *data)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_the_rows_of_targets_reach_the_head():
    model, data, sizes = tiny("llama", device="cpu"), batch(), []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape))
    make(model).attack(model, *data)
    handle.remove()
    labels = int((data[1][:, 1:] >= 0).sum())
    assert sizes == [(1, labels, VOCAB)] * 4


def test_low_precision_embeddings_get_a_perturbation_of_their_dtype():
    model, data = tiny("llama", dtype=torch.bfloat16, device="cpu"), batch()
    attack = make(model)
    result = attack.attack(model, *data)
    assert {result[0].dtype, result[1].dtype} == {torch.bfloat16}
    assert attack.eps.dtype == torch.float32
    assert result[3][-1] < result[3][0]
    model(inputs_embeds=attack.get_adv_embeddings(*result[:3]), attention_mask=data[2])


def test_no_steps_change_nothing():
    model = tiny("llama", device="cpu")
    result = make(model, iters=0).attack(model, *batch())
    assert result[3:] == ([], [])
    assert not result[1].any()


def test_bad_input_is_named(caplog):
    model = tiny("llama", device="cpu")
    with pytest.raises(ValueError, match="init_type='prefix'"):
        make(model, init_type="prefix")
    with pytest.raises(NotImplementedError, match="suffix"):
        make(model, init_type="suffix")
    with pytest.raises(ValueError, match=r"'lion'.*sign, adam, rms"):
        make(model, opt_config={"type": "lion", "lr": 1})
    make(model, detector=3)
    assert "ignores the arguments ['detector']" in caplog.text
    ids, targets, attention = batch()
    with pytest.raises(ValueError, match="no target"):
        make(model).attack(model, ids, torch.full_like(targets, -100), attention)
    with pytest.raises(ValueError, match="no token of the prompt"):
        make(model).attack(model, ids, ids, attention)
