"""The catalog of `minigpt3d describe --out`: ask about every object, keep what is finished, write it."""

import base64
import hashlib
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt3d.catalog.journal import Journal, Key
from minigpt3d.catalog.labels import read_labels
from minigpt3d.catalog.rows import NOT_SURE, Question, columns
from minigpt3d.catalog.write import write_catalog
from minigpt3d.files import write_bytes

from .console import complain
from .describe import ask, facts_of
from .progress import Progress, work_on_files


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
    files = progress.files
    with Journal(options.out, settings_of(options, questions, names)) as journal:
        keys = {path: Key.of(path) for path in files}
        kept = {path for path, key in keys.items() if key in journal}
        if kept:
            complain(f"{options.out}: {len(kept)} of {len(files)} objects were described by a run that was stopped")
            progress.done += len(kept)
        progress.files = [path for path in files if path not in kept]
        failed: dict[Path | str, dict] = {}
        try:
            for batch in work_on_files(progress, options, lambda pipeline: asker(pipeline, questions, names, options)):
                finished = []
                for result, outcome in batch:
                    row = make_row(result, outcome, questions, options)
                    if isinstance(outcome, Exception):
                        failed[result.path] = row
                    else:
                        finished.append((keys[result.path], row))
                journal.add(finished)
        except KeyboardInterrupt:
            complain(f"{options.out}: stopped; the same command continues")
            raise
        rows = (
            failed.get(path) or with_kind(journal[keys[path]], options.min_confidence)
            for path in files
            if path in failed or keys[path] in journal
        )
        write_catalog(options.out, rows, columns(questions, has_nodes=False), options.out.stem)
        journal.remove()


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
        "pictures": has_pictures(options),
        "thumbnails": None if options.thumbnails is None else os.fspath(options.thumbnails),
    }


def has_pictures(options: "Options") -> bool:
    return options.out.suffix.lower() == ".html"


def asker(pipeline, questions: list[Question], names: dict, options: "Options"):
    """A function from clouds to (answers by the name of their question, the most likely kind)."""
    import numpy as np

    from minigpt3d.evaluation.suites import OWN
    from minigpt3d.evaluation.zero_shot import ZeroShotPointCloudClassificationPipeline, rank_labels
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    classifier = ZeroShotPointCloudClassificationPipeline(model=pipeline.model, processor=pipeline.processor)

    def work(clouds: list) -> list[tuple[dict, dict]]:
        answers = {question.name: ask(pipeline, clouds, question.text, options) for question in questions}
        scores = classifier.log_likelihoods(np.stack(clouds), names, OWN.phrases, DEFAULT_PROMPT)
        kinds = [rank_labels(row, list(names))[0] for row in scores]
        by_name = [{name: texts[index] for name, texts in answers.items()} for index in range(len(clouds))]
        return list(zip(by_name, kinds, strict=True))

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
    thumbnail = picture = None
    if result.error is None and (has_pictures(options) or options.thumbnails is not None):
        from minigpt3d.evaluation.thumbnails import draw_thumbnail

        drawn = draw_thumbnail(result.content[0].cloud, result.content[1].has_color)
        picture = base64.b64encode(drawn).decode() if has_pictures(options) else None
        if options.thumbnails is not None:
            thumbnail = options.thumbnails / thumbnail_name(result.path)
            write_bytes(thumbnail, drawn)
    row = {"file": str(result.path)} | {question.name: answers.get(question.name) for question in questions}
    row |= {"kind": kind.get("label"), "confidence": kind.get("score")}
    for name in ("num_points", "num_faces", "has_color", "up_axis", "sides", "colors"):
        row[name] = facts.get(name)
    row |= {"warnings": list(result.warnings), "thumbnail": None if thumbnail is None else str(thumbnail)}
    row |= {"error": str(outcome) if is_failed else None}
    return row if picture is None else row | {"picture": picture}


def thumbnail_name(path: Path | str) -> str:
    """A name for the picture of a file, different for every path and harmless everywhere."""
    stem = re.sub(r"[^\w.-]", "_", str(path).rpartition("/")[2], flags=re.ASCII)[:80]
    return f"{stem}-{hashlib.sha256(os.fsencode(str(path))).hexdigest()[:8]}.png"


def with_kind(row: dict[str, Any], min_confidence: float) -> dict[str, Any]:
    """A row whose kind is not sure if its likelihood is too small."""
    confidence = round(row["confidence"], 4)
    return row | {"kind": row["kind"] if confidence >= min_confidence else NOT_SURE, "confidence": confidence}
