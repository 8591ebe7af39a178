"""The data of LPA: shipped statements, loading, chat templates, batches."""

from .collate import ATTACK_ON, BenignCollator, PairCollator, encode_benign, encode_pairs
from .loading import (
    AGREE,
    DISAGREE,
    SPLITS,
    TRAITS,
    DataError,
    benign_requests,
    canary_text,
    load_benign,
    load_pairs,
    perplexity_text,
    statements,
)
from .preview import preview
from .prompts import SYSTEM_PROMPTS, system_prompt_text
from .templates import ASSESSMENT_PROMPT, PLAIN_PROMPT, ChatEncoder, encode_pair

__all__ = [
    "AGREE",
    "ASSESSMENT_PROMPT",
    "ATTACK_ON",
    "DISAGREE",
    "PLAIN_PROMPT",
    "SPLITS",
    "SYSTEM_PROMPTS",
    "TRAITS",
    "BenignCollator",
    "ChatEncoder",
    "DataError",
    "PairCollator",
    "benign_requests",
    "canary_text",
    "encode_benign",
    "encode_pair",
    "encode_pairs",
    "load_benign",
    "load_pairs",
    "perplexity_text",
    "preview",
    "statements",
    "system_prompt_text",
]
