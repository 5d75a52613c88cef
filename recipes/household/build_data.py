"""Furniture libraries → a data release in PointLLM's layout: colored clouds and texts about them.

The files of a release depend on the libraries and the seed only:

    clouds/{object_id}_8192.npy     training objects, and recolored copies of them ({object_id}-r1, …)
    validation/{object_id}_8192.npy objects whose names and base models no training object has
    brief.json detailed.json single_round.json multi_round.json    annotations of the training objects
    metadata.jsonl                  one line per object: name, kind, main color, size, creator, license, split, …
    counts.json                     counts, and the models that could not be read; written last

Clouds are read by `load_point_cloud`, as in inference, and turned as the catalog says; y is up.
"""

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minigpt3d.data.clouds import point_cloud_path
from minigpt3d.data.reading import end_with_parent
from minigpt3d.data.records import SOURCES
from minigpt3d.data.shards import NUM_POINTS
from minigpt3d.evaluation.vocabulary.colors import main_color
from minigpt3d.evaluation.vocabulary.kinds import kind_of
from minigpt3d.files import read_json_lines, write_json, write_text
from minigpt3d.point_cloud_minigpt3d import load_point_cloud

from .captions import annotate, get_facts
from .library import FurnitureLibrary, Piece
from .split import choose_validation, group_objects
from .views import recolor


# Half of all objects have no known kind. The others are shown more often, with twice as many texts.
BRIEF_PER_OBJECT = {True: 6, False: 1}
RECOLORED_PER_OBJECT = {True: 2, False: 0}


@dataclass(frozen=True)
class Item:
    """A piece of a library with its cloud, kind and place in the split."""

    piece: Piece
    cloud: np.ndarray
    kind: str | None
    group: int
    is_validation: bool


def build(
    libraries: list[Path], output: Path, held_out_library: str | None = None, seed: int = 0, num_workers: int = 2
) -> dict:
    """Build a release.

    Args:
        libraries: `.sh3f` files.
        output: folder for the release.
        held_out_library: stem of a library whose objects are all for validation, while all others are for training: this
            measures how well a model does on an unseen library.
        seed: of wording and recoloring.
        num_workers: processes that read models.

    Returns:
        The content of counts.json.

    Raises:
        ValueError: the libraries hold no readable models, repeat an id, or do not include the held-out one.
    """
    pieces = read_pieces(libraries)
    stems = {piece.library for _, piece in pieces}
    if held_out_library is not None and held_out_library not in stems:
        raise ValueError(f"`held_out_library` must be one of {', '.join(sorted(stems))}, got {held_out_library!r}.")
    with ProcessPoolExecutor(num_workers, initializer=end_with_parent) as pool:
        results = list(tqdm(pool.map(read_cloud, pieces, chunksize=4), total=len(pieces), desc="models", unit=""))
    broken = {piece.object_id: error for (_, piece), (_, error) in zip(pieces, results, strict=True) if error}
    readable = [(piece, cloud) for (_, piece), (cloud, _) in zip(pieces, results, strict=True) if cloud is not None]
    if not readable:
        raise ValueError(
            f"none of the {len(pieces)} models can be read; the first error: {next(iter(broken.values()))}"
        )
    items = split_pieces(readable, held_out_library)
    num_records = write_release(items, output, seed)
    counts = {"libraries": [Path(path).name for path in libraries], "held_out_library": held_out_library}
    counts |= count_items(items) | {"records": num_records, "broken": broken}
    write_json(output / "counts.json", counts)
    return counts


def read_pieces(libraries: Iterable[Path]) -> list[tuple[Path, Piece]]:
    """Every piece of the libraries, with its library, in their order.

    Raises:
        ValueError: a library is unreadable, there are no pieces, or two share an id (a library given twice).
    """
    pieces = []
    for path in libraries:
        with FurnitureLibrary(path) as library:
            pieces += [(Path(path), piece) for piece in library.pieces()]
    repeated = [object_id for object_id, n in Counter(piece.object_id for _, piece in pieces).items() if n > 1]
    if not pieces or repeated:
        problem = f"the id {repeated[0]!r} is used twice" if repeated else "they hold no pieces"
        raise ValueError(f"`libraries`: {problem}. Give each .sh3f file once.")
    return pieces


def read_cloud(library_and_piece: tuple[Path, Piece], num_points: int = NUM_POINTS) -> tuple[np.ndarray | None, str]:
    """The cloud of a piece, (num_points, 6) float32 normalized; or None and the error."""
    library_file, piece = library_and_piece
    torch.set_num_threads(1)
    temporary = str(library_file)
    try:
        with (
            FurnitureLibrary(library_file) as library,
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            temporary = folder
            cloud = load_point_cloud(library.extract(piece, folder), num_points=num_points)
    except Exception as error:  # one model that cannot be read must not end the build
        # The temporary folder has another name in every run; the counts must not.
        return None, f"{type(error).__name__}: {error}".replace(temporary, piece.library)
    cloud[:, :3] = cloud[:, :3] @ piece.rotation.T.astype(np.float32)
    return cloud, ""


def split_pieces(pieces: list[tuple[Piece, np.ndarray]], held_out_library: str | None) -> list[Item]:
    """Assign kinds, and training or validation."""
    names = [piece.name for piece, _ in pieces]
    kinds = [(kind_of(name) or (None,))[0] for name in names]
    if held_out_library is None:
        groups = group_objects(names, kinds, [cloud[:, :3] for _, cloud in pieces])
        held_out = choose_validation(names, kinds, groups)
    else:
        groups = list(range(len(pieces)))
        held_out = [piece.library == held_out_library for piece, _ in pieces]
    return [
        Item(piece, cloud, kind, group, is_validation)
        for (piece, cloud), kind, group, is_validation in zip(pieces, kinds, groups, held_out, strict=True)
    ]


def write_release(items: list[Item], output: Path, seed: int) -> dict[str, int]:
    """Write clouds, annotations and metadata.

    Returns:
        Number of records of each annotation file.
    """
    for folder in ("clouds", "validation"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    records = {source: [] for source in SOURCES.values()}
    for item in tqdm(items, desc="annotations", unit=""):
        if item.is_validation:
            np.save(point_cloud_path(output / "validation", item.piece.object_id), item.cloud)
            continue
        rng = np.random.default_rng([seed, *item.piece.object_id.encode()])
        for object_id, cloud in recolored_copies(item, rng).items():
            np.save(point_cloud_path(output / "clouds", object_id), cloud)
            for record in annotate_item(object_id, item, cloud, rng):
                records[SOURCES[record["conversation_type"]]].append(record)
    for source, content in records.items():
        write_json(output / f"{source}.json", content)
    lines = [json.dumps(describe(item), ensure_ascii=False) + "\n" for item in items]
    write_text(output / "metadata.jsonl", "".join(lines))
    return {source: len(content) for source, content in records.items()}


def recolored_copies(item: Item, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The cloud and copies of it in other colors, part by part, by object id."""
    clouds = {item.piece.object_id: item.cloud}
    coord, color = item.cloud[:, :3], torch.from_numpy(item.cloud[None, :, 3:])
    for number in range(RECOLORED_PER_OBJECT[item.kind is not None]):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        new_color = recolor(color, torch.tensor([True]), generator)[0].numpy()
        cloud = np.concatenate([coord, new_color], axis=1).astype(np.float32)
        clouds[f"{item.piece.object_id}-r{number + 1}"] = cloud
    return clouds


def annotate_item(object_id: str, item: Item, cloud: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """Records about a cloud; every second one for objects of no known kind."""
    facts = get_facts(item.piece.name, item.piece.category, cloud)
    records = annotate(object_id, facts, BRIEF_PER_OBJECT[item.kind is not None], rng)
    return records if item.kind is not None else records[::2]


def describe(item: Item) -> dict:
    """A line of metadata.jsonl."""
    piece = item.piece
    return {
        "object_id": piece.object_id,
        "name": piece.name,
        "kind": item.kind,
        "main_color": main_color(item.cloud[:, 3:]),
        "category": piece.category,
        "size_cm": list(piece.size),
        "creator": piece.creator,
        "license": piece.license,
        "library": piece.library,
        "group": item.group,
        "split": "validation" if item.is_validation else "train",
    }


def count_items(items: list[Item]) -> dict:
    """The counts of counts.json."""
    train = Counter(item.kind for item in items if not item.is_validation)
    validation = Counter(item.kind for item in items if item.is_validation)
    return {
        "objects": len(items),
        "train": train.total(),
        "validation": validation.total(),
        "scored_validation": validation.total() - validation[None],
        "kinds": {kind: [train[kind], validation[kind]] for kind in sorted({*train, *validation} - {None})},
    }


def read_metadata(data_dir: Path) -> list[dict]:
    """The lines of a release's metadata.jsonl."""
    return read_json_lines(Path(data_dir) / "metadata.jsonl")
