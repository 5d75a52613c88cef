"""How often `minigpt3d classify` is right, how sure it is then, and how well `minigpt3d search` ranks.

The labels are the 16 kinds of the bundled model's held-out objects. Searched for are all kinds of these objects, and all pairs
of a color and a kind; beside it the plain way, counting the words of the query in the answers to "What is this?" and "Caption
this 3D model in detail.".

    python benchmarks/zero_shot_labels.py
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch

from minigpt3d import PointCloudToTextPipeline, ZeroShotPointCloudClassificationPipeline
from minigpt3d.evaluation.evaluate_options import EvaluateOptions
from minigpt3d.evaluation.objects import read_objects
from minigpt3d.evaluation.suites import CAPTION_PROMPT, HOUSEHOLD, INSTRUCTION_PROMPT, OWN
from minigpt3d.hub import default_model, load_model


BATCH = 16
BINS = (0, 0.5, 0.7, 0.9, 1.001)
SHUFFLES = 200  # of objects with equal scores


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Mean over orders of objects with equal scores."""
    rng, values = np.random.default_rng(0), []
    for _ in range(SHUFFLES):
        shuffled = rng.permutation(len(scores))
        hits = relevant[shuffled[np.argsort(-scores[shuffled], kind="stable")]]
        values.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(values))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    objects = read_objects(EvaluateOptions(suite="household", out=Path("unused"), device="cpu"))
    model, processor = load_model(default_model())
    describe = PointCloudToTextPipeline(model=model, processor=processor, device="cpu", dtype="auto")
    classify = ZeroShotPointCloudClassificationPipeline(model=model, processor=processor, device="cpu")
    clouds = np.stack([describe.read_point_cloud(item.read(), up_axis="y", clean="none") for item in objects])

    def likelihoods(names: dict) -> np.ndarray:
        parts = [clouds[first : first + BATCH] for first in range(0, len(clouds), BATCH)]
        return np.concatenate(
            [classify.log_likelihoods(part, names, OWN.phrases, INSTRUCTION_PROMPT) for part in parts]
        )

    start = time.process_time()
    scores = likelihoods(HOUSEHOLD.classes)
    seconds = (time.process_time() - start) / len(objects)
    shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    is_right = np.array([item.label for item in objects]) == np.array(list(HOUSEHOLD.classes))[shares.argmax(1)]
    print(f"kinds: {is_right.mean():.2f} right, {seconds:.3f} CPU s an object, {torch.get_num_threads()} threads")
    for low, high in zip(BINS, BINS[1:], strict=False):
        here = (shares.max(1) >= low) & (shares.max(1) < high)
        print(f"  confidence {low:.1f} to {min(high, 1):.1f}: {here.sum()} objects, {is_right[here].mean():.2f} right")

    answers = [""] * len(objects)
    for prompt in (INSTRUCTION_PROMPT, CAPTION_PROMPT):
        outputs = describe(list(clouds), prompt=prompt, up_axis="y", clean="none", batch_size=BATCH)
        answers = [f"{before} {output['generated_text']}" for before, (output,) in zip(answers, outputs, strict=True)]
    words = [re.findall(r"\w+", answer.lower()) for answer in answers]
    for what, wanted in (
        ("kinds", sorted({(item.label,) for item in objects})),
        ("colors and kinds", sorted({(item.color, item.label) for item in objects})),
    ):
        queries = {" ".join(query): [" ".join(query)] for query in wanted}
        relevant = [np.array([set(query) <= {item.color, item.label} for item in objects]) for query in wanted]
        counts = [
            np.array([sum(word in of for word in name.split()) for of in words], dtype=float) for name in queries
        ]
        precisions = (
            np.mean([average_precision(ranking, hits) for ranking, hits in zip(rankings, relevant, strict=True)])
            for rankings in (likelihoods(queries).T, counts, np.zeros_like(counts))
        )
        print(
            f"search for {len(queries)} {what}, mean average precision: "
            + ", ".join(
                f"{name} {value:.2f}" for name, value in zip(("search", "words", "chance"), precisions, strict=True)
            )
        )


if __name__ == "__main__":
    main()
