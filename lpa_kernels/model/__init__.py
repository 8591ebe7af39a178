"""What is known of a model and done to it for the time of an attack."""

from .modes import frozen_eval, merged_adapters
from .sites import Site, decoder_layers, resolve_sites

__all__ = ["Site", "decoder_layers", "frozen_eval", "merged_adapters", "resolve_sites"]
