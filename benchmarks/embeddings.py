"""Measure which vector finds objects of the same kind: nearest neighbors among the held-out objects.

    python benchmarks/embeddings.py [--model DIR] [--batch 20]

For each object of `minigpt3d evaluate household`: whether the object with the most similar vector (cosine) is of the same kind,
and the share of the same kind among the five most similar; 95 % Wilson intervals of the first.
"""

import argparse
import datetime
import platform

import numpy as np
import torch
import transformers

from minigpt3d.arguments import positive_int
from minigpt3d.evaluation.objects import read_household
from minigpt3d.evaluation.statistics import wilson
from minigpt3d.hub import default_model, load_model


VECTORS = {
    "cls token (`minigpt3d embed`)": lambda features: features.last_hidden_state[:, 0],
    "maximum of the other tokens": lambda features: features.last_hidden_state[:, 1:].amax(1),
    "mean of the other tokens": lambda features: features.last_hidden_state[:, 1:].mean(1),
    "cls token and maximum": lambda features: torch.cat(
        [features.last_hidden_state[:, 0], features.last_hidden_state[:, 1:].amax(1)], dim=-1
    ),
    "mean of the language model's vectors": lambda features: features.pooler_output.mean(1),
}


def find_kinds(vectors: torch.Tensor, kinds: np.ndarray) -> tuple[int, float]:
    """Vectors (B, D) → objects whose nearest neighbor is of their kind, and the share of it among five neighbors."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(5).indices.numpy()  # (B, 5)
    same = kinds[nearest] == kinds[:, None]
    return int(same[:, 0].sum()), float(same.mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--batch", type=positive_int, default=20)
    args = parser.parse_args()

    model, processor = load_model(args.model, dtype=torch.float32)
    objects = read_household()
    kinds = np.array([item.label for item in objects])
    vectors = {name: [] for name in VECTORS}
    for start in range(0, len(objects), args.batch):
        clouds = [item.read() for item in objects[start : start + args.batch]]
        inputs = processor.feature_extractor(clouds, return_tensors="pt", up_axis="y", clean="none")
        with torch.inference_mode():
            features = model.eval().get_point_features(inputs["point_clouds"])
        for name, choose in VECTORS.items():
            vectors[name].append(choose(features))

    print("| vector | width | nearest is of the same kind | of five |\n|-|-|-|-|")
    for name, batches in vectors.items():
        found = torch.cat(batches)
        hits, share = find_kinds(found, kinds)
        low, high = wilson(hits, len(kinds))
        print(f"| {name} | {found.shape[1]} | {hits / len(kinds):.2f} ({low:.2f} to {high:.2f}) | {share:.2f} |")
    print(
        f"\n{len(kinds)} objects of {len(set(kinds))} kinds, {datetime.date.today()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
