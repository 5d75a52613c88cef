"""`minigpt3d describe`: say what each 3D model is."""

import json
import sys
from dataclasses import dataclass

from minigpt3d.arguments import option
from minigpt3d.sources_minigpt3d import source_name

from .batches import BatchOptions, find_files, run_batches
from .inference import InferenceOptions


HELP = "describe files, or all readable files in folders"
DESCRIPTION = "Describe 3D models: answers on standard output, one line each; errors on standard error."
EPILOG = "Exit code: 0, 1 if a file failed, 2 for a wrong command line."

# Colors of a smaller share are not listed.
LEAST_SHARE = 0.01


@dataclass(kw_only=True)
class Options(InferenceOptions, BatchOptions):
    prompt: str | None = option('the question (default: "What is this?")', default=None)
    json: bool = option("print one JSON object per line: file, prompt, answer, facts and warnings", default=False)


def run(options: Options, argv: list[str]) -> int:
    """Print a line for each file; returns the exit code."""
    from tqdm import tqdm

    progress = find_files(options.paths)

    def ask(pipeline, clouds: list) -> list[str]:
        outputs = pipeline(
            clouds,
            prompt=options.prompt,
            up_axis="y",
            clean="none",
            batch_size=len(clouds),
            max_new_tokens=options.max_new_tokens,
        )
        return [output["generated_text"] for (output,) in outputs]

    def show(result, answer: str):
        tqdm.write(to_line(result, answer, options, with_name=len(progress.files) > 1), file=sys.stdout)
        sys.stdout.flush()

    return run_batches(progress, options, ask, show, product="answer", done="described")


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
