"""A part of `benchmarks.sweep_models` that takes minutes: thirty types and sixteen tuners, exact or refused by name."""

from __future__ import annotations

import pytest

from benchmarks.sweep_models import cases, judged

PACKED = [
    "afmoe",
    "apertus",
    "arcee",
    "bitnet",
    "cohere2",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "gemma2",
    "gemma3",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "longcat_flash",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2_moe",
    "qwen3",
    "roberta",
    "smollm3",
    "starcoder2",
]
OTHERS = {"gpt_neo": "unshared-exact", "jamba": "unshared-exact", "bloom": "unshared-exact", "doge": "alone-exact"}
PACKED_TUNERS = [
    "LORA",
    "LORA:dora",
    "LORA:embedding",
    "ADALORA",
    "BOFT",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "OFT",
    "VERA",
]
OTHER_TUNERS = {"LORA:alora": "alone-exact", "LILY": "alone-exact", "PROMPT_TUNING": "refused"}

pytestmark = pytest.mark.slow


def verdict(name: str) -> str:
    result = judged(name, cases()[name])
    print(result)
    return result.verdict


@pytest.mark.parametrize("kind", [*PACKED, *OTHERS])
def test_types(kind: str) -> None:
    assert verdict(f"types:{kind}") == OTHERS.get(kind, "packed-exact")


@pytest.mark.parametrize("kind", [*PACKED_TUNERS, *OTHER_TUNERS])
def test_tuners(kind: str) -> None:
    assert verdict(f"tuners:{kind}") == OTHER_TUNERS.get(kind, "packed-exact")
