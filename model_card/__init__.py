"""The model card: a template, and what fills it from provenance, training history and evaluation results."""
