"""Evaluation: answers of a model on a suite of objects, their scores with intervals and controls, reports."""
