"""The model card: JSON in, README.md out, with a source for every number."""
