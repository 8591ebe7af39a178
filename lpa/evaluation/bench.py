"""Ask one model: greedy answers and the probabilities of short answers, batched, with or without an attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa.data import DataError
from lpa.data.templates import ChatEncoder, tokenizer_limit
from lpa.models import context_length
from lpa_kernels.attack import AttackResult
from lpa_kernels.model import selected_rows

Tokens = list[int]


class Bench:
    """A model with its tokenizer and the settings that answers depend on.

    Args:
        system_prompt: of every conversation, None for none.
        max_new_tokens: longest answer. batch_size: prompts a pass. chat: as in `ChatEncoder`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system_prompt: str | None,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        **chat: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.context = min(filter(None, (context_length(model), tokenizer_limit(tokenizer))), default=10**9)
        self._encoders: dict[str | None, ChatEncoder] = {}
        self.system_prompt, self.chat = system_prompt, chat
        # (prompts, longest answer, tokens that end one) -> answers, of the model as it is on disk
        self.generate: Callable[[Sequence[Tokens], int, Sequence[int]], list[Tokens]] | None = None

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self.model.get_input_embeddings().weight.device

    def encoder(self, system_prompt: str | None) -> ChatEncoder:
        """The encoder for a system prompt, kept."""
        if system_prompt not in self._encoders:
            self._encoders[system_prompt] = ChatEncoder(self.tokenizer, system_prompt, self.context, **self.chat)
        return self._encoders[system_prompt]

    def prompt_tokens(self, prompt: str, prefill: str = "", room: int | None = None) -> Tokens:
        """The tokens of a conversation up to the answer, `prefill` being the answer's given beginning.

        Args:
            room: tokens that must be free after them; by default those of an answer.

        Raises:
            DataError: longer than the context allows; the message has both lengths.
        """
        room = self.max_new_tokens if room is None else room
        (start, *rest), _ = self.encoder(self.system_prompt).row(prompt, [prefill] if prefill else [], "the prompt")
        tokens = start + (rest[0] if rest else [])
        if len(tokens) + room > self.context:
            raise DataError(
                f"the prompt has {len(tokens)} tokens with its template, and {room} more are needed, "
                f"but the context holds {self.context}"
            )
        return tokens

    @torch.no_grad()
    def answers(self, prompts: Sequence[Tokens], attack: AttackResult | None = None) -> list[str]:
        """Greedy answers to one batch of prompts (with an attack: the very batch that was attacked)."""
        if self.generate is not None and attack is None:
            found = self.generate(prompts, self.max_new_tokens, self._ends)
            return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
        longest = max(map(len, prompts))
        pad = self._pad
        starts = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[pad] * start + p for start, p in zip(starts, prompts, strict=True)], device=self.device)
        mask = torch.tensor([[0] * start + [1] * len(p) for start, p in zip(starts, prompts, strict=True)])
        under: AbstractContextManager[Any] = nullcontext()
        if attack is not None:
            under = attack.applied(_left_padded_rows(attack.grid, [len(p) for p in prompts], longest))
        with under:
            out = self.model.generate(input_ids=ids, attention_mask=mask.to(self.device), **self._greedy())
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]

    @torch.no_grad()
    def answers_to(self, prompts: Sequence[Tensor]) -> list[str]:
        """Greedy answers to one batch of prompts given as embeddings [tokens, width]."""
        longest = max(map(len, prompts))
        rows = [F.pad(row, (0, 0, longest - len(row), 0)) for row in prompts]
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        out = self.model.generate(inputs_embeds=torch.stack(rows), attention_mask=mask, **self._greedy())
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    @contextmanager
    def changed(self) -> Iterator[None]:
        """While the model is not the one on disk, it generates itself."""
        generate, self.generate = self.generate, None
        try:
            yield
        finally:
            self.generate = generate

    @property
    def _ends(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        return sorted({*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None})

    @property
    def _pad(self) -> int:
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id or 0)

    def _greedy(self) -> dict[str, Any]:
        # a checkpoint may bring sampling, penalties and a length limit; these settings undo them
        return {
            "max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, "temperature": None,
            "top_p": None, "top_k": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
            "pad_token_id": self._pad, "eos_token_id": self._ends or None,
        }  # fmt: skip

    def variants(self, texts: Sequence[str]) -> list[Tokens]:
        """The distinct token sequences of answers, as the template would put them after a prompt."""
        encoder = self.encoder(self.system_prompt)
        rows = [tuple(tokens) for tokens in encoder.row("x", list(texts))[0][1:]]
        return [list(row) for row in dict.fromkeys(rows)]

    def log_scores(self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """For each prompt and each answer the log-probability of that answer: logsumexp over its variants of the sum
        of its tokens' log-probabilities.

        Args:
            answers: each answer is a list of variants, each a list of tokens.
        """
        found = []
        for chunk in batches(prompts, self.batch_size):
            found += self._log_scores(chunk, answers)
        return found

    def _log_scores(self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        heads = {tuple(variant[:-1]) for answer in answers for variant in answer}
        needed = [head for head in sorted(heads) if not any(head != h and h[: len(head)] == head for h in heads)]
        texts = [list(prompt) + list(head) for prompt in prompts for head in needed]
        places = [list(range(len(p) - 1, len(p) + len(head))) for p in prompts for head in needed]
        rows = self.log_probs(texts, places)
        scores = []
        for number in range(len(prompts)):
            own = dict(zip(needed, rows[number * len(needed) : (number + 1) * len(needed)], strict=True))
            scores.append([_logsumexp([_one(variant, own) for variant in answer]) for answer in answers])
        return scores

    def log_probs(
        self, texts: Sequence[Tokens], places: Sequence[Sequence[int]], *, grad: bool = False
    ) -> list[Tensor]:
        """Log-probabilities of the next token at some positions of each text: one float32 [positions, V] a text.

        One right-padded pass; the head sees the wanted positions alone.

        Args:
            grad: whether they can be differentiated.
        """
        longest = max(map(len, texts))
        ids = torch.tensor([text + [self._pad] * (longest - len(text)) for text in texts], device=self.device)
        flat = torch.tensor([row * longest + place for row, own in enumerate(places) for place in own])

        with selected_rows(self.model, (len(texts), longest), flat), torch.set_grad_enabled(grad):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return list(logits[0].float().log_softmax(-1).split([len(own) for own in places]))


def _one(variant: Tokens, rows: dict[tuple[int, ...], Tensor]) -> float:
    """Sum of the variant's token log-probabilities, from the pass over any text that begins with all but its last."""
    head = tuple(variant[:-1])
    table = next(values for known, values in rows.items() if known[: len(head)] == head)
    return float(sum(float(table[place, token]) for place, token in enumerate(variant)))


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top if math.isinf(top) else top + math.log(sum(math.exp(value - top) for value in values))


def _left_padded_rows(grid: Tensor, lengths: Sequence[int], longest: int) -> Any:
    """Rows for a left-padded prompt batch: grid [B, La] is by position from each text's own start."""
    shifted = torch.full((len(lengths), longest), -1, dtype=torch.long)
    for number, length in enumerate(lengths):
        reach = min(length, grid.shape[1])
        shifted[number, longest - length : longest - length + reach] = grid[number, :reach].cpu()
    flat = shifted.flatten()

    def rows(hidden: Tensor) -> Tensor | None:
        return flat if hidden.numel() // hidden.shape[-1] == flat.numel() else None

    return rows


@contextmanager
def quiet_generation() -> Iterator[None]:
    """No advice from transformers about generation settings while answers are made."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in batches."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
