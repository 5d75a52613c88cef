"""Furniture libraries → a data release in PointLLM's layout: coloured clouds and what is said about them.

    python -m minigpt3d.recipes.household.build_data --libraries A.sh3f B.sh3f --output DIR

Writes into DIR, all of it a function of the libraries and the seed:

    clouds/{object_id}_8192.npy     training objects, and recoloured twins of them ({object_id}-r1, …)
    validation/{object_id}_8192.npy objects whose names and base models no training object has
    brief.json detailed.json single_round.json multi_round.json    annotations of the training objects
    metadata.jsonl                  one line per object: name, kind, main colour, size, creator, licence, split, …
    report.json                     counts, and the models that could not be read

Clouds are read by `load_point_cloud`, as in inference, and turned as the catalogue says; y is up.
"""

import argparse
import json
import os
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

from minigpt3d.evaluation.vocabulary.colors import main_color
from minigpt3d.evaluation.vocabulary.kinds import kind_of
from minigpt3d.point_cloud_minigpt3d import load_point_cloud

from .captions import annotate, get_facts
from .library import FurnitureLibrary, Piece
from .split import choose_validation, group_objects
from .views import recolor


NUM_POINTS = 8192
SOURCES = {
    "simple_description": "brief",
    "detailed_description": "detailed",
    "single_round": "single_round",
    "multi_round": "multi_round",
}
# Half of all objects are of no kind of the table: the named ones are shown more often, and twice as much is said of them.
BRIEF_PER_OBJECT = {True: 6, False: 1}
RECOLORED_PER_OBJECT = {True: 2, False: 0}


@dataclass(frozen=True)
class Task:
    """A piece of one library, to be read in another process."""

    library: Path
    piece: Piece


def read_piece(task: Task) -> tuple[np.ndarray | None, str]:
    """The cloud of a piece, (8192, 6) float32 normalised, or None and what is wrong with its model."""
    torch.set_num_threads(1)
    temporary = str(task.library)
    try:
        with (
            FurnitureLibrary(task.library) as library,
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            temporary = folder
            cloud = load_point_cloud(library.extract(task.piece, folder), num_points=NUM_POINTS)
    except Exception as error:  # whatever a reader stumbles over in somebody's model must not end the build
        # The temporary folder has another name each time; what is reported must not.
        return None, f"{type(error).__name__}: {error}".replace(temporary, task.piece.library)
    cloud[:, :3] = cloud[:, :3] @ task.piece.rotation.T.astype(np.float32)
    return cloud, ""


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary binary file beside `path`, then rename it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def write_json(path: Path, content) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, ensure_ascii=False, indent=1).encode()))


def read_metadata(data_dir: Path) -> list[dict]:
    """What a release knows of each of its objects."""
    lines = (Path(data_dir) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def recolored(cloud: np.ndarray, seed: int) -> np.ndarray:
    """The same shape in other colours, part by part."""
    generator = torch.Generator().manual_seed(seed)
    color = recolor(torch.from_numpy(cloud[None, :, 3:]), torch.tensor([True]), generator)[0].numpy()
    return np.concatenate([cloud[:, :3], color], axis=1).astype(np.float32)


def read_tasks(libraries: Iterable[Path]) -> list[Task]:
    """Every piece of the libraries, in their order.

    Raises:
        ValueError: no library is given, one is unreadable, or two pieces share an id (a library given twice).
    """
    tasks = []
    for path in libraries:
        with FurnitureLibrary(path) as library:
            tasks += [Task(Path(path), piece) for piece in library.pieces()]
    repeated = [object_id for object_id, count in Counter(t.piece.object_id for t in tasks).items() if count > 1]
    if not tasks or repeated:
        problem = f"the id {repeated[0]!r} is used twice" if repeated else "they hold no pieces"
        raise ValueError(f"--libraries: {problem}. Give each .sh3f file once.")
    return tasks


def build(
    libraries: list[Path], output: Path, held_out_library: str | None = None, seed: int = 0, num_workers: int = 2
) -> dict:
    """Build the release; returns the report.

    Args:
        libraries: `.sh3f` files.
        output: folder to write to.
        held_out_library: stem of a library whose objects are all for validation, while all others train: how well a
            model does on a library that it never saw.
        seed: of wording and recolouring.
        num_workers: processes that read models.
    """
    tasks = read_tasks(libraries)
    stems = {task.piece.library for task in tasks}
    if held_out_library is not None and held_out_library not in stems:
        raise ValueError(f"--held_out_library must be one of {', '.join(sorted(stems))}, got {held_out_library!r}.")
    with ProcessPoolExecutor(num_workers) as pool:
        results = list(tqdm(pool.map(read_piece, tasks, chunksize=4), total=len(tasks), desc="models", unit=""))
    broken = {task.piece.object_id: error for task, (cloud, error) in zip(tasks, results, strict=True) if error}
    pieces = [task.piece for task, (cloud, _) in zip(tasks, results, strict=True) if cloud is not None]
    clouds = [cloud for cloud, _ in results if cloud is not None]
    if not pieces:
        raise ValueError(
            f"none of the {len(tasks)} models can be read; the first error: {next(iter(broken.values()))}"
        )

    names = [piece.name for piece in pieces]
    kinds = [(kind_of(name) or (None,))[0] for name in names]
    if held_out_library is None:
        groups = group_objects(names, kinds, [cloud[:, :3] for cloud in clouds])
        held_out = choose_validation(names, kinds, groups)
    else:
        groups = list(range(len(pieces)))
        held_out = [piece.library == held_out_library for piece in pieces]

    records, metadata = {source: [] for source in SOURCES.values()}, []
    for folder in ("clouds", "validation"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for index, (piece, cloud, kind) in enumerate(
        zip(tqdm(pieces, desc="annotations", unit=""), clouds, kinds, strict=True)
    ):
        validation = held_out[index]
        rng = np.random.default_rng([seed, *piece.object_id.encode()])
        copies = {piece.object_id: cloud}
        if not validation:
            for copy in range(RECOLORED_PER_OBJECT[kind is not None]):
                copies[f"{piece.object_id}-r{copy + 1}"] = recolored(cloud, int(rng.integers(2**31)))
        for object_id, copied in copies.items():
            path = output / ("validation" if validation else "clouds") / f"{object_id}_{NUM_POINTS}.npy"
            write_atomically(path, lambda file, copied=copied: np.save(file, copied))
            if not validation:
                facts = get_facts(piece.name, piece.category, copied)
                said = annotate(object_id, facts, BRIEF_PER_OBJECT[kind is not None], rng)
                for record in said if kind is not None else said[::2]:
                    records[SOURCES[record["conversation_type"]]].append(record)
        metadata.append(
            {
                "object_id": piece.object_id,
                "name": piece.name,
                "kind": kind,
                "main_color": main_color(cloud[:, 3:]),
                "category": piece.category,
                "size_cm": list(piece.size),
                "creator": piece.creator,
                "license": piece.license,
                "library": piece.library,
                "group": groups[index],
                "split": "validation" if validation else "train",
            }
        )
    for source, content in records.items():
        write_json(output / f"{source}.json", content)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in metadata)
    write_atomically(output / "metadata.jsonl", lambda file: file.write(lines.encode()))
    report = {
        "libraries": [Path(path).name for path in libraries],
        "held_out_library": held_out_library,
        "objects": len(pieces),
        "train": held_out.count(False),
        "validation": held_out.count(True),
        "scored_validation": sum(out and kind is not None for out, kind in zip(held_out, kinds, strict=True)),
        "kinds": {
            kind: [
                sum(k == kind and not out for k, out in zip(kinds, held_out, strict=True)),
                sum(k == kind and out for k, out in zip(kinds, held_out, strict=True)),
            ]
            for kind in sorted(set(filter(None, kinds)))
        },
        "records": {source: len(content) for source, content in records.items()},
        "broken": broken,
    }
    write_json(output / "report.json", report)
    return report


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=Path, nargs="+", required=True, help="Sweet Home 3D libraries, .sh3f")
    parser.add_argument("--output", type=Path, required=True, help="folder for the release")
    parser.add_argument("--held_out_library", help="stem of a library that is all validation")
    parser.add_argument("--seed", type=int, default=0, help="of wording and recolouring")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read models")
    args = parser.parse_args(argv)
    report = build(args.libraries, args.output, args.held_out_library, args.seed, args.num_workers)
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
