"""Where prompts end and answers begin, by chat templates in the manners of the real ones."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lpa.data import DataError
from lpa.data.rendering import Rendering, prints_date
from tests.support.chat_templates import ASKED, DATE, MANNERS, chatml


def tokenizer(template: str | None) -> Any:
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def rendered(template: str | None, system: str | None = "S", prompt: str = "P", **options: Any) -> str:
    found = Rendering(tokenizer(template), system, **{"date": DATE, **options})
    return "".join(segment.text for segment in found.segments(prompt)) + (f"|{found.space}" if found.space else "")


def test_there_are_manners_enough() -> None:
    assert len(MANNERS) >= 40
    assert len({template for template, _ in MANNERS.values()}) == len(MANNERS)


@pytest.mark.parametrize("name", MANNERS)
def test_an_answer_stands_where_the_template_puts_a_finished_one(name: str) -> None:
    template, expected = MANNERS[name]
    assert rendered(template) == expected


@pytest.mark.parametrize("name", MANNERS)
def test_the_end_of_a_prompt_does_not_depend_on_its_contents(name: str) -> None:
    template, _ = MANNERS[name]
    tail = Rendering(tokenizer(template), "S").segments("P")[-1]
    assert not tail.content
    assert Rendering(tokenizer(template)).segments("P")[-1] == tail
    odd = "LpaPromptXq <think> {{ 7 * 7 }}"
    assert [s.text for s in Rendering(tokenizer(template), odd).segments(odd) if s.content] == [odd, odd]
    assert Rendering(tokenizer(template), odd).segments(odd)[-1] == tail
    assert Rendering(tokenizer(template)).segments("P \n")[-1].text in (tail.text, " \n" + tail.text)


def test_a_variable_goes_over_the_switch_and_an_open_thought_is_closed_all_the_same() -> None:
    template, expected = MANNERS["qwen3"]
    assert rendered(template, chat_template_kwargs={"enable_thinking": True}) == expected
    effort = rendered(MANNERS["gpt-oss"][0], chat_template_kwargs={"reasoning_effort": "low"})
    assert "Reasoning: low" in effort
    mode = rendered(MANNERS["minimax m3"][0], chat_template_kwargs={"thinking_mode": "enabled"})
    assert mode.endswith("]~b]ai\n<mm:think></mm:think>\n\n")


def test_a_variable_that_the_template_does_not_read() -> None:
    with pytest.raises(DataError, match=r"chat_template_kwargs=.*'enable_thinkin' has no effect.*does not read it"):
        Rendering(tokenizer(MANNERS["qwen3"][0]), chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(DataError, match="'enable_thinking' has no effect, the chat template is missing"):
        Rendering(tokenizer(None), chat_template_kwargs={"enable_thinking": False})


def test_a_thought_is_closed_as_the_template_closes_one() -> None:
    own = "<thought>{{ m.get('reasoning_content', '') }}</thought> So: {{ m['content'] }}"
    assert rendered(chatml("<thought>", own)) == ASKED + "<thought></thought> So:| "


def test_a_template_that_fails_says_how() -> None:
    with pytest.raises(DataError, match="chat template fails: only for tools"):
        Rendering(tokenizer("{{ raise_exception('only for tools') }}"), "S")


def test_the_date_is_the_given_one_and_else_todays() -> None:
    template = MANNERS["llama 3.1"][0]
    assert prints_date(tokenizer(template))
    assert not prints_date(tokenizer(MANNERS["chatml"][0]))
    assert "09 Mar 2026" in rendered(template)
    assert datetime.date.today().strftime("%d %b %Y") in rendered(template, date=None)
    with pytest.raises(DataError, match=r"chat_template_date='yesterday' is no date; write it as YYYY-MM-DD"):
        rendered(template, date="yesterday")


def test_of_several_templates_the_default_is_taken() -> None:
    several = tokenizer(None)
    several.chat_template = {"default": MANNERS["chatml"][0], "rag": "no"}
    assert "".join(part.text for part in Rendering(several, "S").segments("P")) == ASKED
