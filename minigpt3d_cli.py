"""`minigpt3d describe` and `minigpt3d chat`: what a 3D model is, from the command line.

A module of its own beside the package, because importing the package imports torch and transformers, and `--help` and
mistyped commands must not wait for that.
"""

import argparse
import copy
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


BUNDLED_MODEL = Path(__file__).resolve().parent / "checkpoints" / "household"

FAILED, INTERRUPTED = 1, 130  # exit codes, beside 0 and argparse's 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minigpt3d", description="Ask a small language model what a 3D object is.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model", help="folder or Hub id (default: checkpoints/household if it is there, else the Hub)"
    )
    shared.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator if there is one)")
    shared.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=150,
        metavar="N",
        help="longest answer, in tokens (default: 150)",
    )
    shared.add_argument(
        "--up-axis",
        choices=["x", "y", "z"],
        help="axis that points up in the file; it is turned to y (default: the model's own setting, else not turned)",
    )
    shared.add_argument(
        "--missing-color", choices=["black", "gray", "white"], help="colour of points that have none (default: black)"
    )

    describe = commands.add_parser(
        "describe",
        parents=[shared],
        help="describe files, or all readable files in folders",
        description="Describe 3D models: one line each on standard output, errors on standard error.",
        epilog="Exit code: 0, 1 if a file failed, 2 for a wrong command line.",
    )
    describe.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="point cloud, mesh, or a folder"
    )
    describe.add_argument("--prompt", help='the question (default: "What is this?")')
    describe.add_argument("--json", action="store_true", help="print one JSON object per line: file, prompt, answer")
    describe.set_defaults(run=run_describe)

    chat = commands.add_parser(
        "chat",
        parents=[shared],
        help="ask several questions about one file",
        description="Talk about a 3D model. Questions are read line by line; blank ones are skipped; /quit or the end of input ends it.",
    )
    chat.add_argument("path", type=Path, metavar="FILE", help="point cloud or mesh")
    chat.set_defaults(run=run_chat)
    return parser


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def resolve_model(model: str | None) -> str:
    """The model to load: what was asked for, else the one that lies in the checkout, else the published one."""
    if model is not None:
        return model
    if (BUNDLED_MODEL / "config.json").exists():
        return str(BUNDLED_MODEL)
    from minigpt3d import HUB_ID

    return HUB_ID


def load_model(name: str):
    """The model and the processor in a folder or of a Hub id.

    Raises:
        CommandError: there is no such model, it cannot be read, or weights are missing.
    """
    if not Path(name).is_dir() and name.count("/") != 1:
        raise CommandError(f"there is no folder {name}, and a model on the Hub is named OWNER/NAME (see --model)")
    from transformers import logging

    from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
    from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = MiniGPT3DForConditionalGeneration.from_pretrained(name, output_loading_info=True)
        processor = MiniGPT3DProcessor.from_pretrained(name)
    except Exception as error:
        fix = "pass --model with the folder of a model or its Hub id"
        raise CommandError(f"cannot load the model {name}: {one_line(error)} ({fix})") from error
    # Weights that are not in the files stay random; tied ones are not among them.
    absent = sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    if absent:
        raise CommandError(
            f"cannot load the model {name}: {len(absent)} of its weights are missing or of another shape, "
            f"{absent[0]} for one (fetch or save it again)"
        )
    return model, processor


def load(args: argparse.Namespace):
    """Load the model.

    Returns:
        The pipeline, and a function from path to cloud that follows `args`. Read apart, a file that cannot be read is
        told from a model that fails, and a conversation reads its file once.

    Raises:
        CommandError: there is no such model, or it cannot be read.
    """
    from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline

    model, processor = load_model(resolve_model(args.model))
    try:
        describe = PointCloudToTextPipeline(model=model, processor=processor, device=args.device)
    except Exception as error:
        raise CommandError(f"cannot use the device {args.device}: {one_line(error)} (leave out --device)") from error
    reader = copy.copy(processor.feature_extractor)
    reader.up_axis = args.up_axis or reader.up_axis
    reader.missing_color = args.missing_color or reader.missing_color
    processor.feature_extractor.up_axis = None  # what it gets has been turned

    def read(path: Path):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                cloud = reader(path)["point_clouds"][0]
        except Exception as error:  # whatever is wrong with a file, the others are still done
            text = one_line(error).removeprefix(f"{path}: ")  # the reader names its file already
            raise CommandError(f"{path}: {text}") from error
        for warning in caught:
            text = str(warning.message).removeprefix(f"{path}: ")
            complain(f"{path}: warning: {' '.join(text.split())}")
        return cloud

    return describe, read


class CommandError(Exception):
    """What went wrong, in one line for the user."""


def complain(message: str):
    """One line on standard error, clear of a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(f"minigpt3d: {message}"), file=sys.stderr)


def printable(text: str) -> str:
    r"""Text that a stream takes even if a file name in it is not UTF-8: such bytes as `\udcff`, which JSON knows too."""
    return text.encode(errors="backslashreplace").decode()


def one_line(error: Exception) -> str:
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    is_expected = message and isinstance(error, (OSError, ValueError, ImportError))
    return " ".join((message if is_expected else f"{type(error).__name__}: {message}").split())


def find_files(path: Path) -> list[Path]:
    """The file itself, or all readable files in a folder and its subfolders, sorted."""
    if not path.is_dir():
        return [path]
    from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES

    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READABLE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise CommandError(f"{path}: no point cloud or mesh in this folder; expected {' '.join(READABLE_SUFFIXES)}")
    return found


def run_describe(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    exit_code = 0
    files = []
    for path in args.paths:
        try:
            files.extend(find_files(path))
        except CommandError as error:
            complain(str(error))
            exit_code = FAILED
    if not files:
        return exit_code
    describe, read = load(args)
    from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    # Without a terminal (disable=None) nobody watches the bar, and a log keeps to its lines.
    for path in tqdm(files, unit="file", file=sys.stderr, disable=None if len(files) > 1 else True):
        try:
            cloud = read(path)
        except CommandError as error:
            complain(str(error))
            exit_code = FAILED
            continue
        try:
            answer = describe(cloud, prompt=prompt, max_new_tokens=args.max_new_tokens)[0]["generated_text"]
        except Exception as error:  # out of memory, say: the next cloud may still fit
            complain(f"{path}: no answer: {one_line(error)}")
            exit_code = FAILED
            continue
        if args.json:
            line = json.dumps({"file": str(path), "prompt": prompt, "answer": answer}, ensure_ascii=False)
        else:
            line = answer if len(files) == 1 else f"{path}: {answer}"
        tqdm.write(printable(line), file=sys.stdout)
        sys.stdout.flush()
    return exit_code


def run_chat(args: argparse.Namespace) -> int:
    if not args.path.is_file():
        raise CommandError(f"{args.path}: no such file")
    describe, read = load(args)
    from minigpt3d.pipeline_minigpt3d import AnswerStreamer

    exit_code, messages = 0, []
    content = [{"type": "point_cloud", "point_cloud": read(args.path)}]  # the first question has the cloud
    for question in read_questions():
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        streamer = AnswerStreamer(describe.processor.tokenizer)
        try:
            (output,) = describe([*messages, turn], max_new_tokens=args.max_new_tokens, streamer=streamer)
        except BrokenPipeError:
            raise
        except Exception as error:  # the turn is dropped, the conversation goes on
            complain(f"no answer: {one_line(error)}")
            exit_code = FAILED
            continue
        messages += [turn, {"role": "assistant", "content": [{"type": "text", "text": output["generated_text"]}]}]
        content = []
    return exit_code


def read_questions() -> Iterator[str]:
    """Questions from standard input, a line each, until its end or /quit; a prompt is shown to people, not to pipes."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(sign).strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question:
            yield question


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answers has left, `head` for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (CommandError, OSError, ValueError) as error:
        complain(str(error) if isinstance(error, CommandError) else one_line(error))
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
