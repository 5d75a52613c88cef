"""Base of the folders in `spaces/`, which are metrics for `evaluate.load`, and Spaces of the Hub made of them."""

import inspect
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

import datasets
import evaluate
import nltk

from minigpt3d.files import write_text

from .checks import check_pairs


class HubMetric(evaluate.Metric, ABC):
    """A metric function with the interface of `evaluate`.

    Abstract, since `evaluate.load` takes the first class that is not abstract from a script, imported ones included.

    Attributes:
        several_references: whether a reference may be a list of texts.
        has_form: whether texts are all that it needs, and neither a judge, classes nor an encoder.
    """

    several_references = has_form = False

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


# ---- Spaces ---------------------------------------------------------------------------------------------------------

SPACES = Path(__file__).parent / "spaces"
# Files that are the same in every Space.
FILES = {
    "app.py": "from minigpt3d.evaluation.metrics.hub_metric import launch_page\n\n\nlaunch_page()\n",
    "requirements.txt": "minigpt3d[eval]\n",
}


def write_space(name: str, folder: str | Path):
    """Write a folder that can be pushed to the Hub as the Space of a metric.

    Args:
        name: of a folder in `spaces/`.

    Raises:
        FileExistsError: there is such a folder.
        FileNotFoundError: there is no such metric.
    """
    shutil.copytree(SPACES / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file_name, text in FILES.items():
        write_text(Path(folder) / file_name, text)


def launch_page():
    """Serve the page of the Space in this folder: a form, or the card if a form cannot give what the metric needs."""
    import gradio
    from evaluate.utils import launch_gradio_widget
    from evaluate.utils.gradio import parse_readme

    (script,) = (path for path in Path().glob("*.py") if path.name not in FILES)
    metric = evaluate.load(str(script))
    if metric.has_form:
        nltk.download("wordnet")
        launch_gradio_widget(metric)
        return
    with gradio.Blocks() as page:
        gradio.Markdown(parse_readme("README.md"))
    page.launch()
