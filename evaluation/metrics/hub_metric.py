"""Base of the folders in `spaces/`, which are metrics for `evaluate.load` and can be pushed to the Hub as Spaces."""

import inspect
from abc import ABC, abstractmethod

import datasets
import evaluate

from .checks import check_pairs


class HubMetric(evaluate.Metric, ABC):
    """A metric function with the interface of `evaluate`.

    Abstract, since `evaluate.load` takes the first class that is not abstract from a script, imported ones included.

    Attributes:
        several_references: whether a reference may be a list of texts.
    """

    several_references = False

    @property
    @abstractmethod
    def function(self):
        """The metric: (predictions, references, keywords) -> dict."""

    def _info(self):
        text = datasets.Value("string")
        description, _, arguments = inspect.getdoc(self.function).partition("\n\n")
        return evaluate.MetricInfo(
            description=description,
            citation="",
            license="Apache-2.0",
            inputs_description=f"\n{arguments}\n",
            features=datasets.Features(
                {"predictions": text, "references": datasets.Sequence(text) if self.several_references else text}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **others):
        """Add predictions and references."""
        check_pairs(predictions, references, self.several_references)
        if self.several_references:
            references = [[texts] if isinstance(texts, str) else texts for texts in references]
        super().add_batch(predictions=predictions, references=references, **others)

    def _compute(self, predictions, references, **options):
        return self.function(predictions, references, **options)


def launch_card():
    """Serve the README as the page of a Space whose metric needs a judge, classes or an encoder, which a form cannot give."""
    import gradio
    from evaluate.utils.gradio import parse_readme

    with gradio.Blocks() as page:
        gradio.Markdown(parse_readme("README.md"))
    page.launch()
