"""Measures a runtime beside the limits of the machine it runs on; ``danaus bench``."""

from .command import main

__all__ = ["main"]
