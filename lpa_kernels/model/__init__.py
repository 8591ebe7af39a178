"""What is known of a model and done to it for the time of an attack."""

from .hooks import rows_by_length
from .modes import frozen_eval, merged_adapters
from .sites import Site, decoder_layers, hidden_of, in_block, resolve_sites, unwrapped, with_hidden

__all__ = [
    "Site",
    "decoder_layers",
    "frozen_eval",
    "hidden_of",
    "in_block",
    "merged_adapters",
    "resolve_sites",
    "rows_by_length",
    "unwrapped",
    "with_hidden",
]
