"""`minigpt3d chat`: ask several questions about one file."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option, path_or_url
from minigpt3d.messages import one_line

from .console import FAILED, complain
from .inference import InferenceOptions, read_file, read_points


HELP = "ask several questions about one file"
COMMANDS = {
    "/help": "list these commands",
    "/reset": "forget the conversation",
    "/file FILE": "go on with another file",
    "/quit": "stop, as the end of input does",
}
DESCRIPTION = (
    "Talk about a 3D model. Questions are read line by line; blank lines are skipped. "
    + "; ".join(f"{command}: {what}" for command, what in COMMANDS.items())
    + "."
)


@dataclass(kw_only=True)
class Options(InferenceOptions):
    path: Path | str = option(
        "point cloud or mesh, or an https:// URL", positional=True, type=path_or_url, metavar="FILE"
    )


def run(options: Options, argv: list[str]) -> int:
    """Answer questions from standard input; returns the exit code."""
    pipeline, points = read_file(options.path, options)
    exit_code, turns = 0, []
    for question in read_questions():
        try:
            command, _, argument = question.partition(" ")
            if command == "/help":
                print("\n".join(f"{name:<12}{what}" for name, what in COMMANDS.items()))
            elif command == "/reset":
                turns = []
            elif command == "/file":
                if not argument.strip():
                    raise ValueError("/file needs a name: /file chair.ply")
                points, turns = read_points(pipeline, path_or_url(argument.strip()), options), []
            elif re.fullmatch(r"/\w+", command):
                raise ValueError(f"{command} is no command; /help lists them")
            else:
                cloud = {"type": "point_cloud", "point_cloud": points}
                turns = ask(pipeline, cloud, turns, question, options.max_new_tokens)
        except ValueError as error:  # the question is dropped, the conversation continues
            complain(str(error))
            exit_code = FAILED
    return exit_code


def ask(pipeline, cloud: dict, turns: list[tuple], question: str, max_new_tokens: int) -> list[tuple]:
    """Print the answer to a question; returns the conversation with it, without its beginning if it was too long.

    Raises:
        ValueError: there is no answer.
    """
    from transformers import TextStreamer

    kept = turns
    while True:
        streamer = TextStreamer(pipeline.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        messages = to_messages(cloud, kept, question)
        try:
            (output,) = pipeline(messages, up_axis="y", clean="none", max_new_tokens=max_new_tokens, streamer=streamer)
        except BrokenPipeError:
            raise
        except Exception as error:
            if not (kept and "the context has" in str(error)):
                raise ValueError(f"no answer: {one_line(error)}") from error
            kept = kept[len(kept) // 2 + 1 :]
            continue
        if len(kept) < len(turns):
            complain("the conversation is longer than the model's context: its beginning is left out")
        return [*kept, (question, output["generated_text"])]


def to_messages(cloud: dict, turns: list[tuple[str, str]], question: str) -> list[dict]:
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
    try:
        while (question := input(sign).strip()) != "/quit":
            if any("\ud800" <= letter <= "\udfff" for letter in question):
                complain("a question that is not UTF-8 was skipped")
            elif question:
                yield question
    except EOFError:
        pass
