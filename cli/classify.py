"""`minigpt3d classify`: choose among labels by the likelihood of answers."""

import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from minigpt3d.arguments import non_empty, option
from minigpt3d.catalog.rows import json_line, safe_cell
from minigpt3d.sources_minigpt3d import source_name

from .batches import FilesOptions, Progress, file_of, work_on_files
from .console import EXIT_CODES, FAILED, complain


HELP = "choose among labels for files, or for all readable files in folders"
DESCRIPTION = (
    "Zero-shot classification: how likely the model is to answer with each label. The probabilities of a file add up to 1, "
    "so a list without the right label may still give one a high probability. Prints the three most likely labels of each file."
)
EPILOG = EXIT_CODES
MOST_PRINTED = 3


@dataclass(kw_only=True)
class Options(FilesOptions):
    labels: Path = option("text file with a label on each line", metavar="FILE")
    phrase: list[str] = option(
        "a form of the answer, with {} for the label; can be repeated, likelihoods are added up (default: sixteen forms, such "
        'as "This is a {}.", that the paper\'s and the bundled model may give)',
        default=[],
        type=non_empty,
        action="append",
        metavar="TEXT",
    )
    prompt: str | None = option('the question (default: "What is this?")', default=None)
    json: bool = option("print one JSON object per line, with the probabilities of all labels", default=False)
    csv: bool = option("print a table with a column for each label", default=False)


def run(options: Options, argv: list[str]) -> int:
    """Classify every file; returns the exit code."""
    from minigpt3d.catalog.labels import read_labels

    if options.json and options.csv:
        raise ValueError("`json` and `csv` are two forms of the output: give one of them")
    names = read_labels(options.labels)
    progress = Progress.of(options.paths, verb="classified")
    if progress.files:
        print_labels(progress, names, options)
        if progress.has_folder:
            complain(progress.summary())
    return FAILED if progress.failed else 0


def print_labels(progress: Progress, names: dict, options: Options):
    """Print a line for each file that can be classified."""
    from minigpt3d.evaluation.likelihood import check_texts
    from minigpt3d.evaluation.suites import OWN

    phrases = options.phrase or OWN.phrases
    check_texts(list(names), phrases)
    out = _Lines()
    if options.csv:
        table = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="")
        table.writerow(map(safe_cell, ["file", "label", "probability", *names]))
    work = work_on_files(progress, options, lambda pipeline: classifier(pipeline, names, phrases, options.prompt))
    with closing(work) as batches:
        for result, ranked in chain.from_iterable(batches):
            if isinstance(ranked, Exception):
                continue
            probabilities = {entry["label"]: round(entry["score"], 6) for entry in ranked}
            label, probability = next(iter(probabilities.items()))
            name = source_name(result.path)
            if options.csv:
                cells = [name, label, probability, *(probabilities[of_label] for of_label in names)]
                table.writerow(map(safe_cell, cells))
            elif options.json:
                record = {"file": file_of(result.path), "label": label, "probability": probability}
                out.write(json_line(record | {"probabilities": probabilities, "warnings": result.warnings}))
            else:
                best = list(probabilities.items())[:MOST_PRINTED]
                text = ", ".join(f"{of_label} {share:.2f}" for of_label, share in best)
                out.write(f"{name}: {text}" if len(progress.files) > 1 else text)


class _Lines:
    """Standard output, a line at a time, clear of a progress bar."""

    def write(self, line: str):
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def classifier(pipeline, names: dict, phrases: Sequence[str], prompt: str | None = None) -> Callable[[list], list]:
    """A function from clouds to the ranked labels of each."""
    from minigpt3d.evaluation.zero_shot import rank_labels

    score = labeler(pipeline, names, phrases, prompt)
    return lambda clouds: [rank_labels(row, list(names)) for row in score(clouds)]


def labeler(pipeline, names: dict, phrases: Sequence[str], prompt: str | None = None) -> Callable[[list], list]:
    """A function from clouds to the log-likelihoods (L,) of the labels of each."""
    import numpy as np

    from minigpt3d.evaluation.zero_shot import ZeroShotPointCloudClassificationPipeline
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    question = DEFAULT_PROMPT if prompt is None else prompt
    scorer = ZeroShotPointCloudClassificationPipeline(model=pipeline.model, processor=pipeline.processor)
    return lambda clouds: list(scorer.log_likelihoods(np.stack(clouds), names, phrases, question))
