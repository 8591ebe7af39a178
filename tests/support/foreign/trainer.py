"""The eager inner loop, the losses, and a trainer with gradient accumulation, bug of the public one included."""

import torch
import torch.nn.functional as F

from .wrappers import GDAdversary, clear_hooks, wrap


def rows(model, batch, side):
    mask = batch[f"{side}_labels_mask"]
    labels = batch.get(f"{side}_labels")
    if isinstance(labels, list):
        labels = torch.tensor([label for row in labels for label in row])
    if labels is None:
        labels = batch[f"{side}_tokens"][:, 1:][mask[:, 1:]]
    return model(input_ids=batch[f"{side}_tokens"]).logits[:, :-1][mask[:, 1:]], labels


def log_one_minus_p(logits, labels, threshold=-5.0):
    log_p = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    others = logits.scatter(1, labels.clamp(min=0)[:, None], float("-inf")).logsumexp(-1)
    counted = labels != -100
    values = torch.where(counted & (log_p >= threshold), logits.logsumexp(-1) - others, 0.0)
    return values.sum() / counted.sum()


def sequence_log_prob(model, batch, side):
    tokens, mask = batch[f"{side}_tokens"], batch[f"{side}_labels_mask"]
    log_probs = model(input_ids=tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return (log_probs * mask[:, 1:]).sum(1)


def preference(model, batch, favoured, other, wrappers, beta=0.3):
    for wrapper in wrappers:
        wrapper.enabled = False
    with torch.no_grad(), model.disable_adapter():
        base = sequence_log_prob(model, batch, favoured) - sequence_log_prob(model, batch, other)
    for wrapper in wrappers:
        wrapper.enabled = True
    gap = sequence_log_prob(model, batch, favoured) - sequence_log_prob(model, batch, other)
    return -F.logsigmoid(beta * (gap - base)).mean()


def both_losses(model, batch, favoured, other, coefs, wrappers, backward):
    if "dpo" in coefs:
        loss = preference(model, batch, favoured, other, wrappers)
        (coefs["dpo"] * loss).backward()  # past the accelerator, as in the public code
        return {"total": loss.item(), "dpo": loss.item()}
    losses = {"total": 0.0}
    for name, side in (("toward", favoured), ("away", other)):
        if coefs.get(name, 0) > 0:
            logits, labels = rows(model, batch, side)
            loss = F.cross_entropy(logits, labels) if name == "toward" else log_one_minus_p(logits, labels)
            backward(coefs[name] * loss)
            losses[name] = loss.item()
            losses["total"] += loss.item()
    return losses


def projected_gradient_descent(
    batch,
    model,
    model_layers_module,
    layer,
    epsilon,
    learning_rate,
    pgd_iterations,
    loss_coefs,
    l2_regularization=0,
    device="cuda",
    log_loss=True,
    return_loss_over_time=False,
    clip_grad=None,
    accelerator=None,
    add_completions_pgd=False,
):
    clear_hooks(model)
    layers = [layer] if isinstance(layer, (int, str)) else list(layer)
    mask = batch["prompt_mask"] if "prompt_mask" in batch else batch["adv_labels_mask"]
    if add_completions_pgd:
        mask = mask | batch["adv_labels_mask"] | batch["def_labels_mask"]
    places = [(f"{model_layers_module}.{i}", "mlp") for i in layers if isinstance(i, int)]
    if "embedding" in layers:
        places.append((model_layers_module.removesuffix(".layers"), "embed_tokens"))
    adversaries = [GDAdversary(model.config.hidden_size, epsilon, mask) for _ in places]
    wrappers = [wrap(model, *place, adversary) for place, adversary in zip(places, adversaries, strict=True)]
    optimizer = torch.optim.AdamW([a.attack for a in adversaries], lr=learning_rate)
    backward = torch.Tensor.backward if accelerator is None else accelerator.backward
    history = []
    for _ in range(pgd_iterations):
        optimizer.zero_grad()
        losses = both_losses(model, batch, "adv", "def", loss_coefs, wrappers, backward)
        logged = {f"adv_{k}": v for k, v in losses.items()} if log_loss else {}
        if l2_regularization:
            size = adversaries[-1].attack.numel() ** 0.5
            penalty = sum(a.attack.norm() for a in adversaries) / size
            (l2_regularization * penalty).backward()
            logged["adv_l2_norm"] = penalty.item()
        if clip_grad is not None:
            torch.nn.utils.clip_grad_norm_([adversaries[-1].attack], clip_grad)
        optimizer.step()
        for adversary in adversaries:
            adversary.clip_attack()
        history.append(logged)
    return (history if return_loss_over_time else history[-1]), wrappers


class Trainer:
    """Inner loop, then updates of the model; `calls` counts the perturbations added in each defence pass."""

    def __init__(self, model, layers_module, *, size=None, updates=2, coefs=None, layer=("embedding", 1, 3)):
        self.model, self.layers_module, self.size, self.updates = model, layers_module, size, updates
        self.coefs = {"toward": 0.5, "away": 0.5} if coefs is None else coefs
        self.layer, self.calls, self.losses = list(layer), [], []
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def attack(self, batch):
        for p in self.trained:
            p.requires_grad_(False)
        losses, wrappers = projected_gradient_descent(
            batch=batch, model=self.model, model_layers_module=self.layers_module, layer=self.layer, epsilon=1.0,
            learning_rate=5e-2, pgd_iterations=4, loss_coefs=self.coefs, device="cpu",
        )  # fmt: skip
        for p in self.trained:
            p.requires_grad_(True)
        self.losses.append(losses)
        return wrappers

    def defend(self, batch, wrappers):
        seen = []
        watching = [w.hook_fn.register_forward_hook(lambda *_: seen.append(1)) for w in wrappers]
        both_losses(self.model, batch, "def", "adv", self.coefs, wrappers, torch.Tensor.backward)
        for watch in watching:
            watch.remove()
        self.calls.append(len(seen))

    def step(self, batch):
        size = self.size or len(batch["adv_tokens"])
        starts = range(0, len(batch["adv_tokens"]), size)
        parts = [{k: v[i : i + size] for k, v in batch.items()} for i in starts]
        attacks = []
        for part in parts:
            attacks.append(self.attack(part))
            if self.size:
                for wrapper in attacks[-1]:
                    wrapper.enabled = False
        for _ in range(self.updates):
            self.optimizer.zero_grad()
            for part, wrappers in zip(parts, attacks, strict=True):
                if self.size:
                    for wrapper in wrappers:
                        wrapper.enabled = True
                self.defend(part, wrappers)
                if self.size:
                    for wrapper in wrappers:
                        wrapper.enabled = False
            self.optimizer.step()
        clear_hooks(self.model)
