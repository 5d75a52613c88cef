"""Groups of packed clouds: found once, when the data are packed, instead of in every step of training.

Apart from `clouds`, because grouping needs torch, which the other ways to read a cloud do without.
"""

from pathlib import Path

import torch

from minigpt3d.grouping_minigpt3d import find_groups
from minigpt3d.hub import find_model, load_processor
from minigpt3d.messages import one_line

from .clouds import Grouping, choose_points, decode_cloud, load_encoded


def grouping_of(name: str | Path) -> Grouping:
    """How a model, a folder or Hub id, groups clouds. Its weights are not loaded.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig  # imports transformers, which packing does not need

    files = find_model(name)
    options = {"local_files_only": files.offline}
    try:
        config = MiniGPT3DConfig.from_pretrained(files.base, **options)
    except Exception as error:
        raise ValueError(f"cannot read the configuration of {files.base}: {one_line(error)}") from error
    return Grouping.of(config, load_processor(files))


def load_grouped(
    path: str | Path, num_points: int, grouping: Grouping, **reading
) -> tuple[bytes, bytes, float, bytes]:
    """As `load_encoded`, and the groups of what `decode_cloud` gives: (G, 1+K) int16, center first."""
    coord, color, error = load_encoded(path, num_points, **reading)
    cloud = choose_points(decode_cloud(coord, color), grouping.num_points, grouping.seed)
    centers, neighbors = find_groups(torch.from_numpy(cloud[None, :, :3]), grouping.num_groups, grouping.group_size)
    groups = torch.cat([centers[..., None], neighbors], dim=-1)[0]  # (G, 1+K)
    return coord, color, error, groups.numpy().astype("<i2").tobytes()
