"""The model card of the household checkpoint, with its numbers and the creators of its data, written by the recipe."""

import json
from collections import defaultdict
from pathlib import Path

from .evaluate import read_metadata, to_table


_TEMPLATE = Path(__file__).resolve().parents[2] / "model_card" / "household.md"


def write_model_card(folder: Path, data_dir: Path, results: dict, times: dict, pretraining: dict):
    """Write README.md, CREATORS.md and scores.json into the checkpoint's folder.

    Args:
        folder: of the checkpoint.
        data_dir: the release that it was trained on.
        results: of `evaluate`.
        times: minutes by step.
        pretraining: what `pretrain` returned.
    """
    report = json.loads((data_dir / "report.json").read_text(encoding="utf-8"))
    shipped = results["models"]["shipped"]
    heads = [
        f"{key.replace('_', ' ')} {value:.2f}" for key, value in pretraining.items() if key.endswith(("kind", "color"))
    ]
    card = _TEMPLATE.read_text(encoding="utf-8").format(
        parameters=pretraining["parameters"],
        megabytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        objects=report["objects"],
        num_libraries=len(report["libraries"]),
        libraries=", ".join(report["libraries"]),
        train=report["train"],
        validation=report["validation"],
        scored=report["scored_validation"],
        num_kinds=len(report["kinds"]),
        times=", ".join(f"{name} {minutes:.0f}" for name, minutes in times.items()),
        majority=results["majority"]["answer"],
        table=to_table(results),
        by_kind=", ".join(f"{kind} {hits}" for kind, hits in shipped["by_kind"].items()),
        heads=", ".join(heads),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "CREATORS.md").write_text(creators(data_dir), encoding="utf-8")
    scores = {name: result for name, result in results.items() if name != "models"}
    scores["models"] = {
        name: {k: v for k, v in model.items() if k != "answers"} for name, model in results["models"].items()
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


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
