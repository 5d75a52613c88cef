"""The model card of the household recipe: its texts and counts, and the creators of its data."""

import shutil
from collections import defaultdict
from pathlib import Path

from minigpt3d.files import read_json, write_json, write_text
from minigpt3d.hub import fingerprint_model
from minigpt3d.model_card.readme import write_card

from .build_data import read_metadata


# The texts hold no numbers: those are in `counts`, `minutes` and `figures`, from which the card cites them.
TEXTS = {
    "title": "MiniGPT-3D, household",
    "license": "apache-2.0",
    "about": "A small MiniGPT-3D that describes household objects: what they are, their color and their use. It shows that "
    "the complete recipe works on two CPU cores. It does not know other objects.",
    "data": "Objects of {libraries}, furniture libraries of Sweet Home 3D, sampled to colored points. Objects are held out by "
    "name and by base model. `CREATORS.md` names the creator and license of every object. Captions and questions are "
    "generated from name, category, size and colors of the points by `recipes/household/captions.py`.",
    "training": '`make household LIBRARIES="…"` runs the recipe. It first trains what the paper takes ready-made '
    "(`recipes/household/pretrain.py`): a byte-level tokenizer and a language model on the captions alone, then the 3D encoder "
    "and the Q-Former by classifying kind, noun, category and colors of real and generated objects. Stages I to IV of the "
    "paper follow, by `training/stage1.py` to `stage4.py --recipe household`.",
    "scores": "Command: `minigpt3d evaluate household --model checkpoints/household --greedy --out report`.",
    "limits": [
        "It knows the kinds of objects in `evaluation/vocabulary/kinds.py` as furniture libraries draw them, from few objects of "
        "each kind.",
        "The held-out objects were used a few times to choose the recipe: results on other objects may be slightly lower.",
    ],
    "licenses": [
        {"component": "weights, trained from random ones", "by": "the contributors", "license": "Apache-2.0"},
        {
            "component": "3D objects of the training (not in this folder)",
            "by": "named in `CREATORS.md`",
            "license": "CC0 or CC BY 3.0, item by item",
        },
    ],
}
# Files of an evaluation that are not part of its report.
WORKING_FILES = ("answers", "likelihood", "judge", "objects.jsonl", "settings.json", "history.json")
# Pieces whose own license file differs from the license of their library.
PIECE_LICENSES = {
    "blendswap-cc-0-winchesterarmchair": "CC-BY 3.0 by its own license file",
    "blendswap-cc-0-winchestersofa": "CC-BY 3.0 by its own license file",
}


def write_model_card(folder: Path, data_dir: Path, scores: dict, report_dir: Path, minutes: dict, pretraining: dict):
    """Write recipe.json, scores.json, CREATORS.md, evaluation/ and the card, README.md, into the checkpoint's folder.

    Args:
        folder: of the checkpoint.
        data_dir: the release that it was trained on.
        scores: of `evaluate_models`.
        report_dir: folder of its evaluation.
        minutes: by step.
        pretraining: what `pretrain` returned.
    """
    counts = read_json(data_dir / "counts.json")
    write_json(folder / "recipe.json", describe_recipe(counts, minutes, pretraining))
    write_json(folder / "scores.json", scores)
    write_text(folder / "CREATORS.md", creators(data_dir))
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    shutil.copytree(report_dir, folder / "evaluation", ignore=shutil.ignore_patterns(*WORKING_FILES))
    write_card(folder, [folder / "evaluation"], fingerprint=fingerprint_model(folder))


def describe_recipe(counts: dict, minutes: dict, pretraining: dict) -> dict:
    """The content of recipe.json, from counts.json of the data release, minutes by step, and what `pretrain` returned."""
    libraries = ", ".join(f"`{name}`" for name in counts["libraries"])
    return TEXTS | {
        "data": TEXTS["data"].format(libraries=libraries),
        "counts": {
            "libraries": len(counts["libraries"]),
            "objects": counts["objects"],
            "training objects": counts["train"],
            "held-out objects": counts["validation"],
            "held-out objects of a known kind, which are scored": counts["scored_validation"],
            "known kinds": len(counts["kinds"]),
        },
        "minutes": minutes,
        "figures": {
            key.replace("_", " "): value for key, value in pretraining.items() if key.endswith(("kind", "color"))
        },
    }


def creators(data_dir: Path) -> str:
    """Creators and licenses of all objects as Markdown, library by library."""
    libraries: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    licenses = {}
    for row in read_metadata(data_dir):
        license_of_piece = PIECE_LICENSES.get(row["object_id"])
        name = f"{row['name']} ({license_of_piece})" if license_of_piece else row["name"]
        libraries[row["library"]][row["creator"]].append(name)
        licenses[row["library"]] = row["license"]
    lines = ["# Creators of the objects that this model was trained and scored on", ""]
    for library, by_creator in sorted(libraries.items()):
        lines += [f"## {library}", "", f"License: {licenses[library]}", ""]
        lines += [f"- {creator}: {', '.join(sorted(names))}" for creator, names in sorted(by_creator.items())]
        lines.append("")
    return "\n".join(lines)
