"""Perturbations that replace a submodule by a wrapper around it, and the function that looks for such wrappers."""

import torch
from torch import nn


class GDAdversary(nn.Module):
    """A perturbation of the masked positions, written into the activations in place."""

    def __init__(self, dim, epsilon, attack_mask, device=None, dtype=None):
        super().__init__()
        self.epsilon, self.attack_mask = epsilon, attack_mask
        self.attack = nn.Parameter(torch.zeros(*attack_mask.shape, dim, device=device, dtype=dtype))

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        mask = self.attack_mask[:, : x.shape[1]]
        x[mask] = x[mask] + self.attack[:, : x.shape[1]][mask]
        return x

    def clip_attack(self):
        with torch.no_grad():
            self.attack.div_((self.attack.norm(dim=-1, keepdim=True) / self.epsilon).clamp(min=1))


class CustomHook(nn.Module):
    """Stands where the module was."""

    def __init__(self, module, hook_fn):
        super().__init__()
        self.module, self.hook_fn, self.enabled = module, hook_fn, True

    def forward(self, *args, **kwargs):
        output = self.module(*args, **kwargs)
        return self.hook_fn(output) if self.enabled else output


def clear_hooks(model):
    for name, child in model.named_children():
        if isinstance(child, CustomHook):
            setattr(model, name, child.module)
            child = child.module
        clear_hooks(child)


def wrap(model, parent, name, adversary):
    owner = model.get_submodule(parent)
    hook = CustomHook(getattr(owner, name), adversary)
    setattr(owner, name, hook)
    return hook
