"""`make demo`: describe three real objects with the bundled model, and draw each cloud beside the answers.

The objects are in demo/objects, the model is in checkpoints/household; the pictures go to demo/pictures.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np

from minigpt3d import PointCloudToTextPipeline, load_point_cloud
from minigpt3d.hub import BUNDLED_MODEL, load_model


try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit('demo: matplotlib is not installed, and the pictures need it: pip install "minigpt3d[demo]"')


ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".obj", ".glb", ".ply", ".npy")
QUESTIONS = ("What is this?", "What color is it?", "Caption this 3D model in detail.")


def ask(describe: PointCloudToTextPipeline, cloud: np.ndarray) -> list[tuple[str, str]]:
    """Each of `QUESTIONS` with its answer, about one cloud (N, 6), y up."""
    return [
        (question, describe(cloud, prompt=question, up_axis="y", clean="none")[0]["generated_text"])
        for question in QUESTIONS
    ]


def draw(cloud: np.ndarray, title: str, answers: list[tuple[str, str]], path: Path):
    """Write a picture: the cloud (N, 6), y up, in its colors, and to its right the questions and answers."""
    figure = Figure(figsize=(8, 4), facecolor="#eeeeee")
    axes = figure.add_axes((0.0, 0.0, 0.5, 1.0), projection="3d", facecolor="none")
    x, y, z = cloud[:, :3].T
    axes.scatter(x, -z, y, c=cloud[:, 3:], s=2, linewidths=0, depthshade=False)
    axes.set_box_aspect([np.ptp(x), np.ptp(z), np.ptp(y)], zoom=1.2)
    axes.set_axis_off()
    axes.view_init(elev=20, azim=-60)
    lines = [title, ""]
    for question, answer in answers:
        lines += [*textwrap.wrap(f"› {question}", 46), *textwrap.wrap(answer, 46), ""]
    figure.text(0.52, 0.5, "\n".join(lines), va="center", fontsize=9, family="monospace", parse_math=False)
    figure.savefig(
        path, dpi=100, metadata={"Software": None}
    )  # no version, so that the same answers give the same file


def main():
    parser = argparse.ArgumentParser(description="Describe the objects of demo/objects and draw them.")
    parser.add_argument("--model", default=BUNDLED_MODEL, type=Path, help="folder of a model")
    parser.add_argument("--objects", default=ROOT / "demo" / "objects", type=Path, help="folder of objects")
    parser.add_argument("--pictures", default=ROOT / "demo" / "pictures", type=Path, help="folder to write")
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        sys.exit(f"demo: there is no model in {args.model}. Check it out, or rebuild it: make household LIBRARIES=…")
    objects = sorted(path for path in args.objects.rglob("*") if path.suffix in SUFFIXES)
    if not objects:
        sys.exit(f"demo: there are no objects in {args.objects}; expected files ending in {', '.join(SUFFIXES)}.")
    try:
        model, processor = load_model(args.model)
    except ValueError as error:
        sys.exit(f"demo: {error}")
    describe = PointCloudToTextPipeline(model=model, processor=processor)
    args.pictures.mkdir(parents=True, exist_ok=True)
    for path in objects:
        cloud = describe.read_point_cloud(path)  # (N, 6)
        answers = ask(describe, cloud)
        picture = args.pictures / f"{path.stem}.png"
        draw(load_point_cloud(path), path.name, answers, picture)
        print(path.name)
        for question, answer in answers:
            print(f"  {question}\n    {answer}")
        print(f"  picture: {picture.relative_to(Path.cwd()) if picture.is_relative_to(Path.cwd()) else picture}\n")


if __name__ == "__main__":
    main()
