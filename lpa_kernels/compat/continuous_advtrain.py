"""Drop-in for sophie-xhonneux/Continuous-AdvTrain (CAT, CAPO; arXiv 2405.15589): its attack on the embeddings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model import frozen_eval, selected_rows
from ..ops import perturb, pgd_update_, token_loss

logger = logging.getLogger(__name__)

# their name of an optimiser -> our rule, and the betas of torch's optimiser of that name
RULES = {"sign": ("sign", (0.9, 0.999)), "adam": ("adam", (0.9, 0.999)), "rms": ("rmsprop", (0.9, 0.99))}


class EmbeddingSpaceAttack:
    """Finds a perturbation of the prompt's embeddings that makes the targets likely, without [B, S, V] one-hots.

    The losses and perturbations are those of the public class (arXiv 2405.15589), computed in float32 from the rows
    of logits that predict a target. Three faults are repaired: `relative_lr=True` raises AttributeError there and
    makes the step `lr * eps * mean embedding norm` here; a target of token id 0 is dropped there and counts here; an
    unknown init_type or optimiser is an error here, as is "suffix", which raises in their first step. The caller's
    opt_config is not changed, the model runs in eval mode, and every parameter's requires_grad comes back.

    Args:
        embed_weights: [V, H] embedding matrix.
        response_key, suffix_tokens: not used, as there.
        tokenizer: kept, not used.
        iters: number of steps.
        opt_config: {"type": "sign" | "adam" | "rms", "lr": step size}; by default sign with 0.01.
        eps: radius as a share of the mean norm of the rows of embed_weights.
        init_type: "instruction".
        relative_lr: the lr is a share of the radius.
        debug: 1 logs the first and the best loss, 2 those of every step.

    Raises:
        ValueError: an unknown init_type or optimiser.
        NotImplementedError: init_type="suffix".

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> attack = EmbeddingSpaceAttack(model.get_input_embeddings().weight, None, None, iters=2)
    >>> ids, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, 3]])
    >>> embeddings, found, mask, losses, hits = attack.attack(model, ids, targets, torch.ones_like(ids))
    >>> found.shape, mask.flatten().tolist(), len(losses)
    (torch.Size([1, 3, 8]), [1, 1, 0], 2)
    """

    def __init__(
        self,
        embed_weights: Tensor,
        response_key: Any,
        tokenizer: Any,
        iters: int = 8,
        opt_config: Mapping[str, Any] | None = None,
        eps: float = 0.01,
        init_type: str = "instruction",
        suffix_tokens: int = 10,
        relative_lr: bool = False,
        debug: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if init_type == "suffix":
            raise NotImplementedError("init_type='suffix' needs a projection on the simplex, which theirs lacks too")
        if init_type != "instruction":
            raise ValueError(f"init_type={init_type!r} is unknown; use 'instruction'")
        if args or kwargs:
            logger.warning("EmbeddingSpaceAttack ignores the arguments %s, as theirs does", [*args, *kwargs])
        self.embed_weights = embed_weights
        self.tokenizer = tokenizer
        self.vocab_size, self.embedding_size = embed_weights.shape
        self.embedding_norm = torch.linalg.vector_norm(embed_weights.detach(), dim=-1, dtype=torch.float32).mean()
        self.eps = eps * self.embedding_norm
        self.iters, self.init_type, self.suffix_tokens, self.debug = iters, init_type, suffix_tokens, debug
        self.opt_config: dict[str, Any] = {"type": "sign", "lr": 0.01} if opt_config is None else dict(opt_config)
        if self.opt_config.get("type") not in RULES:
            raise ValueError(f"opt_config={self.opt_config} has an unknown type; use one of {', '.join(RULES)}")
        if relative_lr:
            self.opt_config["lr"] = self.opt_config["lr"] * self.eps

    def attack(
        self, model: nn.Module, input_ids: Tensor, target_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[float], list[int]]:
        """Run the inner loop on one batch.

        Args:
            model: the causal language model that embed_weights belong to.
            input_ids: [B, L] int64, padded on either side.
            target_ids: [B, L] int64, the token ids of the target, -100 elsewhere.
            attention_mask: [B, L], 1 at real tokens.

        Returns:
            embeddings [B, L, H]; the perturbation [B, L, H] in their dtype; its mask [B, L, 1] in input_ids' dtype, 1
            at real tokens outside the target; the loss of each step, before its update; and by step the number of
            examples whose targets were all the most probable tokens.

        Raises:
            ValueError: there is no target, or no position to attack.
        """
        scored = target_ids >= 0
        open_to_attack = ~scored & attention_mask.bool()
        if not bool(scored[:, 1:].any()) or not bool(open_to_attack.any()):
            raise ValueError("target_ids has no target after position 0, or leaves no token of the prompt to attack")
        embeds = self.get_embeddings(input_ids)
        tokens = open_to_attack.flatten().nonzero()
        rows = torch.full((input_ids.numel(),), -1, dtype=torch.long, device=input_ids.device)
        rows[tokens[:, 0]] = torch.arange(tokens.shape[0], device=input_ids.device)
        delta = torch.zeros(1, tokens.shape[0], embeds.shape[-1], device=embeds.device)
        losses, affirmative = self._loop(model, embeds, delta, rows, tokens, scored, target_ids, attention_mask)
        found = torch.zeros_like(embeds).flatten(0, 1)
        found[tokens[:, 0]] = delta[0].to(found.dtype)
        self._log(losses)
        return embeds, found.view(embeds.shape), open_to_attack.to(input_ids.dtype)[:, :, None], losses, affirmative

    def _loop(
        self, model: nn.Module, embeds: Tensor, delta: Tensor, rows: Tensor, tokens: Tensor, scored: Tensor,
        target_ids: Tensor, attention_mask: Tensor,
    ) -> tuple[list[float], list[int]]:  # fmt: skip
        rule, betas = RULES[self.opt_config["type"]]
        moments = [torch.zeros_like(delta) for _ in range(2)] if rule != "sign" else [None, None]
        places, labels = scored[:, 1:].nonzero(), target_ids[:, 1:][scored[:, 1:]]
        example, toward = places[:, 0], torch.zeros_like(labels, dtype=torch.bool)
        index = example * target_ids.shape[1] + places[:, 1]
        losses, affirmative = [], []
        flat = embeds.flatten(0, 1)
        shape = (target_ids.shape[0], target_ids.shape[1])
        with frozen_eval(model), torch.enable_grad(), selected_rows(model, shape, index):
            for step in range(1, self.iters + 1):
                leaf = perturb(flat, delta[0], rows).requires_grad_()
                output = model(inputs_embeds=leaf.view(embeds.shape), attention_mask=attention_mask, use_cache=False)
                loss, hits = token_loss(output.logits.flatten(0, -2), labels, toward)
                (grad,) = torch.autograd.grad(loss.mean(), leaf)
                missed = torch.zeros(len(target_ids), dtype=torch.long, device=labels.device)
                affirmative.append((missed.index_add_(0, example, (~hits).long()) == 0).sum())
                losses.append(loss.detach().mean())
                pgd_update_(
                    delta, [grad], tokens, exp_avg=moments[0], exp_avg_sq=moments[1], step=step,
                    step_size=self.opt_config["lr"], epsilon=self.eps.to(delta.device), rule=rule, norm="l2",
                    betas=betas, weight_decay=0.0,
                )  # fmt: skip
        if not losses:
            return [], []
        return torch.stack(losses).tolist(), torch.stack(affirmative).tolist()

    def _log(self, losses: list[float]) -> None:
        if self.debug > 0 and losses:
            logger.info("embedding attack: first loss %.4f, best %.4f", losses[0], min(losses))
        if self.debug > 1:
            logger.info("embedding attack: losses %s", losses)

    def get_embeddings(self, ids: Tensor) -> Tensor:
        """The embeddings [B, L, H] of ids [B, L] int64; a negative id counts as 0, as there."""
        return torch.nn.functional.embedding(
            ids.clamp(min=0).to(self.embed_weights.device), self.embed_weights.detach()
        )

    def get_adv_embeddings(self, input_embeds: Tensor, adv_perturbation: Tensor, adv_perturbation_mask: Tensor) -> Any:
        """The perturbed embeddings [B, L, H]; the mask is [B, L, 1]."""
        return input_embeds + adv_perturbation * adv_perturbation_mask
