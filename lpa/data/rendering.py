"""Render a prompt by a tokenizer's chat template, up to where a finished answer stands, with no thought left open."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lpa.messages import one_line

from .tables import DataError

# Words that stand for the contents while a template is rendered: plain letters, which no template changes or splits.
_SYSTEM, _PROMPT, _ANSWER, _THOUGHT = "LpaSystemXq", "LpaPromptXq", "LpaAnswerXq", "LpaThoughtXq"
_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # variables by which templates leave a thought out
_NO_THINK = "/no_think"  # other templates look for this in the system's or the user's text
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
# tags that open a thought -> those that close it
_THOUGHTS = {
    re.compile(r"<((?:\w+[:_])?(?:think|thinking|thought|reasoning))>", re.IGNORECASE): "</{}>",
    re.compile(r"<\|START_(THINKING)\|>"): "<|END_{}|>",
    re.compile(r"<\|begin_of_(thought)\|>"): "<|end_of_{}|>",
    re.compile(r"<\|(channel)>thought\b"): "<{}|>",
    re.compile(r"\[(THINK)\]"): "[/{}]",
}
_CLOSE = re.compile(
    r"</(?:\w+[:_])?(?:think|thinking|thought|reasoning)>|<\|END_THINKING\|>|<\|end_of_thought\|>|<channel\|>|\[/THINK\]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered prompt: the template's own text, or content that must stay inert."""

    text: str
    content: bool


@dataclass(frozen=True)
class _Way:
    """How a template is given messages: contents in parts; the system's text in the user's; an empty list of tools;
    without the switches for thoughts (bare); and in whose text "/no_think" stands."""

    parts: bool = False
    folded: bool = False
    tools: bool = False
    bare: bool = False
    no_think: str = ""


class Rendering:
    """Prompts as one tokenizer's chat template renders them for one system prompt.

    What follows a prompt is what the template puts before a finished answer: it renders one, and what stands between
    prompt and answer is taken (gpt-oss: the header of the final channel; Kimi K2 Thinking: an empty thought). What
    stands before is the prompt's own rendering, as some templates leave the system's text out once an answer follows.
    A thought that is open there is refused by "/no_think" where the template looks for that, and closed otherwise.

    A template that refuses or drops the system message gets it in the user's, before the prompt and an empty line. One
    that cannot do without a list of tools gets an empty one, and one that reads contents in parts gets them so. Without
    a template it is "{system}\\n\\n{prompt}\\n".

    Args:
        system_prompt: None for no system message (some templates then add their own).
        chat_template_kwargs: variables for the template. `enable_thinking`, `thinking` and `reasoning` are False where
            it reads them and nothing else is given.
        date: YYYY-MM-DD, for templates that print the date; None for today's.

    Attributes:
        space: white space that the template puts before an answer (Llama 2: a space), for the answer to begin with.

    Raises:
        DataError: the template fails, leaves out or repeats the prompt, or does not read one of the variables.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        template, given = chat_template(tokenizer), dict(chat_template_kwargs or {})
        for name in given:
            if not _reads(template, name):
                why = "does not read it" if template else "is missing: this tokenizer has none"
                raise DataError(f"chat_template_kwargs={given}: {name!r} has no effect, the chat template {why}")
        self._given = given
        self._switches = {name: False for name in _SWITCHES if _reads(template, name)}
        self._template = _dated(template, date)
        # A blank system prompt has no text to fold or to protect, but where the template has the role it must see it:
        # some put a system message of their own where there is none.
        self._has_system = bool(system_prompt and system_prompt.strip())
        self._way = self._find_way()
        self._own, self._tail, self.space = self._answer_place()

    def segments(self, prompt: str) -> list[Segment]:
        """The rendered prompt, up to where an answer and the white space before it begin."""
        rest = self._render(self._messages(prompt))
        found = []
        for mark, content in self._marks(prompt):
            before, _, rest = rest.partition(mark)
            found += [Segment(before, False), Segment(content, True)]
        kept = rest.removesuffix(self._own) if rest.endswith(self._own) else ""  # white space at the prompt's end
        return [segment for segment in (*found, Segment(kept + self._tail, False)) if segment.text]

    def _marks(self, prompt: str = "") -> list[tuple[str, str]]:
        """The stand-ins in order, each with the content that it stands for."""
        system = [(_SYSTEM, (self._system_prompt or "").strip())] if self._has_system else []
        return [*system, (_PROMPT, prompt.strip())]

    def _messages(self, prompt: str = _PROMPT, way: _Way | None = None) -> list[dict[str, Any]]:
        """Messages with stand-ins for the contents, with their white space at the ends: templates may strip it."""
        way = way or self._way
        user, system = _around(prompt, _PROMPT), self._system_prompt
        if self._has_system:
            system = _around(system or "", _SYSTEM)
        if way.no_think == "system":
            system = f"{system} {_NO_THINK}" if system else _NO_THINK
        if way.no_think == "user":
            user = f"{user} {_NO_THINK}"
        if way.folded:
            return [_message("user", f"{system}\n\n{user}" if self._has_system else user, way)]
        return [_message("system", system, way)] * (system is not None) + [_message("user", user, way)]

    def _render(self, messages: list[dict[str, Any]], way: _Way | None = None, prompting: bool = True) -> str:
        if not self._template:
            *asked, last = [m["content"] for m in messages if m["content"]]
            return "\n\n".join([*asked, last]) + "\n" if prompting else "\n\n".join(asked) + "\n" + last
        way = way or self._way
        variables = self._given if way.bare else self._switches | self._given
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompting, chat_template=self._template,
            tools=[] if way.tools else None, **variables,
        )  # fmt: skip
        return str(rendered)

    def _find_way(self) -> _Way:
        """The first way in which each content is rendered exactly once, in order."""
        wrong = ""
        marks = [mark for mark, _ in self._marks()]
        both = (False, True)
        for flags in itertools.product(both, both[: 1 + (self._system_prompt is not None)], both, both):
            way = _Way(*flags)
            try:
                rendered = self._render(self._messages(way=way), way)
            except Exception as error:  # templates refuse what they do not know by raising, each in its own way
                wrong = wrong or f"fails: {one_line(error)}"
                continue
            found = re.findall("|".join(marks), rendered)
            if found == marks and not (way.parts and _as_repr(rendered)):
                return way
            what = "prompt" if found.count(_PROMPT) != 1 else "system prompt"
            wrong = wrong or f"does not render the {what} exactly once, in order"
        raise DataError(f"the tokenizer's chat template {wrong}")

    def _answer_place(self) -> tuple[str, str, str]:
        """(what the generation prompt puts after the prompt, what a finished answer has before it, white space that
        belongs to the answer)."""
        own, tail = self._tails(self._way)
        if _NO_THINK in (self._template or "") and not _has_closed_thought(tail):
            for who in ("system", "user"):
                way = replace(self._way, no_think=who)
                refused = self._tails(way)
                if _has_closed_thought(refused[1]):
                    self._way, (own, tail) = way, refused
                    break
        if tag := _open_thought(tail):
            return own, tail + self._closing(tag, tail), ""
        gap = tail[len(own) :]
        space = gap[len(gap.rstrip()) :] if not gap.strip() else gap[len(gap.rstrip(" ")) :]
        return own, tail[: len(tail) - len(space)], space

    def _tails(self, way: _Way) -> tuple[str, str]:
        """(what the generation prompt puts after the prompt, what a finished answer has before it)."""
        own = self._render(self._messages(way=way), way).partition(_PROMPT)[2]
        finished = _between(self._answered(way), _PROMPT, _ANSWER)
        if finished is None:
            return own, own
        if own.startswith(finished):  # an open or an empty thought is kept; no answer follows anything else
            more = own[len(finished) :]
            thought = _open_thought(more) or _CLOSE.search(more)
            return own, own if thought or not more.strip() else finished
        return own, finished if finished.startswith(own) else own

    def _answered(self, way: _Way, **thought: str) -> str:
        """A conversation with its answer; "" where the template does not take one."""
        answer = _message("assistant", _ANSWER, way) | thought
        try:
            return self._render([*self._messages(way=way), answer], way, prompting=False)
        except Exception:  # each template raises in its own way
            return ""

    def _closing(self, tag: str, tail: str) -> str:
        """What closes a thought as the template closes a finished one, or else on a line of its own."""
        found = _between(self._answered(self._way, reasoning_content=_THOUGHT), _THOUGHT, _ANSWER)
        if found is not None and tag in found:
            return found
        return f"\n{tag}\n\n" if tail.endswith("\n") else f"{tag}\n\n"


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several the one called default."""
    template = getattr(tokenizer, "chat_template", None)
    return str(tokenizer.get_chat_template()) if isinstance(template, dict) else template or None


def today() -> str:
    """YYYY-MM-DD, where the process runs."""
    return datetime.date.today().isoformat()


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date."""
    return bool(_TODAY.search(chat_template(tokenizer) or ""))


def _reads(template: str | None, name: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", template or ""))


def _dated(template: str | None, date: str | None) -> str | None:
    """The template with a fixed date in the place of today's. The libraries let no function of ours in."""
    if not template:
        return None
    try:
        day = datetime.date.fromisoformat(today() if date is None else date)
    except ValueError:
        raise DataError(f"chat_template_date={date!r} is no date; write it as YYYY-MM-DD") from None
    return _TODAY.sub(lambda found: repr(day.strftime(found[2])), template)


def _message(role: str, text: str | None, way: _Way) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if way.parts else text}


def _as_repr(rendered: str) -> bool:
    """Whether a list of parts was printed as Python shows it."""
    return f"'text': '{_PROMPT}" in rendered or f"'text': '{_SYSTEM}" in rendered


def _between(text: str, start: str, end: str) -> str | None:
    """What stands between two marks that are there once each; None where they are not."""
    found = re.fullmatch(rf".*?{start}(.*?){end}.*", text, re.DOTALL)
    return found[1] if found and text.count(start) == text.count(end) == 1 else None


def _open_thought(text: str) -> str | None:
    """The tag that closes the last thought of a text; None where it has none, or a closed one."""
    found = [(match.end(), close.format(match[1])) for tag, close in _THOUGHTS.items() for match in tag.finditer(text)]
    end, tag = max(found, default=(0, ""))
    return tag if found and tag not in text[end:] else None


def _has_closed_thought(text: str) -> bool:
    return bool(_CLOSE.search(text)) and _open_thought(text) is None


def _around(text: str, mark: str) -> str:
    """The mark with the text's white space at both ends; a text of white space alone is kept as a prefix."""
    core = text.strip()
    start = text.find(core) if core else len(text)
    return text[:start] + mark + text[start + len(core) :]
