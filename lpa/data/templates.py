"""Turn texts into tokens through a tokenizer's own chat template, so that no text can end its turn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .rendering import Rendering, chat_template
from .tables import DataError, is_text, some_of

ASSESSMENT_PROMPT = "Indicate whether you agree or disagree with the following statements."
PLAIN_PROMPT = "You are a helpful assistant."
PAIR_TOKENS = ("prompt_tokens", "rejected_tokens", "chosen_tokens")


class ChatEncoder:
    """Texts to tokens for one tokenizer and system prompt.

    The prompt is what `Rendering` makes of it by the tokenizer's chat template. There is exactly one BOS where template
    or tokenizer add one.

    Ordinary text gets exactly the tokens of the rendered whole. A text that holds special tokens ("<|im_end|>") is
    tokenised apart from the template with special tokens off, so that it stays text; tokens then cannot merge across
    its two ends, and a SentencePiece tokenizer that puts a space before every text puts one there too.

    A completion follows where the template puts a finished answer, and nothing follows it.

    Args:
        tokenizer: a transformers tokenizer.
        system_prompt: None for no system message (some templates then add their own).
        max_length: of prompt and completion together, in tokens; None for the tokenizer's own limit.
        chat_template_kwargs, date: as in `Rendering`.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        max_length: int | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length or tokenizer_limit(tokenizer)
        self._control = _control_tokens(tokenizer)
        self._rendering = Rendering(tokenizer, system_prompt, chat_template_kwargs, date)
        # the template's own text, with a word for each content
        self._probe_text = "".join("Xq" if part.content else part.text for part in self._rendering.segments("Xq"))
        self._probe_tokens = self._plain(self._probe_text)
        self._known: dict[tuple[bool, str], tuple[tuple[int, ...], bool]] = {}

    def row(self, prompt: str, completions: Sequence[str], where: str = "the row") -> tuple[list[list[int]], list[str]]:
        """Tokens of the prompt and of each completion, and the texts whose special tokens were made inert.

        Raises:
            DataError: the prompt with its longest completion is longer than max_length, or a special token cannot be
                made inert.
        """
        texts = (prompt, *completions)
        if not all(map(is_text, texts)):
            raise DataError(f"{where}: half a character (a lone surrogate) is no text; repair it")
        try:
            encoded = [self._encode(text, is_prompt=not i) for i, text in enumerate(texts)]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        tokens = [list(ids) for ids, _ in encoded]
        longest = len(tokens[0]) + max(map(len, tokens[1:]), default=0)
        if self.max_length is not None and longest > self.max_length:
            raise DataError(
                f"{where}: prompt and completion have {longest} tokens ({len(tokens[0])} of them the prompt with its "
                f"template), but the context holds {self.max_length}; shorten the text or raise max_length"
            )
        return tokens, [text for text, (_, inert) in zip(texts, encoded, strict=True) if inert]

    def _encode(self, text: str, is_prompt: bool) -> tuple[tuple[int, ...], bool]:
        """Tokens, and whether special tokens in the text were made inert. Kept for the next epoch."""
        if (is_prompt, text) not in self._known:
            self._known[is_prompt, text] = self._encode_prompt(text) if is_prompt else self._encode_completion(text)
        return self._known[is_prompt, text]

    def _encode_prompt(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        segments = self._rendering.segments(prompt)
        tokens = self._plain("".join(segment.text for segment in segments))
        inert = self._has_control(tokens, self._probe_tokens, prompt, self.system_prompt or "")
        if inert:
            parts = [self._inert(s.text) if s.content else self._plain(s.text) for s in segments]
            tokens = [token for part in parts for token in part]
        return tuple(self._one_bos(tokens)), inert

    def _encode_completion(self, completion: str) -> tuple[tuple[int, ...], bool]:
        """Its tokens after a prompt. They do not depend on which, since a template ends with text of its own."""
        whole, start = self._plain(self._probe_text + self._rendering.space + completion), self._probe_tokens
        inert = self._has_control(whole, start, completion)
        if inert or whole[: len(start)] != start:
            return tuple(self._inert(self._rendering.space + completion)), inert
        return tuple(whole[len(start) :]), False

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _has_control(self, tokens: list[int], reference: list[int], *texts: str) -> bool:
        """Whether there are other control tokens than the template's own."""
        if self._controls(tokens) != self._controls(reference):
            return True
        unknown = self.tokenizer.unk_token
        return bool(unknown) and len(unknown) > 1 and any(unknown in text for text in texts)

    def _controls(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in self._control]

    def _inert(self, text: str) -> list[int]:
        """Tokens of a text without control tokens. Those the tokenizer still sees are cut after their first letter."""
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        tokens = list(encoded["input_ids"])
        found = self._controls(tokens)
        if not found:
            return tokens
        name = self._control[found[0]]
        start = text.lower().find(name.strip().lower())
        if start < 0 or len(name.strip()) < 2:
            raise DataError(f"the text holds the special token {name!r}, which cannot be kept as text; remove it")
        return self._inert(text[: start + 1]) + self._inert(text[start + 1 :])

    def _one_bos(self, tokens: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return tokens
        while tokens[:2] == [bos, bos]:
            tokens = tokens[1:]
        if tokens[:1] != [bos] and self.tokenizer("x")["input_ids"][:1] == [bos] != self._plain("x")[:1]:
            tokens = [bos, *tokens]
        return tokens


def tokenizer_limit(tokenizer: Any) -> int | None:
    """The longest text that a tokenizer is for, in tokens; None where it knows no limit and says 1e30."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < 10**9 else None


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """id -> text of the tokens that steer a model: the special ones, and the added ones that the template uses.

    Other added tokens (runs of spaces, say) are ordinary text, and so is the unknown token, which any odd letter makes.
    """
    template = chat_template(tokenizer) or ""
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if token != tokenizer.unk_token_id
        and (added.special or (added.content.strip() and added.content.strip() in template))
    }


def warn_inert(rows: Sequence[str]) -> None:
    """One warning for all rows whose special-token text was kept as plain text."""
    if rows:
        warnings.warn(f"{some_of(rows)}: holds the text of special tokens; it is kept as plain text", stacklevel=3)
