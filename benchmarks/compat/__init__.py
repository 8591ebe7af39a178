"""Comparisons with the public code bases, each from the user's own clone."""
