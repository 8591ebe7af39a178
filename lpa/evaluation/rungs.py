"""The attacks of the ladder: a soft suffix, ablation of the refusal direction, fine-tuning, and random respelling."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_kernels.model import decoder_layers, frozen_eval, hidden_of, hooked, with_hidden

from .bench import Bench, Tokens, batches

Example = tuple[Tokens, Tokens]  # the tokens of a prompt and of its answer


# ---- soft suffix ---------------------------------------------------------------------------------------------------


def template_tail(bench: Bench) -> int:
    """How many tokens the chat template puts after a user's text and before the answer."""
    one, other = bench.prompt_tokens("the cat", room=0), bench.prompt_tokens("a dog!", room=0)
    tail = 0
    while tail < min(len(one), len(other)) and one[-1 - tail] == other[-1 - tail]:
        tail += 1
    return tail


def soft_suffix(
    bench: Bench, prompts: Sequence[Tokens], target: Tokens, *, size: int, steps: int, rate: float, seed: int
) -> tuple[list[Tensor], list[float]]:
    """Free embeddings at the end of each user's text, without a bound, that make the target the likeliest answer.

    Adam on `size` embeddings a prompt (Schwinn et al. 2024, "Soft prompt threats"), which begin as those of random
    tokens. The loss is the mean cross entropy of the target's tokens. The model's weights are frozen.

    Args:
        prompts: tokens of whole conversations. target: tokens of the answer's beginning.
        rate: Adam's step, as a share of the root mean square of the embedding matrix.

    Returns:
        the embeddings of each attacked prompt, [its tokens + size, width], and its last loss.
    """
    embedding = bench.model.get_input_embeddings()
    weight = embedding.weight.detach()
    draw = torch.Generator().manual_seed(seed)
    picked = torch.randint(weight.shape[0], (len(prompts), size), generator=draw)
    with torch.no_grad():
        free = embedding(picked.to(bench.device)).float().clone().requires_grad_()
    optimiser = torch.optim.Adam([free], lr=rate * float(weight.float().pow(2).mean().sqrt()))
    tail = template_tail(bench)
    longest = max(map(len, prompts)) + size + len(target)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=bench.device)
    for row, prompt in enumerate(prompts):
        mask[row, : len(prompt) + size + len(target)] = 1
    labels = torch.tensor(target, device=bench.device)

    def rows(answer: Tokens) -> list[Tensor]:
        made = []
        for prompt, own in zip(prompts, free, strict=True):
            fixed = embedding(torch.tensor([*prompt, *answer], device=bench.device))
            cut = len(prompt) - tail
            made.append(torch.cat([fixed[:cut], own.to(fixed.dtype), fixed[cut:]]))
        return made

    losses = torch.zeros(len(prompts))
    with frozen_eval(bench.model):
        for _ in range(steps):
            padded = nn.utils.rnn.pad_sequence(rows(target), batch_first=True)
            logits = bench.model(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits
            ends = [len(prompt) + size - 1 for prompt in prompts]
            scored = torch.stack([own[end : end + len(target)] for own, end in zip(logits, ends, strict=True)])
            each = F.cross_entropy(scored.float().flatten(0, 1), labels.repeat(len(prompts)), reduction="none")
            losses = each.view(len(prompts), -1).mean(1)
            (free.grad,) = torch.autograd.grad(losses.sum(), free)
            optimiser.step()
        with torch.no_grad():
            return [row.detach() for row in rows([])], losses.tolist()


# ---- ablation of the refusal direction -----------------------------------------------------------------------------


@torch.no_grad()
def refusal_directions(bench: Bench, harmful: Sequence[Tokens], benign: Sequence[Tokens]) -> list[Tensor]:
    """One unit vector a decoder block: the mean hidden state at the last prompt token, harmful minus benign.

    Difference of means (Arditi et al. 2024, "Refusal in language models is mediated by a single direction").

    Returns:
        float32 [width] of each block, in order; zero where the two means are equal.
    """
    means = [[own.mean(0) for own in _last_states(bench, prompts)] for prompts in (harmful, benign)]
    gaps = [one - other for one, other in zip(*means, strict=True)]
    return [gap / gap.norm().clamp(min=1e-12) for gap in gaps]


def _last_states(bench: Bench, prompts: Sequence[Tokens]) -> list[Tensor]:
    """[prompts, width] float32 of each block: its output at the last token of each prompt."""
    layers = decoder_layers(bench.model)
    found: list[list[Tensor]] = [[] for _ in layers]
    for chunk in batches(prompts, bench.batch_size):
        last = torch.tensor([len(prompt) - 1 for prompt in chunk])

        def keeping(own: list[Tensor], last: Tensor = last) -> Callable[..., None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                hidden = hidden_of(output)
                own.append(hidden[torch.arange(len(last)), last.to(hidden.device)].float().cpu())

            return keep

        with hooked(after=[(layer, keeping(own)) for layer, own in zip(layers, found, strict=True)]):
            bench.log_probs(chunk, [[len(prompt) - 1] for prompt in chunk])
    return [torch.cat(own) for own in found]


@contextmanager
def ablated(model: Any, directions: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, each decoder block's output is projected onto the complement of its direction.

    Args:
        directions: unit vectors [width], one a block.
    """

    def without(direction: Tensor) -> Callable[..., Any]:
        def project(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            own = direction.to(hidden)
            return with_hidden(output, hidden - (hidden @ own)[..., None] * own)

        return project

    blocks = zip(decoder_layers(model), directions, strict=True)
    with hooked(after=[(block, without(direction)) for block, direction in blocks], foreign=True):
        yield


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


@contextmanager
def eroding(
    bench: Bench, rows: Sequence[Example], *, rank: int = 8, rate: float = 1e-3, batch: int = 8, seed: int = 0
) -> Iterator[Callable[[int], None]]:
    """Fine-tune the subject on rows, as an attacker with its weights would (Qi et al. 2023): yields `train(updates)`.

    LoRA by hooks on every linear layer of the decoder blocks, so that it works on any model and beside any adapter; it
    is gone afterwards. AdamW on the mean cross entropy of the answers' tokens; each epoch is shuffled anew.

    Args:
        rows: prompts with the answers to learn. rank: of LoRA, whose alpha equals it. rate: AdamW's.
    """
    draw = torch.Generator().manual_seed(seed)
    hooks: list[tuple[nn.Module, Any]] = []
    free: list[Tensor] = []
    order: list[int] = []
    for module in (linear for layer in decoder_layers(bench.model) for linear in _linears(layer)):
        device = next(module.parameters()).device
        down = torch.randn(rank, module.in_features, generator=draw) / module.in_features**0.5
        down, up = down.to(device).requires_grad_(), torch.zeros(module.out_features, rank, device=device)
        free += [down, up.requires_grad_()]
        hooks.append((module, _added(down, up)))
    with hooked(after=hooks, foreign=True):
        optimiser = torch.optim.AdamW(free, lr=rate)

        def train(updates: int) -> None:
            with frozen_eval(bench.model):
                for _ in range(updates):
                    if len(order) < batch:
                        order.extend(torch.randperm(len(rows), generator=draw).tolist())
                    chunk, order[:batch] = [rows[i] for i in order[:batch]], []
                    grads = torch.autograd.grad(_answer_loss(bench, chunk), free)
                    for value, grad in zip(free, grads, strict=True):
                        value.grad = grad
                    optimiser.step()

        yield train


def _linears(layer: nn.Module) -> Iterator[Any]:
    """The outermost modules of a block that have in_features and out_features."""
    for child in layer.children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield child
        else:
            yield from _linears(child)


def _added(down: Tensor, up: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, inputs, output: output + (inputs[0].float() @ down.T @ up.T).to(output.dtype)


def _answer_loss(bench: Bench, rows: Sequence[Example]) -> Tensor:
    tables = bench.log_probs(
        [[*prompt, *answer] for prompt, answer in rows],
        [range(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in rows], grad=True,
    )  # fmt: skip
    picked = [table.gather(1, torch.tensor(answer, device=table.device)[:, None])
              for table, (_, answer) in zip(tables, rows, strict=True)]  # fmt: skip
    return -torch.cat(picked).mean()


# ---- random respelling ---------------------------------------------------------------------------------------------


def respelt(text: str, seed: str) -> str:
    """The text with letters of words shuffled, capitals at random and a few characters moved on by one code.

    The augmentation of best-of-N jailbreaking (Hughes et al. 2024), with its shares: 60% of the words of four letters
    and more have their inner letters shuffled, 60% of letters change case, and 6% of printable characters move.
    """
    draw = random.Random(seed)
    words = []
    for word in text.split(" "):
        if len(word) > 3 and draw.random() < 0.6:
            inner = list(word[1:-1])
            draw.shuffle(inner)
            word = word[0] + "".join(inner) + word[-1]
        words.append(word)
    letters = []
    for letter in " ".join(words):
        if letter.isalpha() and draw.random() < 0.6:
            letter = letter.swapcase()
        if 32 < ord(letter) < 126 and draw.random() < 0.06:
            letter = chr(ord(letter) + draw.choice((-1, 1)))
        letters.append(letter)
    return "".join(letters)
