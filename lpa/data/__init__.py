"""The data of LPA: shipped statements, loading, chat templates, batches."""

from .arms import AGREE, DISAGREE, SHIPPED, SPLITS, TRAITS, ipip_statements, statements
from .collate import ATTACK_ON, BenignCollator, PairCollator, encode_benign, encode_pairs
from .loading import benign_requests, canary_text, load_benign, load_pairs, perplexity_text, questions
from .preview import preview
from .prompts import SYSTEM_PROMPTS, system_prompt_text
from .tables import DataError
from .templates import ASSESSMENT_PROMPT, PLAIN_PROMPT, ChatEncoder

__all__ = [
    "AGREE",
    "ASSESSMENT_PROMPT",
    "ATTACK_ON",
    "DISAGREE",
    "PLAIN_PROMPT",
    "SHIPPED",
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
    "encode_pairs",
    "ipip_statements",
    "load_benign",
    "load_pairs",
    "perplexity_text",
    "preview",
    "questions",
    "statements",
    "system_prompt_text",
]
