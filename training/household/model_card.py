"""The model card of the household checkpoint, with its numbers and the creators of its data, written by the recipe."""

import json
from collections import defaultdict
from pathlib import Path

from .evaluate import read_metadata, to_table


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [point-cloud, 3d, minigpt3d]
---

# MiniGPT-3D, household

A small MiniGPT-3D ({parameters:,} parameters, {megabytes:.1f} MB) that says what a piece of furniture is, which colour it has and what it
is for. It shows that the whole recipe works on two CPU cores; it knows the things of a household and nothing else.

```python
from transformers import pipeline

describe = pipeline("point-cloud-to-text", model="checkpoints/household", trust_remote_code=True)
print(describe("chair.ply"))
```

The up axis is y, as in OBJ and glTF files (`up_axis="z"` in the processor turns others). Objects without colour are
read as black.

## Data

{objects} objects of {num_libraries} furniture libraries of Sweet Home 3D ({libraries}), sampled to coloured points:
{train} for training, {validation} held out by name and by base model, {scored} of them of one of the {num_kinds} kinds
of the table in `training/household/kinds.py`. `CREATORS.md` names every object's creator and licence. Captions and questions are
made from name, category, size and the colours of the points, by `training/household/captions.py`.

## Recipe

`make household LIBRARIES="…"` rebuilds it. What the paper takes ready-made is trained first: a byte-level tokenizer and a language
model on the captions alone, then the 3D encoder together with the Q-Former, by telling kind, noun, category and
colours of real and of made-up objects (`training/household/pretrain.py`). Then come stages I to IV of the paper, by
`training/stage1.py` to `stage4.py --recipe household`. Minutes on the machine that made it: {times}.

## Numbers

Objects whose names and base models were never seen; the question is "What is this?", decoding greedy; *blind* is the same
model with every point and colour zero; the *majority answer* is "{majority}" for every object.

{table}

By kind, of the shipped checkpoint: {by_kind}.

The pre-trained encoder with classification heads, for comparison: {heads}.

`python -m minigpt3d.training.household.evaluate --data build/household/data --models checkpoints/household` gives the numbers of
this folder again.
"""


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
    card = _CARD.format(
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
