"""The tiny models and batches of these tests, in the public code's keys."""

import torch

from tests.support.models import VOCAB, tiny

LAYERS = {False: "model.layers", True: "base_model.model.model.layers"}


def small_model(lora=True, seed=0, family="llama"):
    model = tiny(family, seed=seed, device="cpu")
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def lat_batch(size=2, seed=0, prompt_mask=True):
    """Prompts of 4 and 6 tokens in turn with completions of 2 and 3; without prompt_mask, unrelated texts."""
    draw = torch.Generator().manual_seed(seed)
    length, at = 10, torch.arange(10)
    start = torch.tensor([4, 6] * size)[:size, None]
    adv = torch.randint(1, VOCAB, (size, length), generator=draw)
    other = torch.randint(1, VOCAB, (size, length), generator=draw)
    if not prompt_mask:  # as for unlearning: every token of both texts is a label
        return {
            "adv_tokens": adv, "def_tokens": other, "adv_labels_mask": at < start + 2, "def_labels_mask": at < start + 3
        }  # fmt: skip
    return {
        "adv_tokens": adv,
        "def_tokens": torch.where(at < start, adv, other),
        "prompt_mask": at < start,
        "adv_labels_mask": (at >= start) & (at < start + 2),
        "def_labels_mask": (at >= start) & (at < start + 3),
    }


def call(function, batch, model, lora=True, **changes):
    """The public call, by keywords."""
    setting = {
        "batch": batch, "model": model, "model_layers_module": LAYERS[lora], "layer": ["embedding", 1, 3],
        "epsilon": 1.0, "learning_rate": 5e-2, "pgd_iterations": 4, "loss_coefs": {"toward": 0.5, "away": 0.5},
        "device": "cpu", "return_loss_over_time": True,
    }  # fmt: skip
    return function(**{**setting, **changes})


def assert_same(ours, theirs):
    """Losses within 2e-6 (of themselves above 1), perturbations within 1e-3 of the largest entry."""
    for got, want in zip(ours[0], theirs[0], strict=True):
        assert set(got) == set(want)
        for name in want:
            assert abs(got[name] - want[name]) < 2e-6 * max(1, abs(want[name])), name
    for got, want in zip(ours[1], theirs[1], strict=True):
        want = want.hook_fn.attack.detach()
        assert float(want.abs().max()) > 1e-3
        torch.testing.assert_close(got.hook_fn.attack.detach(), want, rtol=0, atol=1e-3 * float(want.abs().max()))
