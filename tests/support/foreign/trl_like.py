"""A fused LM head and its callers in the manner of TRL 1.16: preference pairs, and groups padded on the left."""

import contextlib
import functools
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput


@dataclass
class FusedCausalLMOutput(ModelOutput):
    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    original = model.forward

    @functools.wraps(type(model).forward)
    def _fused_forward(
        self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs
    ):
        if not fused_lm_head:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shift_labels
        mask = labels != -100
        logits = self.lm_head(hidden) / temperature
        log_probs = logits.log_softmax(-1)
        picked = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
        found = FusedCausalLMOutput(loss=-picked.sum() / mask.sum(), log_probs=picked, label_mask=mask)
        if "entropy" in outputs:
            found.entropy = (-(log_probs.exp() * log_probs).sum(-1)).masked_fill(~mask, 0)
        if "mean_logits" in outputs:
            found.mean_logits = logits.mean(-1).detach().masked_fill(~mask, 0)
        if "is_top1" in outputs:
            found.is_top1 = (logits.argmax(-1) == labels) & mask
        return found

    model.forward = types.MethodType(_fused_forward, model)


class PreferenceTrainer:
    """Losses and metrics of a batch whose first half is chosen and whose second half is rejected."""

    def __init__(self, model, loss_type="sigmoid", beta=0.1, ref_model=None, precompute=None):
        self.model, self.loss_type, self.beta, self.ref_model = model, loss_type, beta, ref_model
        get = getattr(model, "get_base_model", lambda: model)
        add_fused_lm_head(get(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        if ref_model is not None:
            add_fused_lm_head(ref_model)
        self.reference = None if precompute is None else self.reference_log_probs(precompute)

    @torch.no_grad()
    def reference_log_probs(self, inputs):
        model = self.ref_model or self.model
        off = self.model.disable_adapter() if self.ref_model is None else contextlib.nullcontext()
        with off:
            return self.forward(model, inputs).log_probs.sum(1)

    def forward(self, model, inputs):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        kwargs = {name: value for name, value in inputs.items() if name != "completion_mask"}
        return model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)

    def compute_loss(self, inputs):
        found = self.forward(self.model, inputs)
        reference = self.reference_log_probs(inputs) if self.reference is None else self.reference
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = (found.log_probs.sum(1) - reference).chunk(2)
        if self.loss_type == "sigmoid":
            losses = -F.logsigmoid(self.beta * (chosen - rejected))
        elif self.loss_type == "ipo":
            sizes_chosen, sizes_rejected = mask.sum(1).chunk(2)
            losses = (chosen / sizes_chosen - rejected / sizes_rejected - 1 / (2 * self.beta)) ** 2
        else:  # kto_pair
            kl_chosen, kl_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
            losses = torch.cat(
                (
                    1 - (self.beta * (chosen - kl_rejected)).sigmoid(),
                    1 - (self.beta * (kl_chosen - rejected)).sigmoid(),
                )
            )
        metrics = {
            "entropy": (found.entropy * mask).sum() / mask.sum(),
            "mean_logits": (found.mean_logits * mask).sum() / mask.sum(),
            "accuracy": (found.is_top1 & mask.bool()).sum() / mask.sum(),
            "log_probs": found.log_probs.sum(1).mean(),
            "rewards": self.beta * (chosen - rejected).mean(),
        }
        return losses.mean(), {name: value.item() for name, value in metrics.items()}


def group_log_probs(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """Of groups: prompts padded on the left, completions on the right, each completion with a prompt of its own."""
    ids = torch.cat([prompt_ids, completion_ids], 1)
    attention = torch.cat([prompt_mask, completion_mask], 1)
    labels = ids.masked_fill(torch.cat([torch.zeros_like(prompt_mask), completion_mask], 1) == 0, -100)
    found = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    return found.log_probs[:, -completion_ids.shape[1] :]


class GroupTrainer:
    """Groups of completions, each of one prompt: GRPO's loss a token or RLOO's a sequence, under a KL penalty."""

    def __init__(self, model, method="grpo", size=3, beta=0.04, temperature=0.7):
        self.model, self.method, self.size, self.beta = model, method, size, beta
        add_fused_lm_head(model.get_base_model(), temperature=temperature)

    def compute_loss(self, rewards, *inputs):
        log_probs, mask = group_log_probs(self.model, *inputs), inputs[-1]
        with torch.no_grad(), self.model.disable_adapter():
            reference = group_log_probs(self.model, *inputs)
        groups = rewards.view(-1, self.size)
        if self.method == "grpo":
            gains = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()[:, None]
            ratio = (log_probs - log_probs.detach()).exp()
            apart = reference - log_probs
            losses = -torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains) + self.beta * (apart.exp() - apart - 1)
            return ((losses * mask).sum(1) / mask.sum(1)).mean()
        groups = (rewards - self.beta * (log_probs - reference).detach().sum(1)).view(-1, self.size)
        gains = (groups - (groups.sum(1, keepdim=True) - groups) / (self.size - 1)).flatten()
        total = log_probs.sum(1)
        return -(gains * (total - total.detach()).exp()).mean()
