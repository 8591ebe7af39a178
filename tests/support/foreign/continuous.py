"""Callers in the manner of MixAT and of ER-CAT: they make an attack by its name in their module."""

import torch
import torch.nn.functional as F


class EmbeddingSpaceAttack:
    """Stands where the public class is."""


class ContinuousAttacker:
    """Stands where the public class is."""


class MixedAttack:
    """Rewrites a prompt in its place, then perturbs the embeddings of the new one."""

    def __init__(
        self, embed_weights, response_key, model_path, tokenizer, rewrite, is_zero_a_valid_index=False, **kwargs
    ):
        self.rewrite = rewrite
        self.embedding_space_attack = EmbeddingSpaceAttack(
            embed_weights, response_key, tokenizer, is_zero_a_valid_index=is_zero_a_valid_index, **kwargs
        )

    def attack(self, model, input_ids, target_ids, attention_mask, ratio=None):
        is_discrete = bool(ratio)
        if is_discrete:
            prompt = ~(target_ids > 0) & attention_mask.bool()
            for row, own in zip(input_ids, prompt, strict=True):
                row[own] = self.rewrite(row[own])
        embeds, perturbation, mask, losses, hits, _ = self.embedding_space_attack.attack(
            model, input_ids, target_ids, attention_mask
        )
        return embeds.detach(), perturbation.detach(), mask.detach(), losses, hits, is_discrete


class AdversarialTrainer:
    """An update on perturbed prompts with safe answers."""

    def __init__(self, model, attacker_config, lr=0.05):
        self.model = model
        self.attacker = ContinuousAttacker(**attacker_config)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step(self, inputs):
        self.model.eval()
        delta = self.attacker.attack_embeds(
            model=self.model,
            tokenizer=None,
            prompt_ids=inputs["prompt_ids"],
            prompt_mask=inputs["prompt_mask"],
            target_ids=inputs["harmful_ids"],
            target_mask=inputs["harmful_mask"],
            device=inputs["prompt_ids"].device,
        )
        self.model.train()
        embed, safe = self.model.get_input_embeddings(), inputs["safe_ids"]
        embeds = torch.cat([embed(inputs["prompt_ids"]) + delta, embed(safe)], 1)
        mask = torch.cat([inputs["prompt_mask"], torch.ones_like(safe)], 1)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask).logits[:, -safe.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), safe.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), delta
