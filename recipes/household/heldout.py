"""Write the held-out objects of a release as one small file, such as evaluation/household.parquet.

A row for each validation object of a known kind: the cloud as `data.clouds.encode_cloud` packs it, its name, kind, color and
caption, and its creator and license. `evaluation/household.parquet` is a copy of the recipe's `WORK_DIR/heldout.parquet`.
"""

from pathlib import Path

import numpy as np

from minigpt3d.data.clouds import encode_cloud, point_cloud_path
from minigpt3d.files import written_file

from .build_data import read_metadata
from .captions import detailed, get_facts


def write_heldout(data_dir: Path, path: Path) -> int:
    """Write the file; returns the number of objects.

    Raises:
        ValueError: the release has no validation objects of a known kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for facts in read_metadata(data_dir):
        if facts["split"] != "validation" or not facts["kind"]:
            continue
        cloud = np.load(point_cloud_path(data_dir / "validation", facts["object_id"]))
        coord, rgb = encode_cloud(cloud)
        rng = np.random.default_rng(list(facts["object_id"].encode()))
        caption = detailed(get_facts(facts["name"], facts["category"], cloud), rng)
        names = ("object_id", "name", "kind", "main_color", "creator", "license", "library")
        rows.append({name: facts[name] for name in names} | {"caption": caption, "coord": coord, "rgb": rgb})
    if not rows:
        raise ValueError(
            f"{data_dir} holds no validation objects of a known kind. Build it with more libraries, or with "
            "`held_out_library` for a library of which every object is held out."
        )
    with written_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd", compression_level=19)
    return len(rows)
