"""What the page does with a large mesh: CPU seconds and memory for the model's cloud and for the surface that the browser gets.

The mesh is a bumpy sphere with a color at every vertex, in a GLB of about 100 MB.

    python benchmarks/large_mesh.py
"""

import argparse
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import trimesh

from minigpt3d.data.reading import LIMITS, FileReader, FileResult
from minigpt3d.page.surface import MAX_FACES, write_surface
from minigpt3d.point_cloud_minigpt3d import load_point_cloud


def write_mesh(path: Path, num_rings: int) -> int:
    """A sphere of `num_rings` rings with twice as many vertices each; returns the number of its faces."""
    theta, phi = np.meshgrid(np.linspace(0.01, np.pi - 0.01, num_rings), np.linspace(0, 2 * np.pi, 2 * num_rings))
    radius = 1 + 0.05 * np.sin(20 * theta) * np.sin(20 * phi)
    xyz = radius[..., None] * np.stack(
        [np.sin(theta) * np.cos(phi), np.cos(theta), np.sin(theta) * np.sin(phi)], axis=-1
    )
    corner = np.arange(theta.size).reshape(theta.shape)
    a, b, c, d = (part.ravel() for part in (corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    colors = np.rint(255 * (xyz.reshape(-1, 3) / 2.2 + 0.5)).astype(np.uint8)
    trimesh.Trimesh(xyz.reshape(-1, 3), faces, vertex_colors=colors, process=False).export(path)
    return len(faces)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, default=1250, help="the mesh has about four times their square of faces")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mesh, surface = Path(folder) / "mesh.glb", Path(folder) / "surface.glb"
        num_faces = write_mesh(mesh, arguments.rings)
        cloud, cloud_seconds = read(load_point_cloud, mesh)
        shown, shown_seconds = read(write_surface, mesh, target=surface, missing_color="black")
        print(f"mesh: {mesh.stat().st_size / 1e6:.0f} MB, {num_faces:,} faces")
        print(f"cloud: {cloud_seconds:.1f} CPU seconds, {cloud.memory / 1e9:.2f} GB of memory")
        print(f"surface: {shown_seconds:.1f} CPU seconds, {shown.memory / 1e9:.2f} GB of memory")
        print(f"surface: {surface.stat().st_size / 1e6:.0f} MB, at most {MAX_FACES:,} faces")


def read(function: Callable, path: Path, **arguments) -> tuple[FileResult, float]:
    """What came of the file, and CPU seconds of the process that read it, with its start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with FileReader(function, limits=LIMITS._replace(seconds=3600)) as reader:  # a busy machine may take long
        (result,) = reader.read_files([path], **arguments)
    if result.error is not None:
        raise result.error
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
