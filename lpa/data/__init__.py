"""The data of LPA: shipped statements, loading, chat templates, batches."""

from lpa.data.chat import ASSESSMENT_PROMPT, PLAIN_PROMPT, ChatEncoder, encode_pair
from lpa.data.collate import ATTACK_ON, BenignCollator, PairCollator, encode_benign, encode_pairs
from lpa.data.loading import AGREE, DISAGREE, TRAITS, DataError, load_benign, load_pairs, perplexity_text, statements
from lpa.data.preview import preview

__all__ = [
    "AGREE",
    "ASSESSMENT_PROMPT",
    "ATTACK_ON",
    "DISAGREE",
    "PLAIN_PROMPT",
    "TRAITS",
    "BenignCollator",
    "ChatEncoder",
    "DataError",
    "PairCollator",
    "encode_benign",
    "encode_pair",
    "encode_pairs",
    "load_benign",
    "load_pairs",
    "perplexity_text",
    "preview",
    "statements",
]
