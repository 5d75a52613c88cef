"""`minigpt3d describe`: say what each 3D model is."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option
from minigpt3d.messages import one_line

from .console import FAILED, CommandError, complain, printable
from .inference import CleaningOptions, ModelOptions, load_pipeline, read_cloud


HELP = "describe files, or all readable files in folders"
DESCRIPTION = "Describe 3D models: answers on standard output, one line each; errors on standard error."
EPILOG = "Exit code: 0, 1 if a file failed, 2 for a wrong command line."


@dataclass(kw_only=True)
class Options(CleaningOptions, ModelOptions):
    paths: list[Path] = option("point cloud, mesh, or a folder", positional=True, metavar="FILE_OR_FOLDER")
    prompt: str | None = option('the question (default: "What is this?")', default=None)
    json: bool = option("print one JSON object per line: file, prompt, answer", default=False)


def run(options: Options, argv: list[str]) -> int:
    """Describe every file; returns the exit code."""
    from tqdm import tqdm

    exit_code, files = 0, []
    for path in options.paths:
        try:
            files += find_files(path)
        except CommandError as error:
            complain(str(error))
            exit_code = FAILED
    if not files:
        return exit_code
    pipeline = load_pipeline(options)
    # Without a terminal (disable=None) nobody watches the bar, and a log keeps to its lines.
    for path in tqdm(files, unit="file", file=sys.stderr, disable=None if len(files) > 1 else True):
        try:
            line = describe_file(pipeline, path, options, with_name=len(files) > 1)
        except CommandError as error:
            complain(str(error))
            exit_code = FAILED
            continue
        tqdm.write(printable(line), file=sys.stdout)
        sys.stdout.flush()
    return exit_code


def describe_file(pipeline, path: Path, options: Options, with_name: bool) -> str:
    """The line that is printed about a file.

    Raises:
        CommandError: the file cannot be read, or the model fails on it.
    """
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt
    cloud = read_cloud(pipeline, path, options)
    try:
        (output,) = pipeline(cloud, prompt=prompt, up_axis="y", clean="none", max_new_tokens=options.max_new_tokens)
    except Exception as error:  # out of memory, for example: the next cloud may still fit
        raise CommandError(f"{path}: no answer: {one_line(error)}") from error
    answer = output["generated_text"]
    if options.json:
        return json.dumps({"file": str(path), "prompt": prompt, "answer": answer}, ensure_ascii=False)
    return f"{path}: {answer}" if with_name else answer


def find_files(path: Path) -> list[Path]:
    """The file itself, or all readable files in a folder and its subfolders, sorted.

    Raises:
        CommandError: there are none in the folder.
    """
    if not path.is_dir():
        return [path]
    from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES

    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READABLE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise CommandError(f"{path}: no point cloud or mesh in this folder; expected {' '.join(READABLE_SUFFIXES)}")
    return files
