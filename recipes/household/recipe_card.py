"""The household recipe in its own words and numbers, for the model card, and the creators of its data."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

from minigpt3d.hub import fingerprint_model
from minigpt3d.model_card import write_card

from .build_data import read_metadata


# Without numbers, which stand in `counts`, `minutes` and `figures`: from there the card takes them with their place.
TEXTS = {
    "title": "MiniGPT-3D, household",
    "license": "apache-2.0",
    "about": "A small MiniGPT-3D that says what a piece of furniture is, which color it has and what it is for. It shows that "
    "the whole recipe works on two CPU cores; it knows the things of a household and nothing else.",
    "data": "Furniture of {libraries}, libraries of Sweet Home 3D, sampled to colored points. Objects are held out by name "
    "and by base model. `CREATORS.md` names every object's creator and license. Captions and questions are made from name, "
    "category, size and the colors of the points, by `training/household/captions.py`.",
    "training": '`make household LIBRARIES="…"` rebuilds it. What the paper takes ready-made is trained first: a byte-level '
    "tokenizer and a language model on the captions alone, then the 3D encoder together with the Q-Former, by telling kind, "
    "noun, category and colors of real and of made-up objects (`training/household/pretrain.py`). Then come stages I to IV "
    "of the paper, by `training/stage1.py` to `stage4.py --recipe household`.",
    "scores": "`minigpt3d evaluate household --model checkpoints/household --greedy --out report` gives the numbers of this "
    "folder again.",
    "limits": [
        "It knows the kinds of things in `training/household/kinds.py`, as furniture libraries draw them, and few of each.",
        "The recipe was chosen by looking at the held-out objects a few times, so expect a little less on others.",
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


def write_model_card(folder: Path, data_dir: Path, scores: dict, report_dir: Path, times: dict, pretraining: dict):
    """Write recipe.json, scores.json, CREATORS.md, evaluation/ and the card, README.md, into the checkpoint's folder.

    Args:
        folder: of the checkpoint.
        data_dir: the release that it was trained on.
        scores: of `evaluate_models`.
        report_dir: its evaluation.
        times: minutes by step.
        pretraining: what `pretrain` returned.
    """
    report = json.loads((data_dir / "report.json").read_text(encoding="utf-8"))
    recipe = TEXTS | {
        "data": TEXTS["data"].format(libraries=", ".join(f"`{name}`" for name in report["libraries"])),
        "counts": {
            "libraries": len(report["libraries"]),
            "objects": report["objects"],
            "for training": report["train"],
            "held out": report["validation"],
            "of them of a kind that is scored": report["scored_validation"],
            "such kinds": len(report["kinds"]),
        },
        "minutes": times,
        "figures": {
            key.replace("_", " "): value for key, value in pretraining.items() if key.endswith(("kind", "color"))
        },
    }
    for name, content in (("recipe.json", recipe), ("scores.json", scores)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "CREATORS.md").write_text(creators(data_dir), encoding="utf-8")
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    shutil.copytree(report_dir, folder / "evaluation", ignore=shutil.ignore_patterns(*WORKING_FILES))
    write_card(
        folder, [folder / "evaluation"], model_id="checkpoints/household", fingerprint=fingerprint_model(str(folder))
    )


# What a report is made from.
WORKING_FILES = ("answers", "likelihood", "judge", "objects.jsonl", "settings.json", "history.json")


# Pieces whose own licence file says otherwise than the library that holds them.
OWN_LICENSES = {
    "blendswap-cc-0-winchesterarmchair": "CC-BY 3.0 by its own licence file",
    "blendswap-cc-0-winchestersofa": "CC-BY 3.0 by its own licence file",
}


def creators(data_dir: Path) -> str:
    """Who made what, under which licence, library by library."""
    libraries: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    licenses = {}
    for row in read_metadata(data_dir):
        own_license = OWN_LICENSES.get(row["object_id"])
        name = f"{row['name']} ({own_license})" if own_license else row["name"]
        libraries[row["library"]][row["creator"]].append(name)
        licenses[row["library"]] = row["license"]
    lines = ["# Creators of the objects this model was trained and scored on", ""]
    for library, by_creator in sorted(libraries.items()):
        lines += [f"## {library}", "", f"Licence: {licenses[library]}", ""]
        lines += [f"- {creator}: {', '.join(sorted(names))}" for creator, names in sorted(by_creator.items())]
        lines.append("")
    return "\n".join(lines)
