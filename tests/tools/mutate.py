"""Damage files and read them: each outcome must be a cloud or a `PointCloudError`, quickly and in little memory.

    python tests/tools/mutate.py [SEED...] [--number 150] [--keep FOLDER]

Prints a table with a row for each seed file, and exits with 1 if a mutation of it makes the reader end its process, raise
another exception, or take more than `MAX_SECONDS` or `MAX_MEMORY`. The same seeds and numbers give the same mutations.
"""

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mutate as this_module  # by the name that the reading process can import
import numpy as np
from tqdm import tqdm

from minigpt3d.data.reading import CrashError, FileReader, FileResult, Limits
from minigpt3d.point_cloud_minigpt3d import PointCloudError, is_readable, load_point_cloud


MAX_SECONDS, MAX_MEMORY = 10, 2 * 1000**3
# Above the maxima, so that what exceeds them is measured.
LIMITS = Limits(seconds=2 * MAX_SECONDS, memory=4 * 1024**3)
CASES = Path(__file__).parents[1] / "cases"
# One file for each way to store points or surfaces.
SEEDS = (
    "3mf_texture2d.3mf csv_points0_header.csv g_external_percent20.gltf g_sparse.glb g_texture.glb las_16bit.las "
    "mply_tex_wedge_space_name.ply mply_vcol.ply npy_xyzrgb255.npy npz_points_colors.npz obj_map.obj off_coff.off "
    "pcd_rgb_float_bin.pcd pcd_rgb_float_ascii.pcd ply_le.ply s3dis_xyzrgb.txt stl_ascii.stl stl_magics_color.stl"
).split()
HEADER_BYTES = 4096
EXTREME_NUMBERS = (0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 10**9, 10**30, -1, -(2**31))


# ---- Mutations ------------------------------------------------------------------------------------------------------


def flip_bytes(content: bytearray, rng: np.random.Generator) -> bytearray:
    count = 2 ** int(rng.integers(0, 5))
    # Half of them in the header, where they matter more.
    end = min(len(content), HEADER_BYTES // 8) if rng.random() < 0.5 else len(content)
    for place in rng.integers(0, end, count):
        content[place] = rng.integers(0, 256)
    return content


def truncate(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: rng.integers(1, len(content))]


def change_text_number(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Replace a number that is written out, as in headers, JSON and XML."""
    if content.startswith(b"glTF") and rng.random() < 0.9:
        return change_gltf_number(content, rng)
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content[:HEADER_BYTES]))
    if not numbers:
        return change_binary_number(content, rng)
    number = numbers[rng.integers(len(numbers))]
    value = str(EXTREME_NUMBERS[rng.integers(len(EXTREME_NUMBERS))]).encode()
    return content[: number.start()] + value + content[number.end() :]


def change_gltf_number(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Replace a number in the JSON of a .glb, and state the lengths that it then has."""
    end = 20 + int.from_bytes(content[12:16], "little")
    text = change_text_number(content[20:end], rng)
    text += b" " * (-len(text) % 4)
    body = len(text).to_bytes(4, "little") + content[16:20] + text + content[end:]
    return content[:8] + (12 + len(body)).to_bytes(4, "little") + body


def change_binary_number(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Overwrite bytes at the beginning as a count or an offset."""
    size = int(rng.choice([2, 4, 8]))
    value = EXTREME_NUMBERS[rng.integers(len(EXTREME_NUMBERS))] % 256**size
    start = int(rng.integers(0, max(1, min(len(content), 512) - size)))
    content[start : start + size] = value.to_bytes(size, "little")
    return content


def repeat_block(content: bytearray, rng: np.random.Generator) -> bytearray:
    start, end = sorted(rng.integers(0, len(content), 2))
    return content[:end] + content[start:end] * int(rng.integers(1, 4)) + content[end:]


def remove_block(content: bytearray, rng: np.random.Generator) -> bytearray:
    start, end = sorted(rng.integers(0, len(content), 2))
    return content[:start] + content[end:] or content


def mutate_member(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Mutate a file in a zip archive, whose checksums stay right; of other files, change a number."""
    output = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as source:
            members = {name: bytearray(source.read(name)) for name in source.namelist()}
    except Exception:  # it is no archive, or not any more
        return change_text_number(content, rng)
    chosen = list(members)[rng.integers(len(members))]
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as target:
        for name, member in members.items():
            target.writestr(name, bytes(mutate(member, rng, MUTATIONS[:-1]) if name == chosen and member else member))
    return bytearray(output.getvalue())


MUTATIONS = (
    flip_bytes,
    truncate,
    change_text_number,
    change_binary_number,
    repeat_block,
    remove_block,
    mutate_member,
)


def mutate(content: bytearray, rng: np.random.Generator, mutations=MUTATIONS) -> bytearray:
    """Content with one mutation, a quarter of the time with two."""
    for _ in range(1 + (rng.random() < 0.25)):
        content = mutations[rng.integers(len(mutations))](content, rng) or content
    return content


def write_mutations(seed: Path, number: int, folder: Path) -> Iterator[Path]:
    """Mutated files, beside copies of the materials, textures and buffers that are beside the seed."""
    content = seed.read_bytes()
    for sibling in seed.parent.iterdir():
        if sibling.is_file() and not is_readable(sibling):
            shutil.copy(sibling, folder)
    for index in range(number):
        path = folder / f"{seed.stem}.{index:04d}{seed.suffix}"
        rng = np.random.default_rng([zlib.crc32(seed.name.encode()), index])
        path.write_bytes(mutate(bytearray(content), rng))
        yield path


# ---- Outcomes -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What became of a seed's mutations."""

    seed: str
    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, result: FileResult):
        outcome, detail = judge(result)
        self.outcomes[outcome] += 1
        if outcome not in ("cloud", "refused"):
            self.bad.append(f"{result.path.name}: {outcome}: {detail}")
        if result.seconds > MAX_SECONDS:
            self.bad.append(f"{result.path.name}: {result.seconds:.1f} s")
        if max(result.memory, MAX_MEMORY) > max(self.memory, MAX_MEMORY):
            self.bad.append(f"{result.path.name}: {result.memory / 1e6:,.0f} MB")
        self.seconds, self.memory = max(self.seconds, result.seconds), max(self.memory, result.memory)


def read(path: Path) -> tuple[str, str]:
    """Outcome of a file, in the reading process: "cloud", "refused" or "error", and a detail."""
    try:
        cloud = load_point_cloud(path, 1024)
    except PointCloudError as error:
        return ("refused" if str(error).startswith(f"{path}: ") else "unnamed"), str(error)
    except MemoryError:
        raise
    except BaseException as error:
        return "error", f"{type(error).__name__}: {error}"
    good = cloud.shape == (1024, 6) and np.isfinite(cloud).all() and 0 <= cloud[:, 3:].min() <= cloud[:, 3:].max() <= 1
    return ("cloud" if good else "bad cloud"), ""


def judge(result: FileResult) -> tuple[str, str]:
    if isinstance(result.error, CrashError):
        return "abort", str(result.error)
    return ("error", str(result.error)) if result.error is not None else result.content


def try_seed(seed: Path, number: int, num_processes: int, keep: Path | None) -> Row:
    """Read the mutations of a seed, in processes of their own, whose memory is thus this seed's."""
    row = Row(seed.name)
    if (outcome := read(seed))[0] != "cloud":
        sys.exit(f"mutate: a seed must be readable: {outcome[1]}")
    with tempfile.TemporaryDirectory() as folder:
        paths = list(write_mutations(seed, number, Path(folder)))
        with FileReader(this_module.read, num_processes, LIMITS) as reader:
            for result in reader.read_files(paths):
                known = len(row.bad)
                row.add(result)
                if keep is not None and len(row.bad) > known:
                    shutil.copy(result.path, keep)
    return row


def table(rows: list[Row]) -> str:
    lines = ["| seed | clouds | refused | slowest | memory | aborts | other |", "|-|-|-|-|-|-|-|"]
    total = Row("total", sum((row.outcomes for row in rows), Counter()))
    total.seconds, total.memory = max(row.seconds for row in rows), max(row.memory for row in rows)
    for row in [*rows, total]:
        cells = [row.outcomes[name] for name in ("cloud", "refused", "abort")]
        other = row.outcomes.total() - sum(cells)
        numbers = f"{cells[0]} | {cells[1]} | {row.seconds:.1f} s | {row.memory / 1e6:,.0f} MB | {cells[2]} | {other}"
        lines.append(f"| {row.seed} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=Path, help="files to damage (default: 18 of tests/cases)")
    parser.add_argument("--number", type=int, default=150, help="mutations of each (default: 150)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="folder for the mutations that fail")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    seeds = options.seeds or [CASES / name for name in SEEDS]
    rows = [
        try_seed(seed, options.number, options.processes, options.keep)
        for seed in tqdm(seeds, unit="seed", disable=None)
    ]
    print(table(rows))
    bad = [line for row in rows for line in row.bad]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
