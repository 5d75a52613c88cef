"""Score models on the validation objects of a release: do they name the kind, do they name the main colour?

    python -m minigpt3d.training.household.evaluate --data DIR --models I=stage1 II=stage2 --output scores.json

Asked is "What is this?", the default prompt, through the processor and `generate`, greedily. Scored are the objects
whose name has a kind in the table of `kinds.py`; the answer counts if it names the kind (`names_kind`), and its first
colour counts if it is the main colour of the cloud (`names_color`). "What color is it?" is asked and scored apart.
Beside each model stand a blind control, the same model with every point and colour zero, and the majority answer: the
most common kind and colour of the training objects, said of every object.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT, END_OF_ANSWER, MiniGPT3DProcessor

from ..weights import find_start
from .build_data import NUM_POINTS
from .colors import names_color
from .kinds import names_kind


COLOR_PROMPT = "What color is it?"
METRICS = ("kind", "color", "color_asked")


def read_validation(data_dir: Path) -> tuple[list[dict], list[np.ndarray]]:
    """Metadata and clouds (8192, 6) of the scored objects.

    Raises:
        ValueError: the release has none.
    """
    rows = read_metadata(data_dir)
    scored = [row for row in rows if row["split"] == "validation" and row["kind"]]
    if not scored:
        raise ValueError(
            f"{data_dir} holds no validation objects of a known kind. Build it with more libraries, or with "
            "--held_out_library for a library of which every object is held out."
        )
    return scored, [np.load(data_dir / "validation" / f"{row['object_id']}_{NUM_POINTS}.npy") for row in scored]


def read_metadata(data_dir: Path) -> list[dict]:
    lines = (Path(data_dir) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def answer(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    clouds: list[np.ndarray],
    question: str,
    blind: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 40,
) -> list[str]:
    """Greedy answers to one question about each cloud; `blind` zeroes every point and colour after the processor."""
    answers = []
    for first in tqdm(range(0, len(clouds), batch_size), desc=question + (" (blind)" if blind else ""), unit="batch"):
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "point_cloud", "point_cloud": cloud}, {"type": "text", "text": question}],
                }
            ]
            for cloud in clouds[first : first + batch_size]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        if blind:
            inputs["point_clouds"] = torch.zeros_like(inputs["point_clouds"])
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            stop_strings=[END_OF_ANSWER],
            tokenizer=processor.tokenizer,
        )
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.split(END_OF_ANSWER)[0].strip() for text in texts]
    return answers


def accuracy(hits: list[bool]) -> dict:
    """Share of hits, its standard error, and the number of objects."""
    share = sum(hits) / len(hits)
    return {
        "accuracy": round(share, 4),
        "standard_error": round(math.sqrt(share * (1 - share) / len(hits)), 4),
        "objects": len(hits),
    }


def score(rows: list[dict], what: list[str], color: list[str]) -> dict:
    """Metrics from the answers to "What is this?" and "What color is it?" about these objects."""
    return {
        "kind": accuracy([names_kind(said, row["kind"]) for row, said in zip(rows, what, strict=True)]),
        "color": accuracy([names_color(said, row["main_color"]) for row, said in zip(rows, what, strict=True)]),
        "color_asked": accuracy([names_color(said, row["main_color"]) for row, said in zip(rows, color, strict=True)]),
    }


def score_model(folder: str | Path, rows: list[dict], clouds: list[np.ndarray]) -> dict:
    """Scores, scores of the blind control, accuracy by kind, and every answer."""
    model = MiniGPT3DForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = MiniGPT3DProcessor.from_pretrained(find_start(folder).base)
    what, color = (answer(model, processor, clouds, question) for question in (DEFAULT_PROMPT, COLOR_PROMPT))
    # Blind, every object is the same object: one answer for all.
    blind_what, blind_color = (
        answer(model, processor, clouds[:1], question, blind=True) * len(clouds)
        for question in (DEFAULT_PROMPT, COLOR_PROMPT)
    )
    hits = {}
    for row, said in zip(rows, what, strict=True):
        hits.setdefault(row["kind"], []).append(names_kind(said, row["kind"]))
    return {
        "seeing": score(rows, what, color),
        "blind": score(rows, blind_what, blind_color),
        "by_kind": {kind: f"{sum(found)}/{len(found)}" for kind, found in sorted(hits.items())},
        "answers": [
            {"object_id": row["object_id"], "name": row["name"], "kind": row["kind"], "main_color": row["main_color"]}
            | {"what": said, "color": said_color}
            for row, said, said_color in zip(rows, what, color, strict=True)
        ],
    }


def score_majority(data_dir: Path, rows: list[dict]) -> dict:
    """Always the most common kind and colour of the training objects of a kind (of all rows, if none train)."""
    train = [row for row in read_metadata(data_dir) if row["split"] == "train" and row["kind"]] or rows
    kind, color = (Counter(row[key] for row in train).most_common(1)[0][0] for key in ("kind", "main_color"))
    text = f"This is a {color} {kind}."
    return score(rows, [text] * len(rows), [text] * len(rows)) | {"answer": text}


def to_table(results: dict) -> str:
    """The results as a Markdown table with standard errors."""
    header = ["", "kind", "main colour", "main colour, asked for it"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|---|"]
    rows = [(f"stage {name}" if name in ("I", "II", "III", "IV") else name, result["seeing"])
            for name, result in results["models"].items()]  # fmt: skip
    rows += [(f"{label}, blind", results["models"][name]["blind"])
             for (label, _), name in zip(rows, results["models"], strict=True)]  # fmt: skip
    for label, metrics in [*rows, ("majority answer", results["majority"])]:
        cells = [f"{metrics[m]['accuracy']:.2f} ± {metrics[m]['standard_error']:.2f}" for m in METRICS]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    count = results["objects"]
    return "\n".join([*lines, "", f"{count} validation objects; ± is the standard error of a share of {count}."])


def evaluate(data_dir: Path, models: dict[str, str | Path]) -> dict:
    """Score each model: `{"objects", "majority", "models": {name: scores}}`."""
    rows, clouds = read_validation(Path(data_dir))
    results = {"objects": len(rows), "majority": score_majority(data_dir, rows), "models": {}}
    for name, folder in models.items():
        results["models"][name] = score_model(folder, rows, clouds)
    return results


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data wrote")
    parser.add_argument("--models", nargs="+", required=True, help="folders or Hub ids, as NAME=FOLDER or FOLDER")
    parser.add_argument("--output", type=Path, help="JSON file for the scores and all answers")
    args = parser.parse_args(argv)
    models = dict(item.split("=", 1) if "=" in item else (item, item) for item in args.models)
    results = evaluate(args.data, models)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(to_table(results))


if __name__ == "__main__":
    main()
