"""`minigpt3d describe`, `chat`, `convert`, `verify`, `pack`, `evaluate`, `compare` and `card`: the command line.

A module of its own beside the package, because importing the package imports torch and transformers, and `--help` and
mistyped commands must not wait for that.
"""

import argparse
import copy
import dataclasses
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from minigpt3d.arguments import add_options, read_options, with_flags
from minigpt3d.messages import one_line


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
    add_reading(shared, "in the file", "the model's own setting, else not turned")

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
    add_convert(commands)

    verify = commands.add_parser(
        "verify",
        help="check that a converted model computes here what it computed where it was made",
        description="Send a fixed cloud and prompt through a model, loaded without this package, and compare what comes "
        "out with the verification.json of its folder.",
        epilog="Exit code: 0 if it agrees, 1 if it does not or there is nothing to compare with.",
    )
    verify.add_argument("model", metavar="DIR_OR_ID", help="folder or Hub id")
    verify.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a Hub id that is not this project's own"
    )
    verify.set_defaults(run=run_verify)
    add_pack(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_card(commands)
    return parser


def add_reading(parser: argparse.ArgumentParser, where: str, default: str):
    parser.add_argument(
        "--up-axis",
        choices=["x", "y", "z"],
        help=f"axis that points up {where}; it is turned to y (default: {default})",
    )
    parser.add_argument(
        "--missing-color", choices=["black", "gray", "white"], help="color of points that have none (default: black)"
    )


def add_pack(commands):
    pack = commands.add_parser(
        "pack",
        help="make training data of clouds or meshes and what is said about them",
        description="Pack training data as Parquet shards, which the stages stream from disk or from the Hub. A run that was "
        "stopped goes on when it is started again.",
        epilog='A line of objects.jsonl: {"file": "chair.glb", "caption": "A red chair."}, or with '
        '"conversations" as in PointLLM\'s annotations instead of "caption".',
    )
    pack.add_argument("--data", type=Path, metavar="DIR", help="PointLLM's clouds, {object_id}_8192.npy")
    pack.add_argument("--annotations", type=Path, nargs="+", metavar="JSON", help="and its annotations")
    pack.add_argument(
        "--from",
        dest="objects",
        type=Path,
        metavar="FILE",
        help="your own objects instead: a .csv with columns file and caption, or lines of JSON",
    )
    add_reading(pack, "in your own files", "not turned")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    pack.add_argument("--seed", type=natural_int, default=0, help="of the order, shuffled once (default: 0)")
    pack.add_argument(
        "--max-broken",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of clouds that may be missing or broken; they are skipped and listed (default: 0.01)",
    )
    pack.add_argument("--num-workers", type=positive_int, metavar="N", help="processes (default: one for each core)")
    pack.add_argument("--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help="upload the result as a data set")
    pack.add_argument("--private", action="store_true", help="to a private one")
    pack.set_defaults(run=run_pack)


def add_evaluate(commands):
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on a benchmark or on your own objects, with intervals and controls",
        description="Ask a model about the objects of a suite, score its answers, and write a report. The same command goes on "
        "where a run was stopped, and adds what was not scored before: answers and a judge's replies are kept in --out. "
        "On several GPUs: accelerate launch -m minigpt3d.cli evaluate ...",
        epilog="Suites: modelnet40 (--data: PointLLM's .dat file), objaverse and caption (--data: PointLLM's clouds, "
        "--annotations: its 200 objects), household (the bundled checkpoint's held-out objects), own (--data: a .csv or "
        ".jsonl with file and label, caption or color; or what `minigpt3d pack` wrote).",
    )
    from minigpt3d.evaluation.options import EvaluateOptions

    add_options(evaluate, EvaluateOptions)
    evaluate.set_defaults(run=run_evaluate)


def add_compare(commands):
    compare = commands.add_parser(
        "compare",
        help="put evaluations side by side, with tests and published figures",
        description="Put the results of several evaluations in one table for each suite and judge, with paired tests between "
        "them. Published figures stand beside results of the same judge only.",
    )
    compare.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what `minigpt3d evaluate --out` wrote")
    compare.set_defaults(run=run_compare)


def add_card(commands):
    card = commands.add_parser(
        "card",
        help="write a model card from what is known, each number with its source",
        description="Write README.md into a model's or an adapter's folder, from its provenance, training history and the results "
        "of evaluations, with metadata for the Hub; card_sources.json says where each number comes from. What is not known "
        "is said to be unknown.",
        epilog='Cost and CO2 need what no file tells, each with its source: --co2 "watts=285:nvidia-smi, mean of the run" '
        '--co2 "pue=1.2:the operator" --co2 "grid=380:the national agency, 2025"; hours where the history has none.',
    )
    card.add_argument("folder", type=Path, metavar="DIR", help="of a model or an adapter")
    card.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="DIR", help="what `minigpt3d evaluate` wrote"
    )
    card.add_argument("--co2", action="append", default=[], metavar="NAME=VALUE:SOURCE", help="see below")
    card.add_argument(
        "--ablation", type=Path, metavar="DIR", help="what training/ablate.py wrote, to take in with its picture"
    )
    card.add_argument("--model-id", metavar="OWNER/NAME", help="what others will load it by (default: the folder)")
    card.set_defaults(run=run_card)


def add_convert(commands):
    convert = commands.add_parser(
        "convert",
        help="make one Hub folder of the authors' released files, or of a training stage's result",
        description="Make a folder that transformers loads. Without paths the released files are downloaded, after "
        "you were told what and how large. Without stages 3 and 4 the result is what training/stage1.py starts from.",
        epilog="Example: minigpt3d convert --out minigpt3d --dtype float16 --verify",
    )
    sources = convert.add_argument_group("the authors' files (none: download them all)")
    for option, metavar, text in (
        ("--phi", "DIR", "Phi-2: the authors' folder, or the official one"),
        ("--blip2", "FILE", "blip2_pretrained_flant5xxl.pth"),
        ("--point-encoder", "FILE", "point_model.pth"),
        ("--tinygpt-v", "FILE", "TinyGPT-V_for_Stage3.pth"),
        ("--stage3", "FILE", "MiniGPT_3D_stage_3.pth"),
        ("--stage4", "FILE", "MiniGPT_3D_stage_4.pth"),
    ):
        sources.add_argument(option, type=Path, metavar=metavar, help=text)
    sources.add_argument("--revision", help="commit of the authors' repository (default: the newest one)")
    sources.add_argument("--yes", action="store_true", help="download without asking")
    convert.add_argument(
        "--stage-result", type=Path, metavar="DIR", help="instead of files: what a run of training/stage*.py wrote"
    )
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="replace the model that is there")
    convert.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="of the weights (default: float16)",
    )
    convert.add_argument(
        "--lora",
        choices=["merge", "keep"],
        help="merge: plain weights. keep: OUT/base and OUT/adapter, a PEFT adapter to go on training (default: merge, or keep "
        "without stage 4, where training goes on)",
    )
    convert.add_argument(
        "--router",
        choices=["sparse", "soft", "constant", "none"],
        help="mixing of the query experts (default: sparse, or none before stage IV)",
    )
    convert.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out keys that do not fit, such as 'visual_encoder.*' or 'stage3:llama_proj.*'; may be given several "
        "times, is recorded",
    )
    convert.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json of a model of other sizes (default: the paper's)"
    )
    convert.add_argument(
        "--verify", action="store_true", help="load the result in a fresh process, and store what it computes"
    )
    convert.set_defaults(run=run_convert)


def natural_int(text: str, at_least: int = 0) -> int:
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {at_least}, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    return natural_int(text, at_least=1)


def price(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price: expected a number of at least 0, such as 0.15")
    return number


def load(args: argparse.Namespace):
    """Load the model.

    Returns:
        The pipeline, and a function from path to cloud that follows `args`. Read apart, a file that cannot be read is
        told from a model that fails, and a conversation reads its file once.

    Raises:
        CommandError: there is no such model, or it cannot be read.
    """
    from minigpt3d.hub import default_model, load_model
    from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline

    quiet()
    model, processor = load_model(args.model or default_model())
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


def quiet():
    """Silence what the libraries say while they load; what went wrong is in their exceptions."""
    import logging as python_logging

    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # says what it lacks, asked or not


class CommandError(Exception):
    """What went wrong, in one line for the user."""


class ShowWarnings:
    """Warnings for users as one line each, and not again; those for developers as `show` has them."""

    def __init__(self, show):
        self.show, self.shown = show, set()

    def __call__(self, message, category, *where):
        text = " ".join(str(message).split())
        if category is not UserWarning:
            self.show(message, category, *where)
        elif text not in self.shown:
            self.shown.add(text)
            complain(f"warning: {text}")


def complain(message: str):
    """One line on standard error, clear of a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(f"minigpt3d: {message}"), file=sys.stderr)


def printable(text: str) -> str:
    r"""Text that a stream takes even if a file name in it is not UTF-8: such bytes as `\udcff`, which JSON knows too."""
    return text.encode(errors="backslashreplace").decode()


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
        what = "this is a folder; pass one of the files in it" if args.path.is_dir() else "no such file"
        raise CommandError(f"{args.path}: {what}")
    describe, read = load(args)
    from minigpt3d.pipeline_minigpt3d import AnswerStreamer

    exit_code, said = 0, []  # (question, answer), …
    cloud = {"type": "point_cloud", "point_cloud": read(args.path)}
    for question in read_questions():
        kept = said
        while True:
            streamer = AnswerStreamer(describe.processor.tokenizer)
            try:
                messages = to_messages(cloud, [*kept, (question, None)])
                (output,) = describe(messages, max_new_tokens=args.max_new_tokens, streamer=streamer)
            except BrokenPipeError:
                raise
            except Exception as error:
                if kept and "the context has" in str(error):  # too long: without its beginning?
                    kept = kept[len(kept) // 2 + 1 :]
                    continue
                complain(f"no answer: {one_line(error)}")  # the turn is dropped, the conversation goes on
                exit_code = FAILED
            else:
                if len(kept) < len(said):
                    complain("the conversation is longer than what the model can read: its beginning is left out")
                said = [*kept, (question, output["generated_text"])]
            break
    return exit_code


def to_messages(cloud: dict, said: list[tuple[str, str | None]]) -> list[dict]:
    """Questions and answers as a chat; the first question has the cloud, the last one no answer yet."""
    messages = []
    for question, answer in said:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, cloud)
    return messages


def run_convert(args: argparse.Namespace) -> int:
    import torch

    from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
    from minigpt3d.conversion import release, verification as verify, write
    from minigpt3d.conversion.names import FILES
    from minigpt3d.hub import check_model_dir
    from minigpt3d.model_card import write_card

    paths = {file.slot: path for file in FILES if (path := getattr(args, file.slot)) is not None}
    out = check_model_dir(args.out, [*paths.values(), *filter(None, [args.stage_result])])
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        raise CommandError(f"{args.out} holds a model already; pass a new folder, or --overwrite to replace it")
    if args.stage_result is not None:
        if paths or args.config is not None:
            raise CommandError("--stage-result stands alone: give it, or the authors' files")
        from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

        if not any((args.stage_result / each).is_file() for each in ("config.json", "adapter_config.json")):
            raise CommandError(
                f"{args.stage_result}: no config.json or adapter_config.json; give the folder that training/stage*.py wrote"
            )
        sources, config, lora = release.stage_sources(args.stage_result)
        processor = MiniGPT3DProcessor.from_pretrained(sources[0].checkpoint.path)
    else:
        config = MiniGPT3DConfig() if args.config is None else read_config(args.config)
        paths, origins = (paths, {}) if paths else download_release(args.revision, args.yes)
        sources, lora = release.release_sources(paths, origins), ()
        processor = release.load_processor(paths["phi"], config)
    try:
        plan = release.make_plan(sources, config, processor, args.router, args.ignore, lora)
    except ValueError as error:
        raise CommandError(str(error)) from error  # line by line
    print(release.summary(plan), flush=True)
    exit_code = 0

    def finish(folder: Path):
        nonlocal exit_code
        for part in (folder, folder / "base", folder / "adapter"):
            if (part / write.PROVENANCE_FILE).is_file():
                write_card(part, model_id=args.out.resolve().name)
        if not args.verify:
            return
        try:
            computed = verify.compute(folder)
        except verify.KilledError as error:  # hours of work are not thrown away for that
            complain(f"not verified: {error}. Verify it on a larger machine: minigpt3d verify {args.out}")
            exit_code = FAILED
            return
        verify.store(folder, computed)
        print(verify.to_text(computed))

    dtype = getattr(torch, args.dtype)
    trains_on = "phi" in paths and "stage4" not in paths
    args.lora = args.lora or ("keep" if trains_on else "merge")
    write.write_release(plan, args.out, dtype, args.lora, args.argv, finish)
    if args.lora == "keep":
        print(
            f"{args.out / 'adapter'} names its base as {args.out.resolve() / 'base'}: adapter_config.json, if you move it"
        )
    print(f"{args.out} is done")
    return exit_code


def read_config(path: Path):
    """
    Raises:
        CommandError: it is no configuration of a model.
    """
    from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig

    try:
        return MiniGPT3DConfig.from_json_file(path)
    except Exception as error:  # strict configurations raise what they like
        raise CommandError(f"--config {path}: {one_line(error)}") from error


def download_release(revision: str | None, yes: bool):
    """Say what would be downloaded, ask, and download.

    Raises:
        CommandError: the answer is no, or nobody is there to ask.
    """
    from minigpt3d.conversion.download import fetch, find_release

    download = find_release(revision)
    print(download, flush=True)
    if not yes:
        if not sys.stdin.isatty():
            raise CommandError("nothing was downloaded: there is nobody to ask; pass --yes")
        if input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandError("nothing was downloaded, as you said")
    return fetch(download)


def run_verify(args: argparse.Namespace) -> int:
    from minigpt3d.conversion import verification as verify

    if not Path(args.model).is_dir():
        from minigpt3d import HUB_ID

        if args.model.count("/") != 1:
            raise CommandError(f"there is no folder {args.model}, and a model on the Hub is named OWNER/NAME")
        if args.model != HUB_ID and not args.trust_remote_code:
            raise CommandError(f"{args.model} brings code of its own, which would be run: pass --trust-remote-code")
    stored = verify.read_stored(args.model)
    computed = verify.compute(args.model)
    print(verify.to_text(computed))
    if stored is None:
        raise CommandError(
            f"{args.model} has no {verify.VERIFICATION_FILE}, so there is nothing to compare with (minigpt3d convert --verify writes one)"
        )
    found = verify.differences(computed, stored)
    for line in found:
        complain(line)
    if found:
        made = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
        raise CommandError(f"{args.model} computes something else here than where it was made (with {made})")
    if computed["text"] != stored["text"]:
        print(f"stored    {stored['text']!r}")
        print("the numbers agree with verification.json; the text does not, which rounding may explain")
        return 0
    print("agrees with verification.json")
    return 0


def reading_of(args: argparse.Namespace) -> dict[str, str]:
    """What is said of how one's own files are read."""
    return {name: getattr(args, name) for name in ("up_axis", "missing_color") if getattr(args, name) is not None}


def run_pack(args: argparse.Namespace) -> int:
    if (args.objects is None) == (args.data is None) or (args.data is None) != (args.annotations is None):
        raise CommandError("give --data and --annotations, or --from")
    if not 0 <= args.max_broken <= 1:
        raise CommandError(f"--max-broken is a share between 0 and 1, got {args.max_broken:g}")
    from minigpt3d.data import shards as pack

    if args.objects is not None:
        entries = pack.own_entries(args.objects)
    elif reading_of(args):
        raise CommandError(
            "--up-axis and --missing-color are for your own objects, --from: PointLLM's are as they must be"
        )
    else:
        entries = pack.release_entries(args.data, args.annotations)
    try:
        manifest = pack.pack(
            entries,
            args.out,
            args.seed,
            max_broken=args.max_broken,
            num_workers=args.num_workers,
            reading=reading_of(args),
        )
    except ValueError as error:
        raise CommandError(str(error)) from error  # line by line
    for line in manifest["broken"]:
        complain(f"skipped: {line}")
    sources = ", ".join(f"{source} {sum(rows):,}" for source, rows in manifest["shards"].items())
    print(
        f"{args.out}: {manifest['rows']:,} rows ({sources}) of {manifest['bytes_per_row']:,} bytes, coordinates off by at "
        f"most {manifest['max_coord_error']:.1e}; {len(manifest['broken'])} skipped"
    )
    if args.push_to_hub is not None:
        try:
            print(pack.push(args.out, args.push_to_hub, args.private))
        except Exception as error:  # whatever the network does, the data are on disk
            retry = f"hf upload {args.push_to_hub} {args.out} --repo-type dataset"
            raise CommandError(
                f"{args.out} was not uploaded: {one_line(error)} (it is on disk; try again: {retry})"
            ) from error
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    try:
        from minigpt3d.evaluation.objects import BrokenObjectsError
        from minigpt3d.evaluation.options import EvaluateOptions
        from minigpt3d.evaluation.run import evaluate
    except ImportError as error:
        raise CommandError(f'{one_line(error)} (pip install "minigpt3d[eval]")') from error
    names = [field.name for field in dataclasses.fields(EvaluateOptions)]

    def flagged(message: str) -> str:
        return with_flags(message, names, "-")

    quiet()
    try:
        results = evaluate(
            read_options(EvaluateOptions, args),
            command=shown_command(args.argv),
            report=lambda message: complain(flagged(message)),
        )
    except BrokenObjectsError as error:
        raise CommandError(str(error)) from error  # line by line
    except (ImportError, ValueError) as error:
        raise CommandError(flagged(one_line(error))) from error
    except KeyboardInterrupt:
        complain(f"stopped; the answers so far are kept in {args.out}, and the same command resumes there")
        raise
    if results is not None:  # the first process
        from minigpt3d.evaluation.report import score_table

        print(score_table(results))
        print(
            f"\n{args.out / 'report.html'} shows the best and the worst objects; report.md and results.json have it all"
        )
    return 0


def shown_command(argv: list[str]) -> str:
    """A command line for others: of what lies on this disk, its last part; of a URL, neither a password nor a query."""
    return "minigpt3d " + shlex.join(map(_shown, argv))


def _shown(word: str) -> str:
    option, value = re.fullmatch(r"((?:--[\w-]+=)?(?:[a-z0-9_]+=)?)(.*)", word, re.DOTALL).groups()  # --out=, METRIC=
    if re.match(r"\s*https?://", value, re.IGNORECASE):
        try:
            url = urlsplit(value.strip())
            value = url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()
        except ValueError:  # no URL that could be asked
            value = "URL"
    elif value.startswith(("/", "~", "file:")) or Path(value).is_absolute() or ".." in Path(value).parts:
        value = Path(value).name or value
    return option + value


def run_card(args: argparse.Namespace) -> int:
    from minigpt3d.hub import fingerprint_model
    from minigpt3d.model_card import read_given, write_card

    given = read_given(args.co2)
    fingerprint = fingerprint_model(str(args.folder)) if args.results else None
    print(write_card(args.folder, args.results, given, args.ablation, args.model_id, fingerprint))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from minigpt3d.evaluation.comparison import compare

    print(compare(args.folders))
    return 0


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
        if not question.isascii() and any("\ud800" <= letter <= "\udfff" for letter in question):
            complain("a question that is not UTF-8 was left out")
        elif question:
            yield question


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = ShowWarnings(warnings.showwarning)
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
