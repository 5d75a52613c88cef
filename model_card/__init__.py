"""The model card: JSON in, README.md out, with a source for every number."""

from .card import SOURCES_FILE, write_card
from .emissions import Given, read_given
from .evaluations import CardError


__all__ = ["SOURCES_FILE", "CardError", "Given", "read_given", "write_card"]
