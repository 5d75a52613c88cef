"""The catalog of `minigpt3d describe --out`: ask about every object, keep what is finished, write it."""

import base64
import hashlib
import os
import re
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt3d.catalog.forms import write_catalog
from minigpt3d.catalog.journal import Journal, Key
from minigpt3d.catalog.labels import read_labels
from minigpt3d.catalog.rows import NOT_SURE, Question, columns
from minigpt3d.files import write_bytes
from minigpt3d.messages import one_line

from .batches import Progress, file_of, work_on_files
from .classify import classifier
from .console import complain
from .describe import ask, facts_of, place_of


if TYPE_CHECKING:
    from .describe import Options


def write(progress: Progress, options: "Options"):
    """Write the catalog. Files that a stopped run has described, and that have not changed since, are not read again."""
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    questions = options.ask
    if options.prompt is not None or not questions:
        questions = [Question("answer", options.prompt or DEFAULT_PROMPT), *questions]
    names = read_labels(options.labels)
    if options.thumbnails is not None:
        options.thumbnails.mkdir(parents=True, exist_ok=True)
    keys: dict[Any, Key] = {}  # of all objects, in their order
    failed: dict[Any, dict] = {}

    with Journal(options.out, settings_of(options, questions, names)) as journal:
        if len(journal):
            complain(f"{options.out}: continues a run that was stopped, which described {len(journal)}")

        def is_done(source) -> bool:
            keys[source] = key_of(source)
            return keys[source] in journal

        work = work_on_files(
            progress,
            options,
            lambda pipeline: asker(pipeline, questions, names, options),
            options.each_node,
            has_pictures=is_page(options) or options.thumbnails is not None,
            is_done=is_done,
        )
        try:
            with closing(work) as batches:
                for batch in batches:
                    rows = [(result.path, make_row(result, outcome, questions, options)) for result, outcome in batch]
                    failed |= {source: row for source, row in rows if row["error"] is not None}
                    journal.add((keys[source], row) for source, row in rows if row["error"] is None)
        except KeyboardInterrupt:
            complain(f"{options.out}: stopped; the same command continues")
            raise
        rows = (
            failed.get(source) or with_kind(journal[key], options.min_confidence)
            for source, key in keys.items()
            if source in failed or key in journal
        )
        write_catalog(options.out, rows, columns(questions, options.each_node), options.out.stem)
        journal.remove()


def key_of(source) -> Key:
    """What a finished object is found by."""
    return Key.of(source, None if isinstance(source, (str, Path)) else source.number)


def settings_of(options: "Options", questions: list[Question], names: dict) -> dict[str, Any]:
    """What the rows depend on."""
    from minigpt3d.hub import default_model, fingerprint_model

    return {
        "version": version("minigpt3d"),
        "model": fingerprint_model(options.model or default_model()),
        "questions": dict(questions),
        "labels": {label: list(of_label) for label, of_label in names.items()},
        "max_new_tokens": options.max_new_tokens,
        "reading": options.reading,
        "each_node": options.each_node,
        "pictures": is_page(options),
        "thumbnails": None if options.thumbnails is None else os.fspath(options.thumbnails),
    }


def is_page(options: "Options") -> bool:
    """Whether pictures are part of the catalog."""
    return options.out.suffix.lower() == ".html"


def asker(pipeline, questions: list[Question], names: dict, options: "Options"):
    """A function from clouds to (answers by the name of their question, the most likely kind)."""
    from minigpt3d.evaluation.suites import OWN

    classify = classifier(pipeline, names, OWN.phrases)

    def work(clouds: list) -> list[tuple[dict, dict]]:
        answers = {question.name: ask(pipeline, clouds, question.text, options) for question in questions}
        by_name = [{name: texts[index] for name, texts in answers.items()} for index in range(len(clouds))]
        return [(texts, kinds[0]) for texts, kinds in zip(by_name, classify(clouds), strict=True)]

    return work


def make_row(result, outcome, questions: list[Question], options: "Options") -> dict[str, Any]:
    """A row about a file, with every column.

    Args:
        result: of `read_clouds`.
        outcome: of `asker`'s function, or why there is none.
    """
    is_failed = isinstance(outcome, Exception)
    answers, kind = ({}, {}) if is_failed else outcome
    facts = {} if result.error is not None else facts_of(result)
    thumbnail = drawn = None
    if result.error is None:
        drawn = result.content[2:] and result.content[2].get(result.content[0].up_axis)
    if drawn and options.thumbnails is not None:
        thumbnail = options.thumbnails / thumbnail_name(result.path)
        write_bytes(thumbnail, drawn)
    row = place_of(result.path, options) | {question.name: answers.get(question.name) for question in questions}
    row |= {"kind": kind.get("label"), "confidence": kind.get("score")}
    for name in ("num_points", "num_faces", "has_color", "up_axis", "sides", "colors"):
        row[name] = facts.get(name)
    row |= {"warnings": list(result.warnings), "thumbnail": None if thumbnail is None else str(thumbnail)}
    row |= {"error": one_line(outcome) if is_failed else None}
    return row | {"picture": base64.b64encode(drawn).decode()} if drawn and is_page(options) else row


def thumbnail_name(source) -> str:
    """A name for the picture of an object, different for every one and harmless everywhere."""
    key = key_of(source)
    name = Path(file_of(source)).name if key.node is None else source.name
    stem = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:80]
    return f"{stem}-{hashlib.sha256(os.fsencode(f'{key.file} {key.node}')).hexdigest()[:8]}.png"


def with_kind(row: dict[str, Any], min_confidence: float) -> dict[str, Any]:
    """A row whose kind is not sure if its likelihood is too small."""
    confidence = round(row["confidence"], 4)
    return row | {"kind": row["kind"] if confidence >= min_confidence else NOT_SURE, "confidence": confidence}
