"""Conversations about objects, in the schema of the PointLLM release: read and check them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minigpt3d.files import read_json
from minigpt3d.messages import one_line


POINT_PLACEHOLDER = "<point>"
# Two clouds of the release with broken colors; the authors leave them out too.
CORRUPT_OBJECT_IDS = {"6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"}
# The release's `conversation_type` → our name of the source. A record without a type is a brief description.
SOURCES = {
    "simple_description": "brief",
    "detailed_description": "detailed",
    "single_round": "single_round",
    "multi_round": "multi_round",
}


@dataclass(frozen=True)
class Sample:
    """One conversation about an object: `rounds` holds (question, answer) pairs; `place` is where it was read."""

    object_id: str
    rounds: tuple[tuple[str, str], ...]
    place: str = field(default="", compare=False)


def read_annotations(paths: Iterable[str | Path]) -> dict[str, list[Sample]]:
    """Samples by source. Raises as `read_records`."""
    samples: dict[str, list[Sample]] = {source: [] for source in SOURCES.values()}
    for source, sample, _ in read_records(paths):
        samples[source].append(sample)
    return samples


def read_records(
    paths: Iterable[str | Path], skip: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Sample, dict]]:
    """Source, sample and record, from JSON lists of `{object_id, conversation_type, conversations: [{from, value}, …]}`.

    The two corrupt objects are left out.

    Args:
        skip: gets the message about each record out of schema; without it, the first one is raised.

    Raises:
        ValueError: a file that is no JSON list, or a record out of schema; the message names its `object_id`.
    """
    for path in paths:
        lines: list[int] = []
        for index, record in enumerate(read_json(path, list, advice="`annotations` are PointLLM's JSON lists.")):
            try:
                source, sample = to_sample(record, f"{path}, record {index}")
            except ValueError:
                lines = lines or _lines_of_records(path)
                with skipping(skip):  # again, for a message with the line
                    to_sample(record, f"{path}, line {lines[index]}, record {index}")
                continue
            if sample.object_id not in CORRUPT_OBJECT_IDS:
                yield source, sample, record


@contextmanager
def skipping(skip: Callable[[str], None] | None) -> Iterator[None]:
    """Pass the message of a ValueError to `skip`, if there is one."""
    try:
        yield
    except ValueError as error:
        if skip is None:
            raise
        skip(one_line(error))


def _lines_of_records(path: str | Path) -> list[int]:
    """The lines in which the records of a JSON list begin."""
    text = Path(path).read_text("utf-8", "surrogatepass")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[]*")
    lines, line, counted, position = [], 1, 0, between.match(text).end()
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        lines.append(line)
        position = between.match(text, decoder.raw_decode(text, position)[1]).end()
    return lines


def to_sample(record, where: str) -> tuple[str, Sample]:
    """Check one record, and return its source and its conversation.

    Raises:
        ValueError: it is out of schema; the message begins with its `object_id` and `where`.
    """
    # Not at the top: it imports transformers, which the rest of this module does not need.
    from minigpt3d.processing_minigpt3d import clean_question

    if not isinstance(record, dict) or not isinstance(record.get("object_id"), str):
        raise ValueError(f"{where}: expected an object with a string 'object_id', got {str(record)[:80]!r}.")
    object_id, place = record["object_id"], where
    where = f"object_id {object_id!r} ({where})"
    conversation_type = record.get("conversation_type", "simple_description")
    if conversation_type not in SOURCES:
        raise ValueError(f"{where}: conversation_type must be one of {', '.join(SOURCES)}, got {conversation_type!r}.")
    source, texts = SOURCES[conversation_type], _check_turns(record.get("conversations"), where)
    for text in (object_id, *texts):
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"{where}: half of a character, a lone surrogate {half[0]!a}, in {text!a:.80}. Write it again."
            )
    questions = [text.replace(POINT_PLACEHOLDER, "").strip() for text in texts[::2]]
    if source != "multi_round":  # the authors clean the questions of single rounds, and no answers
        questions = [clean_question(question) for question in questions]
    return source, Sample(object_id, tuple(zip(questions, texts[1::2], strict=True)), place)


def _check_turns(turns, where: str) -> list[str]:
    """The texts of a conversation, question and answer in turn.

    `<point>` is the place of the cloud in the first question, and plain text in an answer.
    """
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(f"{where}: 'conversations' must be a list of question and answer in turn, got {turns!r:.80}.")
    for turn, speaker in zip(turns, ("human", "gpt") * (len(turns) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: expected {{'from': '{speaker}', 'value': text}}, got {turn!r:.80}.")
    texts = [turn["value"] for turn in turns]
    if texts[0].count(POINT_PLACEHOLDER) != 1 or any(POINT_PLACEHOLDER in text for text in texts[2::2]):
        raise ValueError(
            f"{where}: '{POINT_PLACEHOLDER}' must stand once, in the first question, and in no other; got {texts!r:.120}."
        )
    return texts


def to_messages(sample: Sample) -> list[dict]:
    """The sample as chat messages, the cloud in the first question."""
    messages = []
    for question, answer in sample.rounds:
        point_cloud = [] if messages else [{"type": "point_cloud"}]
        messages.append({"role": "user", "content": [*point_cloud, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
