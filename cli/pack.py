"""`minigpt3d pack`: make training data of point clouds or meshes and their texts."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import flag, natural_int, option, positive_int, with_flags
from minigpt3d.data.reading import LimitOptions
from minigpt3d.data.reading_options import ReadingOptions
from minigpt3d.hub import BUNDLED_MODEL, HUB_ID_RULES, is_hub_id

from .console import complain


HELP = "make training data of point clouds or meshes and their texts"
DESCRIPTION = (
    "Pack training data as Parquet shards, which the training stages stream from disk or from the Hub. The same command "
    "resumes a run that was stopped."
)
EPILOG = (
    'A line of objects.jsonl: {"file": "chair.glb", "caption": "A red chair."}, or with "conversations" as in PointLLM\'s '
    'annotations instead of "caption".'
)


@dataclass(kw_only=True)
class Options(ReadingOptions, LimitOptions):
    data: Path | None = option("folder of PointLLM's point clouds, {object_id}_8192.npy", default=None, metavar="DIR")
    annotations: list[Path] = option("PointLLM's annotations of these clouds", default=[], metavar="JSON")
    from_: str | None = option(
        "your own objects instead: a .csv with the columns file and caption, lines of JSON, or a data set on the Hub, "
        "hf://datasets/OWNER/NAME",
        default=None,
        metavar="FILE_OR_DATASET",
    )
    mesh_column: str = option("column of a data set with meshes or points", default="mesh", metavar="NAME")
    text_column: str = option("column of a data set with captions or conversations", default="caption", metavar="NAME")
    split: str = option("split of a data set", default="train", metavar="NAME")
    out: Path = option("folder to write", metavar="DIR")
    seed: int = option("seed of the order, which is shuffled once", default=0, type=natural_int)
    max_broken: float = option(
        "share of texts and point clouds that may be missing or broken; they are skipped and listed",
        default=0.01,
        metavar="SHARE",
    )
    num_workers: int | None = option(
        "number of processes (default: one for each core)", default=None, type=positive_int, metavar="N"
    )
    groups: str | Path | None = option(
        "also store which points this model's 3D encoder gathers from each cloud, so that training does not have to find "
        "them (without a value: the bundled model's)",
        default=None,
        nargs="?",
        const=BUNDLED_MODEL,
        metavar="MODEL",
    )
    preview: bool = option("add a column of small meshes, which the Hub's viewer shows", default=False)
    push_to_hub: str | None = option(
        "upload the result as this dataset; alone with --out it uploads what is packed already",
        default=None,
        metavar="OWNER/NAME",
    )
    private: bool = option("create the repository as private", default=False)


def run(options: Options, argv: list[str]) -> int:
    """Pack the data and upload them, as the options say; returns the exit code."""
    check(options)
    from minigpt3d.data import shards

    if has_input(options):
        pack(options)
    if options.push_to_hub is not None:
        print(shards.push(options.out, options.push_to_hub, options.private))
    return 0


def pack(options: Options):
    """Pack the data and print what they are."""
    from minigpt3d.data import shards

    grouping = None
    if options.groups is not None:
        from minigpt3d.data.groups import grouping_of

        grouping = grouping_of(options.groups)
    out = options.out.resolve()
    downloads, skipped = out.with_name(out.name + ".downloads"), []
    if options.from_ is None:
        entries = shards.release_entries(options.data, options.annotations, skipped.append)
    elif options.from_.startswith("hf://"):
        from minigpt3d.data.hub_rows import hub_entries

        entries = hub_entries(
            options.from_, options.mesh_column, options.text_column, options.split, downloads, skipped.append
        )
    else:
        entries = shards.table_entries(Path(options.from_), skipped.append)
    manifest = shards.pack(
        entries,
        options.out,
        options.seed,
        max_broken=options.max_broken,
        num_workers=options.num_workers,
        reading=options.reading,
        # Of PointLLM's clouds there are hundreds of thousands.
        notify=None if options.from_ is None else lambda text: complain(f"warning: {with_flags(text, Options, '-')}"),
        limits=options.limits,
        preview=options.preview,
        skipped=skipped,
        grouping=grouping,
    )
    shutil.rmtree(downloads, ignore_errors=True)
    for line in manifest["broken"]:
        complain(f"skipped: {line}")
    sources = ", ".join(f"{source} {sum(rows):,}" for source, rows in manifest["shards"].items())
    print(
        f"{options.out}: {manifest['rows']:,} rows ({sources}) of {manifest['bytes_per_row']:,} bytes, largest error of "
        f"coordinates {manifest['max_coord_error']:.1e}; {len(manifest['broken'])} skipped"
        + (f"; with {grouping}" if grouping else "")
    )


def has_input(options: Options) -> bool:
    return options.data is not None or bool(options.annotations) or options.from_ is not None


def check(options: Options):
    """
    Raises:
        ValueError: options that exclude each other, or one that is missing.
    """
    given = (options.data is not None, bool(options.annotations), options.from_ is not None)
    uploads_only = not has_input(options) and options.push_to_hub is not None
    if given not in ((True, True, False), (False, False, True)) and not uploads_only:
        raise ValueError("give --data and --annotations, or --from (or --push-to-hub for what is packed already)")
    if has_input(options) and options.out.exists():
        raise ValueError(f"{options.out} exists already; pass a new folder, or remove it")
    if options.push_to_hub is not None and not is_hub_id(options.push_to_hub):
        raise ValueError(f"--push-to-hub {options.push_to_hub!r}: {HUB_ID_RULES}")
    if not 0 <= options.max_broken <= 1:
        raise ValueError(f"--max-broken is a share between 0 and 1, got {options.max_broken:g}")
    if options.reading and options.from_ is None:
        flags = ", ".join(flag(name, "-") for name in options.reading)
        raise ValueError(f"only your own objects (--from) are read with {flags}, not PointLLM's clouds: leave it out")
