"""PGDOptimizer and project_ in the loops that people write themselves, as docs/migrate.md shows them."""

import pytest
import torch

from lpa_kernels import PGDOptimizer, project_
from tests.support.foreign.wrappers import GDAdversary
from tests.support.lat_setting import LAYERS, lat_batch, small_model


def perturbed_losses(update):
    """A loop of the kind of obfuscated-activations: random start, wrappers, AdamW, a clip of the norms."""
    from tests.support.foreign.trainer import both_losses
    from tests.support.foreign.wrappers import wrap

    model, batch = small_model(), lat_batch()
    adversaries = [GDAdversary(32, 1.0, batch["prompt_mask"]) for _ in range(2)]
    torch.manual_seed(0)
    for i, adversary in enumerate(adversaries):
        torch.nn.init.kaiming_uniform_(adversary.attack)
        adversary.clip_attack()
        wrap(model, f"{LAYERS[True]}.{i}", "mlp", adversary)
    params, losses = [a.attack for a in adversaries], []
    step = update(params, adversaries)
    for _ in range(5):
        for p in params:
            p.grad = None
        losses.append(both_losses(model, batch, "adv", "def", {"toward": 1}, [], torch.Tensor.backward)["total"])
        torch.nn.utils.clip_grad_norm_(params, 1)
        step()
    return losses, [p.detach().clone() for p in params]


def with_adamw(params, adversaries):
    optimizer = torch.optim.AdamW(params, lr=0.2)

    def step():
        optimizer.step()
        for adversary in adversaries:
            adversary.clip_attack()

    return step


def test_pgd_optimizer_is_adamw_and_the_clip():
    theirs = perturbed_losses(with_adamw)
    ours = perturbed_losses(lambda params, adversaries: PGDOptimizer(params, lr=0.2, epsilon=1.0).step)
    assert ours[0] == pytest.approx(theirs[0], abs=2e-6)
    assert theirs[0][-1] < theirs[0][0]
    for got, want in zip(ours[1], theirs[1], strict=True):
        assert float(want.norm(dim=-1).max()) == pytest.approx(1.0, abs=1e-5)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(32,), (1, 5, 32)], ids=["steering vector", "soft prompt"])
def test_pgd_optimizer_without_a_ball_on_vectors_and_prompts(shape):
    """The kind of EleutherAI/unlearn: one vector for all positions, or a few soft tokens, AdamW alone."""
    results = []
    for make in (torch.optim.AdamW, PGDOptimizer):
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = make([p], lr=0.1)
        target = torch.linspace(-1, 1, 32)
        for _ in range(4):
            optimizer.zero_grad()
            ((p - target) ** 2).sum().backward()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert float(results[0].abs().max()) > 0.1


def test_project_a_shifted_embedding_back_to_its_ball():
    """The kind of AdversariaLLM: the embeddings themselves are moved, then their distance is cut."""
    draw = torch.Generator().manual_seed(0)
    original = torch.randn(2, 6, 32, generator=draw)
    moved = original + torch.randn(2, 6, 32, generator=draw) * torch.tensor([0.01, 1.0]).repeat(3)[:, None]
    found = original + project_(moved - original, 0.5)
    distance = (moved - original).norm(dim=-1, keepdim=True)
    expected = original + (moved - original) * torch.where(distance > 0.5, 0.5 / distance, 1.0)
    torch.testing.assert_close(found, expected)
    assert (distance > 0.5).any()
    assert (distance < 0.5).any()


def test_project_by_example_as_freelb_does():
    """One ball an example: the same call on the flattened perturbation."""
    delta = (
        torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.01, 1.0, 2.0])[:, None, None]
    )
    before = delta.clone()
    project_(delta.flatten(1), 1.0)
    norms = before.flatten(1).norm(dim=1)
    torch.testing.assert_close(delta, before / norms.clamp(min=1)[:, None, None])
    assert (norms > 1).tolist() == [False, True, True]
