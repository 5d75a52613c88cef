"""`minigpt3d search`: the files that fit a description best, by its likelihood as the answer."""

import re
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from minigpt3d.arguments import non_empty, option, positive_int
from minigpt3d.catalog.rows import json_line
from minigpt3d.sources_minigpt3d import source_name

from .batches import FilesOptions, Progress, file_of, work_on_files
from .classify import labeler
from .console import EXIT_CODES, FAILED, complain


HELP = "find the files that fit a description best"
DESCRIPTION = (
    'Rank files by how likely the model is to answer with a description, such as "a red chair with arms". The score is the '
    "file's share of all likelihoods: the probability that the description is of this file, if it is of one of them."
)
EPILOG = EXIT_CODES


@dataclass(kw_only=True)
class TextOptions:
    text: str = option(
        'a description, such as "a red chair with arms"', positional=True, type=non_empty, metavar="TEXT"
    )


@dataclass(kw_only=True)
class Options(FilesOptions, TextOptions):  # the last class has the first argument
    top: int = option("how many files are printed", default=10, type=positive_int, metavar="N")
    json: bool = option("print one JSON object per line: file and score", default=False)


def run(options: Options, argv: list[str]) -> int:
    """Rank the files; returns the exit code."""
    from minigpt3d.evaluation.likelihood import check_texts
    from minigpt3d.evaluation.suites import OWN

    # The forms begin with "a", or with a color, which gives nouns alone their likelihood.
    name = re.sub(r"^(an?|the)\s+", "", options.text.strip().rstrip("."), flags=re.IGNORECASE) or options.text
    check_texts([name], OWN.phrases)
    progress = Progress.of(options.paths, verb="searched")
    found = []
    if progress.files:

        def prepare(pipeline):
            return labeler(pipeline, {name: (name,)}, OWN.phrases)

        with closing(work_on_files(progress, options, prepare)) as batches:
            for result, scores in chain.from_iterable(batches):
                if not isinstance(scores, Exception):
                    found.append((result.path, scores[0]))
    if found:
        print_best(found, options)
    if progress.files and progress.has_folder:
        complain(progress.summary())
    return FAILED if progress.failed else 0


def print_best(found: list[tuple], options: Options):
    """Print the most likely files, (source, log-likelihood)."""
    import numpy as np

    scores = np.array([score for _, score in found])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    for index in np.argsort(-shares, kind="stable")[: options.top]:
        source, share = found[index][0], float(shares[index])
        print(
            json_line({"file": file_of(source), "score": round(share, 6)})
            if options.json
            else f"{share:.2f} {source_name(source)}"
        )
