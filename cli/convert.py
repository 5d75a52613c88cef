"""`minigpt3d convert`: make a Hub folder of the authors' files, or of a training stage's result."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import option

from .console import FAILED, CommandError, complain, line_by_line


HELP = "make a Hub folder of the authors' released files, or of a training stage's result"
DESCRIPTION = (
    "Make a folder that transformers loads. Without paths the released files are downloaded, after their names and sizes "
    "were shown and you agreed. Without the files of stages 3 and 4 the result is what training stage I starts from."
)
EPILOG = "Example: minigpt3d convert --out minigpt3d --dtype float16 --verify"
FILES = "the authors' files (none: download them all)"


def file_option(help: str, metavar: str = "FILE"):
    """An option for one of the authors' files; its name is the slot of `conversion.names.FILES`."""
    return option(help, default=None, metavar=metavar, group=FILES)


@dataclass(kw_only=True)
class Options:
    phi: Path | None = file_option("Phi-2: the authors' folder, or the official one", "DIR")
    blip2: Path | None = file_option("blip2_pretrained_flant5xxl.pth")
    point_encoder: Path | None = file_option("point_model.pth")
    tinygpt_v: Path | None = file_option("TinyGPT-V_for_Stage3.pth")
    stage3: Path | None = file_option("MiniGPT_3D_stage_3.pth")
    stage4: Path | None = file_option("MiniGPT_3D_stage_4.pth")
    revision: str | None = option(
        "commit of the authors' repository (default: the newest one)", default=None, group=FILES
    )
    yes: bool = option("download without asking", default=False, group=FILES)
    stage_result: Path | None = option(
        "instead of files: the output folder of a training stage", default=None, metavar="DIR"
    )
    out: Path = option("folder to write", metavar="DIR")
    overwrite: bool = option("replace an existing model", default=False)
    dtype: Literal["float16", "bfloat16", "float32"] = option("dtype of the weights", default="float16")
    lora: Literal["merge", "keep"] | None = option(
        "merge: plain weights. keep: OUT/base and OUT/adapter, a PEFT adapter to train further (default: merge; without "
        "stage 4: keep)",
        default=None,
    )
    router: Literal["sparse", "soft", "constant", "none"] | None = option(
        "mixing of the query experts (default: sparse; before stage IV: none)", default=None
    )
    ignore: list[str] = option(
        "skip keys that do not fit, such as 'visual_encoder.*' or 'stage3:llama_proj.*'; may be repeated, is recorded",
        default=[],
        action="append",
        metavar="PATTERN",
    )
    config: Path | None = option(
        "config.json of a model of other sizes (default: the paper's)", default=None, metavar="FILE"
    )
    verify: bool = option("load the result in a new process, and store what it computes", default=False)

    @property
    def files(self) -> dict[str, Path]:
        """The authors' files that were given, by slot."""
        slots = [field.name for field in fields(self) if field.metadata.get("group") == FILES]
        return {slot: path for slot in slots if isinstance(path := getattr(self, slot), Path)}


def run(options: Options, argv: list[str]) -> int:
    """Convert; returns the exit code.

    Args:
        argv: the command line, for the record.
    """
    import torch

    from minigpt3d.conversion import release, write
    from minigpt3d.hub import ADAPTER_DIR, BASE_DIR, check_model_dir

    out = check_model_dir(options.out, [*options.files.values(), *filter(None, [options.stage_result])])
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise CommandError(f"{options.out} holds a model already; pass a new folder, or --overwrite to replace it")
    if options.stage_result and (options.files or options.config):
        raise CommandError("--stage-result stands alone: leave out the authors' files and --config")
    with line_by_line():
        if options.stage_result:
            plan = release.plan_stage_result(options.stage_result, options.router, options.ignore)
        else:
            paths, origins = (options.files, {}) if options.files else download(options.revision, options.yes)
            plan = release.plan_release(paths, origins, options.config, options.router, options.ignore)
    print(release.summary(plan), flush=True)
    lora, exit_code = options.lora or plan.default_lora, 0

    def write_rest(folder: Path):
        nonlocal exit_code
        exit_code = finish(folder, options)

    write.write_release(plan, options.out, getattr(torch, options.dtype), lora, argv, before_rename=write_rest)
    if lora == "keep":
        print(
            f"{options.out / ADAPTER_DIR} names its base as {out / BASE_DIR}; correct adapter_config.json if you move it"
        )
    print(f"{options.out} is done")
    return exit_code


def download(revision: str | None, yes: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Show what would be downloaded, ask, and download; returns paths and origins by slot.

    Raises:
        CommandError: the answer is no, or there is no terminal to ask.
    """
    from minigpt3d.conversion.download import fetch, find_release

    release = find_release(revision)
    print(release, flush=True)
    if not yes:
        if not sys.stdin.isatty():
            raise CommandError("nothing was downloaded: there is no terminal to ask for consent; pass --yes")
        if input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandError("nothing was downloaded: the answer was no")
    return fetch(release)


def finish(folder: Path, options: Options) -> int:
    """Write the cards of a new model, and its verification.json if asked for; returns the exit code."""
    from minigpt3d.conversion import verification, write
    from minigpt3d.hub import ADAPTER_DIR, BASE_DIR
    from minigpt3d.model_card import write_card

    for part in (folder, folder / BASE_DIR, folder / ADAPTER_DIR):
        if (part / write.PROVENANCE_FILE).is_file():
            write_card(part, model_id=options.out.resolve().name)
    if not options.verify:
        return 0
    try:
        computed = verification.compute(folder)
    except verification.KilledError as error:  # keep a result that took hours
        complain(f"not verified: {error}. Verify it on a machine with more memory: minigpt3d verify {options.out}")
        return FAILED
    verification.store(folder, computed)
    print(verification.to_text(computed))
    return 0
