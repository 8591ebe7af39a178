"""A LAT code base written for these tests, built and called as the public ones: wrapped submodules, eager loop."""

from .trainer import *  # noqa: F403
from .wrappers import GDAdversary as GDAdversary
from .wrappers import clear_hooks as clear_hooks
