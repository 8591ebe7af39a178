"""Drop-in replacements, one file a foreign code base."""
