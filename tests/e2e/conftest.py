"""Fixtures of the training tests."""

from training_runs import base, launched, release  # noqa: F401
