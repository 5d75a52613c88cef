"""Time reading a scan: a file of N points to the model's 8192, by format.

python benchmarks/read.py --points 10000000
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import laspy
import numpy as np
from plyfile import PlyData, PlyElement

from minigpt3d.arguments import positive_int
from minigpt3d.point_cloud_minigpt3d import load_point_cloud


def write_ply(path: Path, points: np.ndarray):
    types = [(name, "f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    table = np.empty(len(points), dtype=types)
    for index, (name, kind) in enumerate(types):
        table[name] = points[:, index] * (255 if kind == "u1" else 1)
    PlyData([PlyElement.describe(table, "vertex")]).write(path)


def write_las(path: Path, points: np.ndarray):
    header = laspy.LasHeader(point_format=2, version="1.2")
    header.scales = [1e-4] * 3
    las = laspy.LasData(header)
    las.x, las.y, las.z = points[:, :3].T
    las.red, las.green, las.blue = (points[:, 3:].T * 65535).astype(np.uint16)
    las.write(path)


WRITERS = {".npy": np.save, ".ply": write_ply, ".las": write_las, ".laz": write_las}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--points", type=positive_int, default=10_000_000, help="points in each file (default: 10,000,000)"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=3,
        help="readings of each file; the table has their median (default: 3)",
    )
    args = parser.parse_args()
    points = np.random.default_rng(0).random((args.points, 6), dtype=np.float32)
    print(f"{args.points:,} colored points to 8192\n\n| format | MB | seconds |\n|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix, write in WRITERS.items():
            path = Path(folder) / f"scan{suffix}"
            write(path, points)
            seconds = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                load_point_cloud(path)
                seconds.append(time.perf_counter() - start)
            print(f"| {suffix} | {path.stat().st_size / 1e6:.0f} | {statistics.median(seconds):.1f} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
