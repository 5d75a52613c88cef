"""Metrics of answers: functions of (predictions, references, keywords) that return a dict with a value per object.

`METRICS` in table.py has a row for each score that an evaluation can report.

The folders in `spaces/` offer the same functions to `evaluate.load`.
"""

from .closed_set import closed_set_accuracy
from .judged import caption_judge_score, hallucination, open_vocabulary_accuracy
from .overlap import caption_overlap
from .prompts import PROMPTS
from .similarity import sentence_similarity


__all__ = [
    "PROMPTS",
    "caption_judge_score",
    "caption_overlap",
    "closed_set_accuracy",
    "hallucination",
    "open_vocabulary_accuracy",
    "sentence_similarity",
]
