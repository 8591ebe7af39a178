"""Drop-in for insait-institute/MixAT (arXiv 2505.16947): its continuous loop around discrete seeds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import continuous_advtrain


class EmbeddingSpaceAttack(continuous_advtrain.EmbeddingSpaceAttack):
    """The class of that name in MixAT's `embedding_attack.py`, a fork of Continuous-AdvTrain's.

    MixAT's own classes rewrite a prompt (PAP, GCG) and then perturb the embeddings of the rewritten one by this loop:
    they make it by its name in their module, so that replacing it there serves all of them. To the parent's arguments
    the fork adds `is_zero_a_valid_index`, to `attack` a `ratio`, and to the results a flag that says whether the
    prompts are those of a discrete attack.

    Args:
        is_zero_a_valid_index: whether a target of token id 0 counts. False drops it, as there.
        others: see the parent.

    >>> import torch
    >>> EmbeddingSpaceAttack(torch.eye(4), None, None, iters=2, is_zero_a_valid_index=True).is_zero_a_valid_index
    True
    """

    def __init__(
        self,
        embed_weights: Tensor,
        response_key: Any,
        tokenizer: Any,
        iters: int = 8,
        opt_config: Any = None,
        eps: float = 0.01,
        init_type: str = "instruction",
        suffix_tokens: int = 10,
        relative_lr: bool = False,
        debug: int = 0,
        is_zero_a_valid_index: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_weights, response_key, tokenizer, iters, opt_config, eps, init_type, suffix_tokens, relative_lr,
            debug, *args, **kwargs,
        )  # fmt: skip
        self.is_zero_a_valid_index = is_zero_a_valid_index

    def attack(  # type: ignore[override]
        self,
        model: nn.Module,
        input_ids: Tensor,
        target_ids: Tensor,
        attention_mask: Tensor,
        ratio: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[float], list[int], bool]:
        """As the parent's, with False as sixth result: these prompts are as they were given. `ratio` is not used."""
        if not self.is_zero_a_valid_index:
            target_ids = target_ids.masked_fill(target_ids == 0, -100)
        return (*super().attack(model, input_ids, target_ids, attention_mask), False)

    def get_adv_embeddings(
        self, input_embeds: Tensor, adv_perturbation: Tensor, adv_perturbation_mask: Tensor, is_gcg: Any = None
    ) -> Any:
        """The perturbed embeddings [B, L, H]; the mask is [B, L, 1]."""
        return super().get_adv_embeddings(input_embeds, adv_perturbation, adv_perturbation_mask)
