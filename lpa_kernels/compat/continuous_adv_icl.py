"""Drop-in for fshp971/continuous-adv-icl (CAT and ER-CAT, ICLR 2026): its attack and its singular-value term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model import frozen_eval, selected_rows

NORMS = ("l-infty", "l2")


class ContinuousAttacker:
    """Finds a perturbation of the prompt's embeddings that makes the harmful target likely.

    The steps and results are those of the public class of `src/cont_at.py` ("Understanding and Improving Continuous
    Adversarial Training for LLMs via In-Context Learning Theory", ICLR 2026): delta goes down the gradient of the mean
    cross entropy, each token's gradient divided by its norm ("l2") or by its sign ("l-infty"), and stays in a ball.
    Only the rows that predict a target reach the head, and delta is kept in float32. Not as there: every module's mode
    comes back (there the model stays in eval mode), and radius=0 or steps=0 runs no pass.

    Args:
        steps, step_size, radius: of the loop. The published ER-CAT has 10, 1e-2 and 0.05, under "l2".
        norm_type: "l2" or "l-infty", of each token's perturbation.
        disable_tqdm: not used: there is no progress bar.

    Raises:
        ValueError: an unknown norm_type.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**size)), torch.tensor([[1, 2, 3]])
    >>> one = torch.ones_like(ids)
    >>> found = ContinuousAttacker(10, 1e-2, 0.05, "l2").attack_embeds(model, None, ids, one, ids, one, "cpu")
    >>> found.shape, bool((found.norm(dim=-1) <= 0.0501).all())
    (torch.Size([1, 3, 8]), True)
    """

    def __init__(
        self, steps: int, step_size: float, radius: float, norm_type: str = "l-infty", disable_tqdm: bool = False
    ) -> None:
        if norm_type not in NORMS:
            raise ValueError(f"norm_type={norm_type!r} is unknown; use one of {', '.join(NORMS)}")
        self.steps, self.step_size, self.radius = steps, step_size, radius
        self.norm_type, self.disable_tqdm = norm_type, disable_tqdm

    def attack_embeds(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        target_ids: Tensor,
        target_mask: Tensor,
        device: Any,
    ) -> Tensor:
        """The perturbation [B, P, H] of the prompt's embeddings, in their dtype, 0 at padding.

        Args:
            tokenizer, device: not used.
            prompt_ids, prompt_mask: [B, P] int64, padded on the left.
            target_ids, target_mask: [B, T] int64, padded on the right.
        """
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad(), frozen_eval(model):
            prompt, target = embed(prompt_ids), embed(target_ids)
        delta = torch.zeros(prompt.shape, device=prompt.device)
        if not self.steps or not self.radius:
            return delta.to(prompt.dtype)
        rows, length = prompt.shape[0], prompt_ids.shape[1] + target_ids.shape[1]
        mask = torch.cat([prompt_mask, torch.ones_like(target_mask)], 1)
        inside = prompt_mask[..., None]
        before = torch.arange(prompt_ids.shape[1] - 1, length - 1, device=prompt.device)
        index = (torch.arange(rows, device=prompt.device)[:, None] * length + before).flatten()
        with frozen_eval(model), torch.enable_grad(), selected_rows(model, (rows, length), index):
            for _ in range(self.steps):
                leaf = (prompt + delta).to(prompt.dtype).requires_grad_()
                output = model(
                    inputs_embeds=torch.cat([leaf, target], 1), attention_mask=mask, use_cache=False
                )  # fmt: skip
                log_probs = output.logits.view(*target_ids.shape, -1).float().log_softmax(-1)
                picked = log_probs.gather(-1, target_ids[..., None])[..., 0]
                (grad,) = torch.autograd.grad(-(picked * target_mask).mean(), leaf)
                delta = self._project((delta - self.step_size * self._direction(grad.float())) * inside)
        return delta.to(prompt.dtype)

    def _direction(self, grad: Tensor) -> Tensor:
        if self.norm_type == "l-infty":
            return grad.sign()
        return grad / (grad.norm(dim=-1, keepdim=True) + 1e-6)

    def _project(self, delta: Tensor) -> Tensor:
        if self.norm_type == "l-infty":
            return delta.clamp(-self.radius, self.radius)
        norm = delta.norm(dim=-1, keepdim=True)
        return torch.where(norm >= self.radius, delta / (norm + 1e-8) * self.radius, delta)


def singular_spread(weight: Tensor) -> Tensor:
    """[] float32: the standard deviation of the singular values of an embedding matrix, the term of ER-CAT.

    The paper's bound on robustness goes by these values; the published weight of the term is 0.5. The public trainer
    computes it by itself (`CATTrainer._grad_embed_loss`); this is for loops of one's own.

    Args:
        weight: [V, H], any float dtype, adapters added.

    >>> round(float(singular_spread(torch.diag(torch.tensor([1.0, 3.0])))), 4)
    1.4142
    """
    return torch.linalg.svdvals(weight.float()).std()
