"""Captioned objects → data of the recipe: clouds, splits and texts, in one command that resumes.

    python -m minigpt3d.recipes.open_objects.build CLOUDS --output_dir DATA [--wordnet DIR]

    coord.npy, color.npy       (M, 4096, 3) int16 and uint8 of all objects, to be mapped into memory
    objects.jsonl              one line per object, in that order: id, noun, kind, split, colors, extent, texts, creator, …
    views/{id}-v{n}_8192.npy   (1024, 6) float16: variants of the training objects, of which Q-Former and stages learn
    views.jsonl                one line per view, object by object: id, shares of the colors, proportions
    brief.json detailed.json single_round.json multi_round.json    PointLLM's records of the views
    meanings.jsonl             definitions of nouns in general, if WordNet is given
    split.json                 ids by split
    report.json                counts; written last

A step whose file exists is skipped. The files depend on the captions, the clouds and the seed only.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt3d.arguments import option, run_script
from minigpt3d.data.clouds import point_cloud_path
from minigpt3d.data.records import SOURCES
from minigpt3d.evaluation.objects import read_household
from minigpt3d.evaluation.vocabulary.colors import color_shares
from minigpt3d.files import write_json, write_text, written_file

from .augment import augment, normalize
from .captioned_objects import CAPTIONS_FILE, CaptionedObject, read_captions, read_clouds, to_cloud
from .network import CLOUD_POINTS
from .nothing import NOTHING, make_nothing
from .splits import SPLITS, split_objects
from .text import Described, annotate, measure
from .wordnet import Entry, WordNet


SPLIT_FILE = Path(__file__).with_name("split.json")  # what the command writes for the captions of the project
VIEWS_FILE = "views.jsonl"
NUM_NOTHING = {"train": 300, "validation": 60, "test": 60}
PER_VIEW = {"brief": 2, "detailed": 1, "single_round": 4, "multi_round": 1}  # records


@dataclass(frozen=True)
class BuildOptions:
    """Options of the command."""

    clouds: Path = option(
        "folder of the .npz shards that the captions name, or of packs as their creators publish them",
        positional=True,
        metavar="CLOUDS",
    )
    output_dir: Path = option("folder for the data", default=Path("build/data"), metavar="DIR")
    captions: Path = option("captions of the objects, .jsonl.gz", default=CAPTIONS_FILE, metavar="FILE")
    wordnet: Path | None = option(
        "folder with WordNet's index.noun and data.noun, for general questions", default=None, metavar="DIR"
    )
    views: int = option("variants of each training object that get texts of their own", default=6)
    seed: int = option("seed of nothing-shapes and wording", default=0)


def build(options: BuildOptions) -> dict:
    """Write the data; returns the content of report.json.

    Raises:
        ValueError: clouds or WordNet are missing.
    """
    output = options.output_dir
    if (output / "report.json").exists():
        return json.loads((output / "report.json").read_text(encoding="utf-8"))
    meanings = WordNet(options.wordnet) if options.wordnet else None
    output.mkdir(parents=True, exist_ok=True)
    objects = read_captions(options.captions)
    if not (output / "split.json").exists():
        write_arrays(options.clouds, objects, output, options.seed)
    split = json.loads((output / "split.json").read_text(encoding="utf-8"))
    coord, color = (np.load(output / f"{name}.npy", mmap_mode="r") for name in ("coord", "color"))
    lines = describe(objects, split, coord, color, meanings)
    write_text(output / "objects.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if meanings:
        write_text(output / "meanings.jsonl", "".join(json.dumps(line) + "\n" for line in meanings.concrete_nouns()))
    num_records = write_views(output, coord, color, options.views, options.seed)
    report = {"objects": dict(Counter(line["split"] for line in lines)), "records": num_records}
    report["kinds"] = {
        kind: [sum(line["kind"] == kind and line["split"] == name for line in lines) for name in SPLITS]
        for kind in sorted({line["kind"] for line in lines})
    }
    write_json(output / "report.json", report)
    return report


def write_arrays(clouds: Path, objects: list[CaptionedObject], output: Path, seed: int):
    """Write coord.npy, color.npy and split.json: the captioned objects, then nothing-shapes."""
    objects, coord, color = read_clouds(clouds, objects)
    suite = {item.object_id for item in read_household()}
    splits = split_objects(objects, [xyz / np.float32(32767) for xyz in coord], suite)
    ids = {name: [o.object_id for o, s in zip(objects, splits, strict=True) if s == name] for name in SPLITS}
    rows = {name: [i for i, s in enumerate(splits) if s == name] for name in SPLITS}
    extra = []
    for number, (name, count) in enumerate(NUM_NOTHING.items()):
        rng = np.random.default_rng([seed, number])
        whole = [to_cloud(coord[i], color[i]) for i in rows[name]]
        extra += [make_nothing(whole, rng) for _ in range(count)]
        ids[name] += [f"{NOTHING}/{name}-{index:03d}" for index in range(count)]
    extra = np.stack(extra)
    arrays = {
        "coord": np.concatenate([coord, np.round(extra[..., :3] * 32767).astype(np.int16)]),
        "color": np.concatenate([color, np.round(extra[..., 3:] * 255).astype(np.uint8)]),
    }
    for name, array in arrays.items():
        with written_file(output / f"{name}.npy") as partial, open(partial, "wb") as file:
            np.save(file, array)
    write_json(output / "split.json", ids)


def describe(
    objects: list[CaptionedObject],
    split: dict[str, list[str]],
    coord: np.ndarray,
    color: np.ndarray,
    meanings: WordNet | None,
) -> list[dict]:
    """The lines of objects.jsonl, in the order of the arrays."""
    split_of = {object_id: name for name, ids in split.items() for object_id in ids}
    known = {item.object_id: item for item in objects}
    ids = [item.object_id for item in objects if item.object_id in split_of]
    ids += [i for name in NUM_NOTHING for i in split[name] if i not in known]
    lines = []
    for object_id, xyz, rgb in zip(ids, coord, color, strict=True):
        colors, extent = measure(to_cloud(xyz, rgb))
        item = known.get(object_id)
        noun = item.noun if item else NOTHING
        described = Described(
            object_id=object_id.replace("/", "-"),
            noun=noun,
            kind=item.kind if item else NOTHING,
            brief=item.brief if item else "",
            detailed=item.detailed if item else "",
            questions=item.questions if item else (),
            material=item.material if item else "",
            colors=colors,
            extent=extent,
            meaning=meanings.look_up(noun) if meanings and item else None,
        )
        origin = {name: getattr(item, name) if item else NOTHING for name in ("source", "pack", "creator", "license")}
        lines.append(asdict(described) | origin | {"split": split_of[object_id]})
    return lines


def read_lines(data: Path, name: str = "objects.jsonl") -> list[dict]:
    """The lines of objects.jsonl, or of another file."""
    return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]


def to_described(line: dict) -> Described:
    """A line of objects.jsonl as what texts are made from."""
    fields = {name: line[name] for name in Described.__dataclass_fields__}
    fields["meaning"] = Entry(**fields["meaning"]) if fields["meaning"] else None
    fields["questions"] = tuple(map(tuple, fields["questions"]))
    return Described(**fields | {"colors": tuple(fields["colors"]), "extent": tuple(fields["extent"])})


def write_views(data: Path, coord: np.ndarray, color: np.ndarray, num_views: int, seed: int) -> dict[str, int]:
    """Write views of the training objects and records about them; returns the numbers of records by source.

    Proportions and colors are measured on each view, so that its texts are true of it. The first view is the object as it
    is; every other view has new colors, since packs have palettes of their own, and an object is not known by its color.
    """
    folder = data / "views"
    folder.mkdir(exist_ok=True)
    lines = read_lines(data)
    train = [(row, to_described(line)) for row, line in enumerate(lines) if line["split"] == "train"]
    others = [item for _, item in train]
    records: dict[str, list[dict]] = {source: [] for source in SOURCES.values()}
    facts = []
    for row, item in tqdm(train, desc="views", unit="object", mininterval=5):
        cloud = to_cloud(coord[row], color[row])
        for number in range(num_views):
            rng = np.random.default_rng([seed, number, *item.object_id.encode()])
            points = seen = normalize(cloud[:CLOUD_POINTS])
            if number:
                points, seen = augment(cloud, CLOUD_POINTS, rng, recolored=number % 2)
            view = as_seen(item, f"{item.object_id}-v{number}", seen, recolored=bool(number % 2))
            np.save(point_cloud_path(folder, view.object_id), points.astype(np.float16))
            facts.append(view_facts(view, seen))
            for source, of_source in choose(annotate(view, others, rng), rng).items():
                records[source] += of_source
    for source, content in records.items():
        write_json(data / f"{source}.json", content, indent=None)
    write_text(data / VIEWS_FILE, "".join(json.dumps(line) + "\n" for line in facts))
    return {source: len(content) for source, content in records.items()}


def view_facts(view: Described, points: np.ndarray) -> dict:
    """The line of views.jsonl: what heads are trained to name."""
    shares = [round(float(share), 3) for share in color_shares(points[:, 3:])]
    return {"object_id": view.object_id, "colors": shares, "shape": view.shape}


def as_seen(item: Described, object_id: str, points: np.ndarray, recolored: bool = False) -> Described:
    """The object with the proportions and colors of its points; new colors or none lose the texts that name others."""
    colors, extent = measure(points)
    view = replace(item, object_id=object_id, colors=colors, extent=extent)
    if points[:, 3:].any() and not recolored:
        return view
    return replace(view, brief="", detailed="", questions=())


def choose(records: list[dict], rng: np.random.Generator) -> dict[str, list[dict]]:
    """Some of a view's records by source, see `PER_VIEW`."""
    chosen: dict[str, list[dict]] = {}
    for source, count in PER_VIEW.items():
        of_source = [record for record in records if SOURCES[record["conversation_type"]] == source]
        chosen[source] = [of_source[i] for i in rng.permutation(len(of_source))[:count]]
    return chosen


def main(argv: list[str] | None = None):
    def action(options: BuildOptions):
        print(json.dumps(build(options), indent=1))

    run_script(action, BuildOptions, argv, __doc__, "minigpt3d.recipes.open_objects.build")


if __name__ == "__main__":
    main()
