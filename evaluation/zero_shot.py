"""Which of given labels fits an object: `pipeline("zero-shot-point-cloud-classification")`, by `likelihood`.

Shapes: B objects, L labels, N points.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY

from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline, flatten
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

from .suites import OWN


TASK = "zero-shot-point-cloud-classification"


class ZeroShotPointCloudClassificationPipeline(PointCloudToTextPipeline):
    """Choose among labels that the model was not trained for.

    ```python
    >>> from transformers import pipeline

    >>> task = "zero-shot-point-cloud-classification"
    >>> classify = pipeline(task, model=folder_or_id, trust_remote_code=True)
    >>> classify("chair.ply", candidate_labels=["chair", "table", "lamp"])
    [{'score': 0.97, 'label': 'chair'}, {'score': 0.02, 'label': 'table'}, {'score': 0.01, 'label': 'lamp'}]
    ```
    """

    def __call__(self, inputs: Any, candidate_labels: Sequence[str] | Mapping[str, Sequence[str]], **kwargs):
        """Rank labels.

        Args:
            inputs: one input or a list of them: whatever `load_point_cloud` reads, no chats.
            candidate_labels (`list[str]` or `dict`): different names; or for each label its names, of which each counts:
                `{"sofa": ["sofa", "couch"]}`.
            hypothesis_template (`str` or a list of them, *optional*): forms of the answer, each with {} for the name;
                by default those of `minigpt3d evaluate own`.
            prompt (`str`, *optional*): the question; "What is this?" by default.
            up_axis, missing_color, clean, batch_size: see `PointCloudToTextPipeline`.

        Returns:
            For each input a list of `{"score": float, "label": str}`, the most likely first. The scores are the shares of the
            labels' likelihoods and add up to 1: a list without the right label may still give one a score near 1.

        Raises:
            ValueError: an input cannot be read, or an argument is not as described.
        """
        if isinstance(kwargs.get("prompt"), (list, tuple)):
            raise ValueError(f"{TASK}: prompt is one text for all inputs, got {kwargs['prompt']!r}.")
        return super().__call__(inputs, candidate_labels=candidate_labels, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
        prompt: str | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        reading, generate_kwargs, _ = super()._sanitize_parameters(prompt=prompt, **kwargs)
        reading.pop("prompt", None)
        if generate_kwargs:
            raise ValueError(f"{TASK}: unknown argument {next(iter(generate_kwargs))!r}; nothing is generated here.")
        if candidate_labels is None:  # when the pipeline is made
            return reading, {}, {}
        from .likelihood import check_texts  # not when transformers is imported, which registers this pipeline

        names = names_by_label(candidate_labels)
        phrases = OWN.phrases if hypothesis_template is None else hypothesis_template
        phrases = (phrases,) if isinstance(phrases, str) else tuple(phrases)
        of_all = [name for of_label in names.values() for name in of_label]
        check_texts(of_all, phrases)
        question = DEFAULT_PROMPT if prompt is None else prompt
        return reading, {"names": names, "phrases": phrases, "question": question}, {"labels": list(names)}

    def preprocess(self, inputs: Any, **reading) -> dict[str, Any]:
        """One input → `point_clouds`, a list of one (1, N, 6)."""
        if isinstance(inputs, dict) and "messages" in inputs or hasattr(inputs, "messages"):
            raise ValueError(f"{TASK}: a conversation cannot be classified; pass its object.")
        cloud = self.read_point_cloud(inputs, **reading)
        return {"point_clouds": [torch.from_numpy(cloud)[None]]}

    def _forward(self, model_inputs: dict[str, Any], names: dict, phrases: tuple, question: str) -> dict[str, Any]:
        clouds = torch.cat(list(flatten(model_inputs["point_clouds"])))
        return {
            "log_likelihoods": torch.from_numpy(self.log_likelihoods(clouds.cpu().numpy(), names, phrases, question))
        }

    def log_likelihoods(
        self, clouds: np.ndarray, names: Mapping[str, Sequence[str]], phrases: Sequence[str], question: str
    ) -> np.ndarray:
        """Log-likelihood of each label as the answer to a question: (B, N, 6) clouds, y up → (B, L) float64, in nats.

        Those of the label's names and of their forms are added up.
        """
        from .likelihood import class_log_likelihoods

        texts = [name for of_label in names.values() for name in of_label]
        scores, _ = class_log_likelihoods(
            self.model, self.processor, clouds, question, texts, phrases, batch_size=len(clouds), up_axis="y"
        )
        ends = np.cumsum([len(of_label) for of_label in names.values()])[:-1]
        return np.stack([np.logaddexp.reduce(part, axis=1) for part in np.split(scores, ends, axis=1)], axis=1)

    def postprocess(self, model_outputs: dict[str, torch.Tensor], labels: list[str]) -> list[dict[str, Any]]:
        """Log-likelihoods of one input, (1, L) → shares."""
        return rank_labels(model_outputs["log_likelihoods"][0].numpy(), labels)


def rank_labels(log_likelihoods: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Log-likelihoods (L,) as shares, the largest first; ties keep their order."""
    shares = np.exp(log_likelihoods - np.logaddexp.reduce(log_likelihoods))
    order = np.argsort(-shares, kind="stable")
    return [{"score": float(shares[index]), "label": labels[index]} for index in order]


def names_by_label(labels: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Labels with their names; a label without is its own name.

    Raises:
        ValueError: there are none, or they are no texts.
    """
    if isinstance(labels, Mapping):
        names = {label: (of,) if isinstance(of, str) else tuple(of) for label, of in labels.items()}
    elif isinstance(labels, str):
        raise ValueError(f"{TASK}: candidate_labels is a list of names, got the text {labels!r}.")
    else:
        names = {label: (label,) for label in labels}
    if len(names) < len(labels):
        raise ValueError(f"{TASK}: candidate_labels must be different, got {labels!r}.")
    texts = [*names, *(name for of_label in names.values() for name in of_label)]
    if not names or not all(names.values()) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{TASK}: candidate_labels must be one or more names that are not empty, got {labels!r}.")
    return names


def register():
    """Register the task, so that it needs no `trust_remote_code` where the package is installed."""
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=ZeroShotPointCloudClassificationPipeline,
            pt_model=AutoModelForImageTextToText,
            type="multimodal",
        )


__all__ = ["ZeroShotPointCloudClassificationPipeline", "register"]
