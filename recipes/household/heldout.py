"""The held-out objects of a release as one small file, which `minigpt3d evaluate household` reads.

    python -m minigpt3d.recipes.household.heldout --data build/household/data --output evaluation/household.parquet

A row for each validation object of a known kind: the cloud as `data.clouds.encode_cloud` packs it, what is true of it,
and who made it under which licence.
"""

import argparse
from pathlib import Path

import numpy as np

from minigpt3d.data.clouds import encode_cloud

from .build_data import NUM_POINTS, read_metadata, write_atomically
from .captions import detailed, get_facts


def write_heldout(data_dir: Path, path: Path) -> int:
    """Write the file; returns the number of objects.

    Raises:
        ValueError: the release has none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for facts in read_metadata(data_dir):
        if facts["split"] != "validation" or not facts["kind"]:
            continue
        cloud = np.load(data_dir / "validation" / f"{facts['object_id']}_{NUM_POINTS}.npy")
        coord, rgb = encode_cloud(cloud)
        rng = np.random.default_rng(list(facts["object_id"].encode()))
        caption = detailed(get_facts(facts["name"], facts["category"], cloud), rng)
        kept = ("object_id", "name", "kind", "main_color", "creator", "license", "library")
        rows.append({name: facts[name] for name in kept} | {"caption": caption, "coord": coord, "rgb": rgb})
    if not rows:
        raise ValueError(
            f"{data_dir} holds no validation objects of a known kind. Build it with more libraries, or with "
            "--held_out_library for a library of which every object is held out."
        )
    table = pa.Table.from_pylist(rows)
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd", compression_level=19))
    return len(rows)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data wrote")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    print(f"{args.output}: {write_heldout(args.data, args.output)} objects")


if __name__ == "__main__":
    main()
