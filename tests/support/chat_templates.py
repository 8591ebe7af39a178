"""Chat templates in the manners of real ones, written for the tests, each with the prompt that an answer stands behind.

S, P stand for the system's text and the prompt. What stands after | belongs to the answer.
"""

from __future__ import annotations

DATE = "2026-03-09"


def turns(before: str, between: str, after: str, prompting: str, user: str = "user", answer: str = "assistant") -> str:
    """A template whose turns all look alike, with the role between two texts."""
    role = f"{{{{ {{'user': '{user}', 'assistant': '{answer}'}}.get(m['role'], m['role']) }}}}"
    return (
        f"{{% for m in messages %}}{before}{role}{between}{{{{ m['content'] }}}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompting}{{% endif %}}"
    )


CHATML = turns("<|im_start|>", "\n", "<|im_end|>\n", "<|im_start|>assistant\n")
ASKED = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
CALLED = "{{% if add_generation_prompt %}}{}{{% endif %}}"


def chatml(prompting: str, answer: str = "{{ m['content'] }}", before: str = "") -> str:
    """ChatML with a generation prompt and an answer of one's own."""
    return (
        f"{before}{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
        f"{{% if m['role'] == 'assistant' %}}{answer}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}<|im_end|>\n"
        f"{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompting}{{% endif %}}"
    )


def inst(system: str, user: str, answer: str, prompting: str = "") -> str:
    """Turns of a user whose text may have the system's before it, as of Llama 2 and Mistral."""
    return (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}<s>"
        "{% for m in rest %}{% if m['role'] == 'user' %}" + user.replace("SYSTEM", system) + "{% else %}" + answer
        + "{% endif %}{% endfor %}" + CALLED.format(prompting)
    )  # fmt: skip


OPEN = "<think>\n"
IF_NOT = "{% if enable_thinking is defined and enable_thinking is false %}"
THOUGHT = "{{ '<think>\n' + m.get('reasoning_content', '') + '\n</think>\n\n' + m['content'] }}"
LAST = "{{ m['content'].split('</think>')[-1].lstrip() }}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% set ns = namespace(s='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.s = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nDATED{{ ns.s }}<|eot_id|>{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    + CALLED.format("<|start_header_id|>assistant<|end_header_id|>\n\n")
)
HEADERS = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nDATED<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nP"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
    "<A>ANSWER<EOS>{% else %}{{ m['content'] }}{% endif %}{% endfor %}" + CALLED.format("<A>PROMPTING")
)
CHANNELS = (
    "<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}\nReasoning: {{ reasoning_effort or 'medium' }}"
    "<|end|>{% for m in messages %}{% if m['role'] == 'system' %}<|start|>developer<|message|># Instructions\n\n"
    "{{ m['content'] }}<|end|>{% elif m['role'] == 'user' %}<|start|>user<|message|>{{ m['content'] }}<|end|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    + CALLED.format("<|start|>assistant")
)
KIMI = (
    "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['role'] }}<|im_middle|>{% if m['role'] == 'assistant' %}"
    "<think>{{ m.get('reasoning_content', '') }}</think>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    + CALLED.format("<|im_assistant|>assistant<|im_middle|>")
)
NANO = (
    "{% set ns = namespace(think=true) %}{% for m in messages %}{% if m['role'] != 'assistant' and '/no_think' in "
    "m['content'] %}{% set ns.think = false %}{% endif %}{% endfor %}{% for m in messages %}<SP>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>{{ '\n\n' if ns.think else '</think>' }}{% endif %}"
    "{{ m['content'].replace('/no_think', '').strip() }}\n{% endfor %}{% if add_generation_prompt %}<SP>assistant\n"
    "<think>{{ '\n\n' if ns.think else '</think>' }}{% endif %}"
)
SUPER = (
    "{% set think = true %}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'system' and '/no_think' in "
    "m['content'] %}{% set think = false %}{{ m['content'].replace('/no_think', '') | trim }}{% else %}"
    "{{ m['content'] }}{% endif %}{% if loop.last and m['role'] == 'user' %}<|assistant|>"
    "{{ '<think>\n\n</think>\n\n' if '/no_think' in messages[0]['content'] }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}" + CALLED.format("<|assistant|>")
)
TOOLS = "{{ tools | length }} tools\n" + CHATML
MACRO = (
    "{% macro text(c) %}{% if c is string %}{{ c }}{% else %}{{ c[0]['text'] }}{% endif %}{% endmacro %}"
    "{% for m in messages %}]~b]{{ 'ai' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}</mm:think>{% endif %}{{ text(m['content']) }}[e~[\n{% endfor %}"
    + CALLED.format("]~b]ai\n{% if thinking_mode == 'enabled' %}<mm:think>{% endif %}")
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}<think></think>\n"
    "{% endif %}{{ m['content'] }}{{ '/nothink' if m['role'] == 'user' and enable_thinking is defined and not "
    "enable_thinking }}{% endfor %}" + CALLED.format("<|assistant|>\n" + IF_NOT + "<think></think>{% endif %}")
)
SEED = turns("<seed:bos>", "\n", "<seed:eos>", "<seed:bos>assistant\n<seed:think>")
COHERE = (
    "{% for m in messages %}<|TURN|><|{{ m['role'] | upper }}|>{% if m['role'] == 'assistant' %}<|START_RESPONSE|>"
    "{% endif %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END|>{% endfor %}"
    + CALLED.format("<|TURN|><|ASSISTANT|>{% if reasoning %}<|START_THINKING|>{% else %}<|START_RESPONSE|>{% endif %}")
)
COHERE_THINKS = turns("<|TURN|>", ":", "<|END|>", "<|TURN|>assistant:<|START_THINKING|>")
GEMMA4 = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<turn|>\n{% endfor %}"
    + CALLED.format("<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}")
)
JUDGE = chatml("<judge>\n", LAST)
REFUSES_SWITCH = IF_NOT + "{{ raise_exception('thinking cannot be switched off') }}{% endif %}" + chatml(OPEN, THOUGHT)
VICUNA = inst(
    "{{ s + ' ' if s and loop.first }}", "SYSTEMUSER: {{ m['content'] }} ", "ASSISTANT: {{ m['content'] }}</s>"
)
FUNCTION = turns("<|", "|>", "<eot>", "<|assistant|>")
WRITES_DATE = "{% set today = strftime_now('%d %B %Y') %}<s>[SYS]Today is {{ today }}.\n{% for m in messages %}" \
    "{% if m['role'] == 'system' %}{{ m['content'] }}[/SYS]{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}" \
    "[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"  # fmt: skip
GRANITE = (
    "{% if messages[0]['role'] != 'system' %}<role>system</role>{{ strftime_now(\"%B %d, %Y\") }}\n{% endif %}"
    "{% for m in messages %}<role>{{ m['role'] }}</role>{{ m['content'] }}<end>\n{% endfor %}"
    + CALLED.format("<role>assistant</role>")
)

# name -> (template, the prompt)
MANNERS: dict[str, tuple[str, str]] = {
    "chatml": (CHATML, ASKED),
    "chatml, no generation prompt": (turns("<|im_start|>", "\n", "<|im_end|>\n", ""), ASKED),
    "qwen3": (chatml(IF_NOT + "<think>\n\n</think>\n\n{% endif %}", THOUGHT), ASKED + "<think>\n\n</think>\n\n"),
    "qwen3 thinking": (chatml(OPEN, THOUGHT), ASKED + "<think>\n\n</think>\n\n"),
    "qwen3, history without thoughts": (
        chatml(IF_NOT + "<think>\n\n</think>\n\n{% endif %}", LAST), ASKED + "<think>\n\n</think>\n\n"),
    "qwq": (chatml(OPEN, LAST), ASKED + "<think>\n\n</think>\n\n"),
    "smollm3": (chatml("{% if enable_thinking %}{% else %}<think>\n\n</think>\n{% endif %}", LAST, "{# /no_think #}"),
                ASKED + "<think>\n\n</think>\n"),
    "kat": (JUDGE, ASKED),
    "switch refused": (REFUSES_SWITCH, ASKED + "<think>\n\n</think>\n\n"),
    "hermes tools": (TOOLS, "0 tools\n" + ASKED),
    "moonlight": (turns("<|im_", "|>", "<|im_end|>", "<|im_assistant|>"),
                  "<|im_system|>S<|im_end|><|im_user|>P<|im_end|><|im_assistant|>"),
    "kimi k2 thinking": (KIMI, "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>P<|im_end|>"
                         "<|im_assistant|>assistant<|im_middle|><think></think>"),
    "gpt-oss": (CHANNELS, "<|start|>system<|message|>Today: 2026-03-09\nReasoning: medium<|end|><|start|>developer"
                "<|message|># Instructions\n\nS<|end|><|start|>user<|message|>P<|end|><|start|>assistant"
                "<|channel|>final<|message|>"),
    "minimax m3": (MACRO, "]~b]system\nS[e~[\n]~b]user\nP[e~[\n]~b]ai\n</mm:think>"),
    "minimax m2": (turns("]~b]", "\n", "[e~[\n", "]~b]ai\n<think>\n", answer="ai"),
                   "]~b]system\nS[e~[\n]~b]user\nP[e~[\n]~b]ai\n<think>\n\n</think>\n\n"),
    "nemotron nano": (NANO, "<SP>system\nS\n<SP>user\nP\n<SP>assistant\n<think></think>"),
    "nemotron super": (SUPER, "<|system|>S<|user|>P<|assistant|><think>\n\n</think>\n\n"),
    "deepseek v3": (DEEPSEEK.replace("ANSWER", "{{ m['content'] }}").replace("PROMPTING", ""), "S<U>P<A>"),
    "deepseek v3.1": (DEEPSEEK.replace("ANSWER", "</think>{{ m['content'] }}").replace(
        "PROMPTING", "{% if thinking %}<think>{% else %}</think>{% endif %}"), "S<U>P<A></think>"),
    "deepseek r1": (DEEPSEEK.replace("ANSWER", LAST).replace("PROMPTING", OPEN), "S<U>P<A><think>\n\n</think>\n\n"),
    "deepseek r1, no line": (DEEPSEEK.replace("ANSWER", LAST).replace("PROMPTING", "<think>"),
                             "S<U>P<A><think></think>\n\n"),
    "kimi k2.5": (DEEPSEEK.replace("ANSWER", "<think></think>{{ m['content'] }}").replace(
        "PROMPTING", "{% if thinking is defined and thinking is false %}<think></think>{% else %}<think>{% endif %}"),
        "S<U>P<A><think></think>"),
    "glm 4": (turns("<|", "|>\n", "", "<|assistant|>"), "<|system|>\nS<|user|>\nP<|assistant|>|\n"),
    "glm 4.5": (GLM, "[gMASK]<sop><|system|>\nS<|user|>\nP/nothink<|assistant|>\n<think></think>|\n"),
    "glm 4.7": (turns("<|", "|>", "", "<|assistant|>{{ '</think>' if not enable_thinking else '<think>' }}"),
                "<|system|>S<|user|>P<|assistant|></think>"),
    "seed": (SEED, "<seed:bos>system\nS<seed:eos><seed:bos>user\nP<seed:eos><seed:bos>assistant\n<seed:think>"
             "</seed:think>\n\n"),
    "command a": (COHERE, "<|TURN|><|SYSTEM|>S<|END|><|TURN|><|USER|>P<|END|><|TURN|><|ASSISTANT|><|START_RESPONSE|>"),
    "command a reasoning": (COHERE_THINKS, "<|TURN|>system:S<|END|><|TURN|>user:P<|END|><|TURN|>assistant:"
                            "<|START_THINKING|><|END_THINKING|>\n\n"),
    "magistral": (inst("", "[INST]{{ m['content'] }}[/INST]", "{{ m['content'] }}</s>", "[THINK]").replace(
        "<s>", "<s>[SYS]{{ s }}[/SYS]"), "<s>[SYS]S[/SYS][INST]P[/INST][THINK][/THINK]\n\n"),
    "gemma 4": (GEMMA4, "<bos><|turn>system\nS<turn|>\n<|turn>user\nP<turn|>\n<|turn>model\n<|channel>thought\n"
                "<channel|>"),
    "gemma": (NO_SYSTEM + turns("<turn>", "\n", "</turn>\n", "<turn>model\n", answer="model"),
              "<turn>user\nS\n\nP</turn>\n<turn>model\n"),
    "llama 2": (inst("{{ '<<SYS>>\n' + s + '\n<</SYS>>\n\n' if s and loop.first }}",
                     "[INST] SYSTEM{{ m['content'].strip() }} [/INST]", " {{ m['content'].strip() }} </s>"),
                "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nP [/INST]| "),
    "llama 3": (LLAMA3.replace("DATED", ""), HEADERS.replace("DATED", "S")),
    "llama 3.1": (LLAMA3.replace("DATED", "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"),
                  HEADERS.replace("DATED", "Today Date: 09 Mar 2026\n\nS")),
    "mistral 7b v0.1": (NO_SYSTEM + inst("", "[INST] {{ m['content'] }} [/INST]", "{{ m['content'] }}</s>"),
                        "<s>[INST] S\n\nP [/INST]"),
    "mistral 7b v0.3": (inst("{{ s + '\n\n' if s and loop.last }}", "[INST] SYSTEM{{ m['content'] }}[/INST]",
                             " {{ m['content'] }}</s>"), "<s>[INST] S\n\nP[/INST]| "),
    "mistral nemo": (inst("{{ s + '\n\n' if s and loop.last }}", "[INST]SYSTEM{{ m['content'] }}[/INST]",
                          "{{ m['content'] }}</s>"), "<s>[INST]S\n\nP[/INST]"),
    "mistral small": (WRITES_DATE, "<s>[SYS]Today is 09 March 2026.\nS[/SYS][INST]P[/INST]"),
    "granite": (GRANITE, "<role>system</role>S<end>\n<role>user</role>P<end>\n<role>assistant</role>"),
    "phi 3": (FUNCTION, "<|system|>S<eot><|user|>P<eot><|assistant|>"),
    "phi 3, system dropped": (FUNCTION.replace("in messages", "in messages if m['role'] != 'system'"),
                              "<|user|>S\n\nP<eot><|assistant|>"),
    "phi 4": (turns("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
              ASKED.replace("\n<|im_s", "<|im_s").replace("\n", "<|im_sep|>")),
    "vicuna": (VICUNA + CALLED.format("ASSISTANT:"), "<s>S USER: P ASSISTANT:| "),
    "vicuna, no generation prompt": (VICUNA, "<s>S USER: P ASSISTANT:| "),
    "alpaca": (inst("{{ s + '\n\n' if s and loop.first }}", "SYSTEM### Instruction:\n{{ m['content'] }}\n\n",
                    "### Response:\n{{ m['content'] }}</s>", "### Response:\n"),
               "<s>S\n\n### Instruction:\nP\n\n### Response:\n"),
    "zephyr": (turns("<|", "|>\n", "</s>\n", "<|assistant|>\n"),
               "<|system|>\nS</s>\n<|user|>\nP</s>\n<|assistant|>\n"),
    "idefics": (PARTS, "<|system|>S<end>\n<|user|>P<end>\n<|assistant|>"),
    "no answers": (FUNCTION.replace("<|{{", "{{ raise_exception('not you') if m['role'] == 'assistant' }}<|{{"),
                   "<|system|>S<eot><|user|>P<eot><|assistant|>"),
    "exaone": (turns("[|", "|]", "[|end|]\n", "[|assistant|]{% if enable_thinking is defined and not enable_thinking %}"
                     "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"),
               "[|system|]S[|end|]\n[|user|]P[|end|]\n[|assistant|]<think>\n\n</think>\n\n"),
    "jamba": (turns("<|bom|><|", "|> ", "<|eom|>", "<|bom|><|assistant|>"),
              "<|bom|><|system|> S<|eom|><|bom|><|user|> P<|eom|><|bom|><|assistant|>| "),
}  # fmt: skip
