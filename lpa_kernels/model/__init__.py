"""What is known of a model and done to it for the time of an attack."""

from .facts import forget, known, model_key, remembered, say_once
from .head import selected_rows
from .hooks import hooked, record_last
from .modes import as_if_trained, eval_mode, frozen_eval, merged_adapters, probing
from .perturbation import rows_by_length
from .sites import Site, decoder_layers, hidden_of, in_block, language_model, resolve_sites, unwrapped, with_hidden

__all__ = [
    "Site",
    "as_if_trained",
    "decoder_layers",
    "eval_mode",
    "forget",
    "frozen_eval",
    "hidden_of",
    "hooked",
    "in_block",
    "known",
    "language_model",
    "merged_adapters",
    "model_key",
    "probing",
    "record_last",
    "remembered",
    "resolve_sites",
    "rows_by_length",
    "say_once",
    "selected_rows",
    "unwrapped",
    "with_hidden",
]
