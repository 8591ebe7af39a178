"""Latent Personality Alignment: data, trainer, evaluation and command line."""
