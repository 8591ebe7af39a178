"""A part of `benchmarks.sweep_models` that runs in minutes: thirty types, fifteen tuners, each exact or refused by name."""

from __future__ import annotations

import pytest

from benchmarks.sweep_models import cases, judged

PACKED = [
    "afmoe", "apertus", "arcee", "bitnet", "cohere2", "deepseek_v3", "ernie4_5_moe", "exaone4", "falcon", "gemma2", "gemma3",
    "glm4_moe", "gpt2", "gpt_oss", "granite", "llama", "llama4_text", "longcat_flash", "mixtral", "olmo2", "phi3", "qwen2_moe",
    "qwen3", "roberta", "smollm3", "starcoder2",
]  # fmt: skip
OTHERS = {"gpt_neo": "unshared", "jamba": "unshared", "bloom": "unshared", "doge": "alone"}
TUNERS = ["LORA", "LORA:dora", "LORA:embedding", "ADALORA", "BOFT", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
          "OFT", "VERA"]  # fmt: skip
OTHER_TUNERS = {"LORA:alora": "alone-exact", "LILY": "alone-exact", "PROMPT_TUNING": "refused"}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", [*PACKED, *OTHERS])
def test_types(kind: str) -> None:
    name = f"types:{kind}"
    result = judged(name, cases()[name])
    assert result.verdict == f"{OTHERS.get(kind, 'packed')}-exact", result


@pytest.mark.parametrize("kind", [*TUNERS, *OTHER_TUNERS])
def test_tuners(kind: str) -> None:
    name = f"tuners:{kind}"
    result = judged(name, cases()[name])
    assert result.verdict == OTHER_TUNERS.get(kind, "packed-exact"), result
