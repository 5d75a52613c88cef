"""Metrics that a judge decides: open-vocabulary accuracy, caption score, hallucination. Paper: §4."""

import re
from collections.abc import Callable, Sequence

from .checks import check_pairs
from .prompts import PROMPTS, ask_judge


KIND_VERDICT = re.compile(r"\s*([TF])\s*(?:#|\Z)", re.IGNORECASE)  # T#reason
SCORE_VERDICT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*(?:#|\Z)")  # 85#reason
DETAILS_VERDICT = re.compile(r"\s*([0-9]{1,2})\s*#\s*([0-9]{1,2})\s*(?:#|\Z)")  # 2#1#reason


def open_vocabulary_accuracy(
    predictions: Sequence[str], references: Sequence[str], *, judge: Callable, prompt: str | None = None
) -> dict:
    """Share of answers that name the same kind of object as their reference; a judge decides.

    Args:
        predictions: the answers, one text per object.
        references: what the objects are, one text per object.
        judge: takes a list of prompts, returns one reply per prompt: a text, or None if there is no reply.
        prompt: replaces the default prompt; a text with {answer} and {reference}.

    Returns:
        accuracy: between 0 and 1.
        unparsed: number of replies that do not begin with a verdict; they count as wrong.
        values: 1.0 or 0.0 per object.
        replies: the judge's reply per object.
    """
    replies = _ask("open_vocabulary_accuracy", predictions, references, judge, prompt)
    verdicts = [KIND_VERDICT.match(reply or "") for reply in replies]
    values = [float(verdict is not None and verdict[1] in "Tt") for verdict in verdicts]
    return {
        "accuracy": sum(values) / len(values),
        "unparsed": verdicts.count(None),
        "values": values,
        "replies": replies,
    }


def caption_judge_score(
    predictions: Sequence[str], references: Sequence[str], *, judge: Callable, prompt: str | None = None
) -> dict:
    """How much of each reference is also in its description, from 0 to 100; a judge decides.

    Args:
        predictions: the descriptions, one text per object.
        references: what a good description says, one text per object.
        judge: takes a list of prompts, returns one reply per prompt: a text, or None if there is no reply.
        prompt: replaces the default prompt; a text with {answer} and {reference}.

    Returns:
        score: the mean, between 0 and 100.
        unparsed: number of replies that do not begin with a score from 0 to 100; they count as 0.
        values: the score per object.
        replies: the judge's reply per object.
    """
    replies = _ask("caption_score", predictions, references, judge, prompt)
    verdicts = [SCORE_VERDICT.match(reply or "") for reply in replies]
    scores = [float(verdict[1]) if verdict and float(verdict[1]) <= 100 else None for verdict in verdicts]
    values = [score or 0.0 for score in scores]
    return {"score": sum(values) / len(values), "unparsed": scores.count(None), "values": values, "replies": replies}


def hallucination(
    predictions: Sequence[str], references: Sequence[str], *, judge: Callable, prompt: str | None = None
) -> dict:
    """Right and wrong details in each description, as a judge counts them.

    Args:
        predictions: the descriptions, one text per object.
        references: what is true of the objects, one text per object.
        judge: takes a list of prompts, returns one reply per prompt: a text, or None if there is no reply.
        prompt: replaces the default prompt; a text with {answer} and {reference}.

    Returns:
        correctness: mean number of right details per description.
        hallucination: mean number of wrong details per description.
        precision: right details divided by all counted details, over all objects, between 0 and 1; 0 if none were counted.
        unparsed: number of replies that do not begin with two numbers; they count as no right and one wrong detail.
        values: {"correct": right details per object, "wrong": wrong details per object}.
        replies: the judge's reply per object.
    """
    replies = _ask("hallucination", predictions, references, judge, prompt)
    verdicts = [DETAILS_VERDICT.match(reply or "") for reply in replies]
    correct = [int(verdict[1]) if verdict else 0 for verdict in verdicts]
    wrong = [int(verdict[2]) if verdict else 1 for verdict in verdicts]
    return {
        "correctness": sum(correct) / len(replies),
        "hallucination": sum(wrong) / len(replies),
        "precision": sum(correct) / max(1, sum(correct) + sum(wrong)),
        "unparsed": verdicts.count(None),
        "values": {"correct": correct, "wrong": wrong},
        "replies": replies,
    }


def _ask(name, predictions, references, judge, prompt) -> list[str | None]:
    check_pairs(predictions, references)
    rows = [{"answer": answer, "reference": text} for answer, text in zip(predictions, references, strict=True)]
    return ask_judge(judge, PROMPTS[name] if prompt is None else prompt, rows)
