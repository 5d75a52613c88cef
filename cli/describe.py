"""`minigpt3d describe`: say what each 3D model is, or write a catalog of all."""

import argparse
import sys
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from minigpt3d.arguments import number_between, option
from minigpt3d.catalog.rows import Question, check_questions, json_line, measure
from minigpt3d.sources_minigpt3d import source_name

from .batches import FilesOptions, Progress, file_of, work_on_files
from .console import EXIT_CODES, FAILED, complain
from .inference import InferenceOptions


HELP = "describe files, or all readable files in folders"
DESCRIPTION = (
    "Describe 3D models: answers on standard output, one line each; errors on standard error. With --out, a catalog of them: "
    "answers, kind, sizes, colors and warnings as a table, or as a page with pictures that can be searched."
)
EPILOG = EXIT_CODES


def question(text: str) -> Question:
    """NAME=QUESTION, for argparse."""
    name, equals, words = (part.strip() for part in text.partition("="))
    if not (name and words and name.isprintable()):
        raise argparse.ArgumentTypeError(
            f'must be a name and a question, such as style="What style is it?", got {text!r}'
        )
    return Question(name, words)


@dataclass(kw_only=True)
class Options(FilesOptions, InferenceOptions):
    prompt: str | None = option('the question (default: "What is this?")', default=None)
    json: bool = option("print one JSON object per line: file, prompt, answer, facts and warnings", default=False)
    each_node: bool = option(
        "of scenes, describe every named node by itself (glTF, OBJ, 3MF, USD, and what assimp reads)", default=False
    )
    out: Path | None = option(
        "write a catalog instead, .csv, .jsonl, .parquet or .html; the same command continues a run that was stopped",
        default=None,
        metavar="FILE",
        group="catalog",
    )
    ask: list[Question] = option(
        'a question about every object, and the name of the column for its answers, such as style="What style is it?"; '
        "can be repeated",
        default=[],
        type=question,
        action="append",
        metavar="NAME=QUESTION",
        group="catalog",
    )
    labels: Path | None = option(
        "text file with the kinds to choose from, one on each line (default: the kinds of household objects that the bundled "
        "model knows)",
        default=None,
        metavar="FILE",
        group="catalog",
    )
    min_confidence: float = option(
        "kinds whose likelihood, as a share of all kinds, is smaller are called not sure",
        default=0.5,
        type=number_between(0, 1),
        metavar="SHARE",
        group="catalog",
    )
    thumbnails: Path | None = option(
        "folder for a picture of each object (a page contains them anyway)",
        default=None,
        metavar="DIR",
        group="catalog",
    )

    def check(self):
        """
        Raises:
            ValueError: options that exclude each other, or one that is missing.
            ImportError: a library is missing.
        """
        if self.out is None:
            given = [name for name in ("ask", "labels", "thumbnails") if getattr(self, name)]
            if given:
                raise ValueError(f"`{given[0]}` is for a catalog: give `out`, or leave it out")
            return
        from minigpt3d.catalog.forms import check_out

        if self.json:
            raise ValueError(
                "`json` prints lines and `out` writes a catalog: give one of them (--out FILE.jsonl has both)"
            )
        check_out(self.out, self.paths)
        check_questions(self.ask)
        if self.thumbnails is not None and self.thumbnails.exists() and not self.thumbnails.is_dir():
            raise ValueError(f"`thumbnails` {self.thumbnails} is a file. Give a folder.")


def run(options: Options, argv: list[str]) -> int:
    """Describe every file; returns the exit code."""
    options.check()
    progress = Progress.of(options.paths, own=() if options.out is None else (options.out,))
    if progress.files and options.out is not None:
        from .catalog import write

        write(progress, options)
    elif progress.files:
        print_answers(progress, options)
    if progress.files and (progress.has_folder or options.out is not None):
        complain(progress.summary())
    return FAILED if progress.failed else 0


def print_answers(progress: Progress, options: Options):
    """Print a line for each file that can be described."""
    from tqdm import tqdm

    def prepare(pipeline):
        return lambda clouds: ask(pipeline, clouds, options.prompt, options)

    with_name = options.each_node or len(progress.files) > 1
    with closing(work_on_files(progress, options, prepare, options.each_node)) as batches:
        for result, answer in chain.from_iterable(batches):
            if not isinstance(answer, Exception):
                tqdm.write(to_line(result, answer, options, with_name), file=sys.stdout)
                sys.stdout.flush()


def ask(pipeline, clouds: list, prompt: str | None, options: InferenceOptions) -> list[str]:
    """The answer to a question about each cloud, y up."""
    outputs = pipeline(
        clouds,
        prompt=prompt,
        up_axis="y",
        clean="none",
        batch_size=len(clouds),
        max_new_tokens=options.max_new_tokens,
    )
    return [output["generated_text"] for (output,) in outputs]


def to_line(result, answer: str, options: Options, with_name: bool) -> str:
    """The line that is printed about a file.

    Args:
        result: of `read_clouds`.
    """
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    if options.json:
        prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt
        record = place_of(result.path, options) | {"prompt": prompt, "answer": answer} | facts_of(result)
        return json_line(record | {"warnings": result.warnings})
    return f"{source_name(result.path)}: {answer}" if with_name else answer


def place_of(source, options: Options) -> dict:
    """The file of a source and, if nodes are described, the name of its node, None for a whole file.

    Half a character in a name of a node is escaped, since it is no JSON for strict readers. In a name of a file it stays, so
    that the file can be opened.
    """
    file = {"file": file_of(source)}
    if not options.each_node:
        return file
    is_path = isinstance(source, (str, Path))
    return file | {"node": None if is_path else source.name.encode("utf-8", "backslashreplace").decode("utf-8")}


def facts_of(result) -> dict:
    """What was read of a file, and what is measured."""
    orientation, facts, *_ = result.content
    return facts._asdict() | {"up_axis": orientation.up_axis} | measure(orientation.cloud, facts.has_color)
