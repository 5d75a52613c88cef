"""`minigpt3d describe`: say what each 3D model is."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from minigpt3d.arguments import option, path_or_url, positive_int
from minigpt3d.messages import one_line
from minigpt3d.readers_minigpt3d import NotACloudError, printable
from minigpt3d.sources_minigpt3d import source_name

from .console import FAILED, complain
from .inference import InferenceOptions, load_pipeline, read_clouds


HELP = "describe files, or all readable files in folders"
DESCRIPTION = "Describe 3D models: answers on standard output, one line each; errors on standard error."
EPILOG = "Exit code: 0, 1 if a file failed, 2 for a wrong command line."

# Files that belong to meshes; in a folder they are not called skipped.
PARTS = ".mtl .bin .png .jpg .jpeg .tga .bmp .gif .tif .tiff .webp .dds .ktx2".split()
# Colors of a smaller share are not listed.
LEAST_SHARE = 0.01
CPU_BATCH, ACCELERATOR_BATCH = 16, 64


@dataclass(kw_only=True)
class Options(InferenceOptions):
    paths: list[Path | str] = option(
        "point cloud, mesh, a folder, or an https:// URL", positional=True, type=path_or_url, metavar="FILE_OR_FOLDER"
    )
    prompt: str | None = option('the question (default: "What is this?")', default=None)
    batch_size: int | None = option(
        "files that the model answers at once (default: 16 on a CPU, 64 on an accelerator)",
        default=None,
        type=positive_int,
        metavar="N",
    )
    json: bool = option("print one JSON object per line: file, prompt, answer, facts and warnings", default=False)


@dataclass
class Progress:
    """What became of the files."""

    files: list[Path | str] = field(default_factory=list)
    in_folders: set[Path] = field(default_factory=set)
    has_folder: bool = False
    described: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # by type

    def add(self, path: Path | str):
        """Add a file, a URL, or all readable files in a folder and its subfolders, sorted.

        Raises:
            ValueError: there are none in the folder.
        """
        if isinstance(path, str) or not path.is_dir():
            self.files.append(path)
            return
        from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES, is_readable

        self.has_folder = True
        visible = [file for file in sorted(path.rglob("*")) if not file.name.startswith(".") and not file.is_dir()]
        special = sum(not file.is_file() for file in visible)
        visible = [file for file in visible if file.is_file()]
        readable = [file for file in visible if is_readable(file)]
        others = Counter(file.suffix.lower() for file in visible if not is_readable(file))
        if special:
            others["pipes and broken links"] = special
        self.skipped += others
        if not readable:
            content = f" but {by_type(others)}" if others else ""
            raise ValueError(
                f"{path}: no point cloud or mesh in this folder{content}; expected {' '.join(READABLE_SUFFIXES)}"
            )
        self.files += readable
        self.in_folders.update(readable)

    def fail(self, message: str):
        self.failed += 1
        complain(message)

    def summary(self) -> str:
        """3 described, 1 failed, 40 skipped: 21 .dae, 19 .fbx"""
        skipped = Counter({suffix: count for suffix, count in self.skipped.items() if suffix not in PARTS})
        end = f", {skipped.total()} skipped: {by_type(skipped)}" if skipped else ""
        return f"{self.described} described, {self.failed} failed{end}"


def by_type(counts: Counter) -> str:
    """The most frequent type first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {printable(suffix) or 'without extension'}" for suffix, count in ordered)


def run(options: Options, argv: list[str]) -> int:
    """Describe every file; returns the exit code."""
    progress = Progress()
    for path in options.paths:
        try:
            progress.add(path)
        except ValueError as error:
            progress.fail(str(error))
    progress.in_folders.difference_update(options.paths)
    if progress.files:
        describe_files(progress, options)
        if progress.has_folder:
            complain(progress.summary())
    return FAILED if progress.failed else 0


def describe_files(progress: Progress, options: Options):
    """Print a line for each file; the next ones are read while the model answers about a batch of them."""
    from tqdm import tqdm

    from minigpt3d.data.reading import FileReader
    from minigpt3d.point_cloud_minigpt3d import load_orientations

    files = progress.files
    with FileReader(load_orientations, limits=options.limits) as reader:  # it starts while the model loads
        pipeline = load_pipeline(options)
        # Without a terminal (disable=None) nobody watches the bar, and a log keeps to its lines.
        bar = tqdm(total=len(files), unit="file", file=sys.stderr, disable=None if len(files) > 1 else True)
        size = options.batch_size or (CPU_BATCH if pipeline.device.type == "cpu" else ACCELERATOR_BATCH)
        results = read_clouds(reader, pipeline, files, options, ahead=size)
        with bar:
            while batch := list(islice(results, size)):
                clouds = [result.content[0].cloud for result in batch if result.error is None]
                answers = iter(ask(pipeline, clouds, options))
                for result in batch:
                    bar.update()
                    answer = next(answers) if result.error is None else result.error
                    if isinstance(answer, NotACloudError) and result.path in progress.in_folders:
                        progress.skipped[result.path.suffix.lower()] += 1
                    elif isinstance(answer, Exception):
                        unread = result.error is not None
                        name = source_name(result.path)
                        progress.fail(str(answer) if unread else f"{name}: no answer: {one_line(answer)}")
                    else:
                        progress.described += 1
                        tqdm.write(to_line(result, answer, options, with_name=len(files) > 1), file=sys.stdout)
                        sys.stdout.flush()


def ask(pipeline, clouds: list, options: Options) -> list[str | Exception]:
    """For each cloud the answer, or why there is none."""
    try:
        outputs = pipeline(
            clouds,
            prompt=options.prompt,
            up_axis="y",
            clean="none",
            batch_size=len(clouds),
            max_new_tokens=options.max_new_tokens,
        )
    except Exception as error:
        if len(clouds) == 1:
            return [error]
        # Out of memory, for example: a cloud alone may fit.
        return [answer for cloud in clouds for answer in ask(pipeline, [cloud], options)]
    return [output["generated_text"] for (output,) in outputs]


def to_line(result, answer: str, options: Options, with_name: bool) -> str:
    """The line that is printed about a file.

    Args:
        result: of `read_clouds`.
    """
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    if options.json:
        orientation, facts = result.content
        prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt
        record = {"file": str(result.path), "prompt": prompt, "answer": answer} | facts._asdict()
        record["up_axis"] = orientation.up_axis
        return json_line(record | measure(orientation.cloud, facts.has_color) | {"warnings": result.warnings})
    return f"{source_name(result.path)}: {answer}" if with_name else answer


def measure(cloud, has_color: bool) -> dict:
    """Sides of the bounding box relative to the longest, y up, and the shares of the main colors, for (P, 6)."""
    from minigpt3d.evaluation.vocabulary.colors import COLORS, color_shares

    sides = cloud[:, :3].max(0) - cloud[:, :3].min(0)
    sides = {axis: round(float(side), 3) for axis, side in zip("xyz", sides / sides.max(), strict=True)}
    shares = sorted(zip(color_shares(cloud[:, 3:]), COLORS, strict=True), reverse=True) if has_color else ()
    return {"sides": sides, "colors": {name: round(float(share), 3) for share, name in shares if share >= LEAST_SHARE}}


def json_line(record: dict) -> str:
    """JSON in which letters of all languages are readable and control characters are escaped."""
    text = json.dumps(record, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
