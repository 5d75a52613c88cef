"""The model card: one template, filled from what lies beside the weights, with a source for every number."""

from .card import SOURCES_FILE, CardError, Given, read_given, write_card


__all__ = ["SOURCES_FILE", "CardError", "Given", "read_given", "write_card"]
