"""`minigpt3d chat`: ask several questions about one file."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option
from minigpt3d.messages import one_line

from .console import FAILED, CommandError, complain
from .inference import CleaningOptions, ModelOptions, load_pipeline, read_cloud


HELP = "ask several questions about one file"
DESCRIPTION = (
    "Talk about a 3D model. Questions are read line by line; blank lines are skipped; /quit or the end of input stops."
)

Turn = tuple[str, str]  # question, answer


@dataclass(kw_only=True)
class Options(CleaningOptions, ModelOptions):
    path: Path = option("point cloud or mesh", positional=True, metavar="FILE")


def run(options: Options, argv: list[str]) -> int:
    """Answer questions from standard input; returns the exit code."""
    if not options.path.is_file():
        problem = "this is a folder; pass one of the files in it" if options.path.is_dir() else "no such file"
        raise CommandError(f"{options.path}: {problem}")
    pipeline = load_pipeline(options)
    cloud = {"type": "point_cloud", "point_cloud": read_cloud(pipeline, options.path, options)}
    exit_code, turns = 0, []
    for question in read_questions():
        try:
            turns = ask(pipeline, cloud, turns, question, options.max_new_tokens)
        except CommandError as error:  # the question is dropped, the conversation continues
            complain(str(error))
            exit_code = FAILED
    return exit_code


def ask(pipeline, cloud: dict, turns: list[Turn], question: str, max_new_tokens: int) -> list[Turn]:
    """Print the answer to a question; returns the conversation with it, without its beginning if it was too long.

    Raises:
        CommandError: there is no answer.
    """
    from minigpt3d.pipeline_minigpt3d import AnswerStreamer

    kept = turns
    while True:
        streamer = AnswerStreamer(pipeline.processor.tokenizer)
        messages = to_messages(cloud, kept, question)
        try:
            (output,) = pipeline(messages, up_axis="y", clean="none", max_new_tokens=max_new_tokens, streamer=streamer)
        except BrokenPipeError:
            raise
        except Exception as error:
            if not (kept and "the context has" in str(error)):
                raise CommandError(f"no answer: {one_line(error)}") from error
            kept = kept[len(kept) // 2 + 1 :]
            continue
        if len(kept) < len(turns):
            complain("the conversation is longer than the model's context: its beginning is left out")
        return [*kept, (question, output["generated_text"])]


def to_messages(cloud: dict, turns: list[Turn], question: str) -> list[dict]:
    """A chat whose first question has the cloud and whose last question has no answer yet."""
    texts = [text for turn in turns for text in turn] + [question]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)
    ]
    messages[0]["content"].insert(0, cloud)
    return messages


def read_questions() -> Iterator[str]:
    """Lines of standard input until its end or /quit; the prompt sign is shown on a terminal only."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(sign).strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if not question.isascii() and any("\ud800" <= letter <= "\udfff" for letter in question):
            complain("a question that is not UTF-8 was skipped")
        elif question:
            yield question
