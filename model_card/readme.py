"""Write a model card from the JSON files of a model's folder and of its evaluations.

The text is in `card.jinja`. Every number in it is a fact, which knows its source; a card with a number that has none is
refused.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

import minigpt3d
from minigpt3d.files import write_json, write_text
from minigpt3d.messages import public_command, public_word
from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES

from .ablation import ablation_section
from .emissions import Given, estimate_emissions
from .evaluations import RESULTS_FILE, CardError, find_limits, read_results
from .facts import Fact, find_unsourced, take_marks
from .model_folder import RECIPE_FILE, read_folder
from .model_index import HUB_DATASETS, eval_results, model_index
from .render import render
from .words import CONDITIONS


CARD_FILE, SOURCES_FILE = "README.md", "card_sources.json"
ABLATION_FILE = "ablation.json"


def write_card(
    folder: str | Path,
    results: Iterable[str | Path] = (),
    given: Mapping[str, Given] | None = None,
    ablation: str | Path | None = None,
    model_id: str | None = None,
    fingerprint: str | None = None,
    name: str | None = None,
) -> Path:
    """Write README.md, and card_sources.json with the source of every number in it, in order.

    Args:
        folder: a whole model or an adapter; `model_folder.py` lists the files that are read.
        results: folders of evaluations, or their results.json.
        given: numbers for energy and emissions, see `emissions.GIVEN`.
        ablation: an ablation.json or the folder that holds it; the picture beside it is copied.
        model_id: Hub id or folder by which others load the model (default: the folder).
        fingerprint: of the folder's weights, as in results.json; results of other weights are refused.
        name: that the folder will have, if it is still written under another one.

    Returns:
        The path of README.md.

    Raises:
        ValueError: the folder holds no model, a file is damaged or has another schema, or results are given twice.
        CardError: results are of other weights, or a number has no source.
    """
    folder, given = Path(folder), given or {}
    facts = read_folder(folder)
    result_files = _find_results(results)
    runs = [read_results(path, fingerprint) for path in result_files]
    _check_model_id(model_id)
    ablation = None if ablation is None else Path(ablation)
    ablation_file = ablation / ABLATION_FILE if ablation is not None and ablation.is_dir() else ablation
    facts |= {
        "model_id": Fact(model_id or _as_argument(name or public_word(str(folder))), "name of the model"),
        "runs": runs,
        "limits": find_limits(runs),
        "ablation": None if ablation is None else ablation_section(ablation_file),
        "emissions": estimate_emissions(facts["hours"], given),
        "command": _command(folder, facts["part"], name, model_id, result_files, given, ablation),
    }
    card, sources = take_marks(_render_card(facts, folder))
    write_text(folder / CARD_FILE, card)
    write_json(folder / SOURCES_FILE, sources)
    _write_eval_results(folder, [run.raw for run in runs])
    if ablation is not None:
        picture = ablation_file.with_suffix(".png")
        if picture.is_file() and picture.resolve() != (folder / picture.name).resolve():
            shutil.copyfile(picture, folder / picture.name)
    return folder / CARD_FILE


def _render_card(facts: Mapping, folder: Path) -> str:
    """The card with marks.

    Raises:
        CardError: a number has no source.
    """
    constants = {
        "metadata": _metadata(facts),
        "conditions": CONDITIONS,
        "suffixes": READABLE_SUFFIXES,
        "sources_file": SOURCES_FILE,
        "version": minigpt3d.__version__,
    }
    marked = render("card.jinja", facts | constants)
    if unsourced := find_unsourced(marked):
        raise CardError(
            f"The card of {folder} would hold numbers without a source: {'; '.join(f'“{words}”' for words in unsourced)}. "
            f"Take them from a file (see card.jinja); in {RECIPE_FILE}, put them into counts, minutes or figures."
        )
    return marked


def _find_results(results: Iterable[str | Path]) -> list[Path]:
    """Paths of the runs' results.json.

    Raises:
        ValueError: a run is given twice.
    """
    paths = [path / RESULTS_FILE if path.is_dir() else path for path in map(Path, results)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(
            f"`results`: a run is given twice: {', '.join(str(path.parent) for path in paths)}. Give each folder once."
        )
    return paths


def _check_model_id(model_id: str | None):
    """
    Raises:
        ValueError: it is neither a Hub id nor a folder.
    """
    if model_id is not None and not Path(model_id).is_dir():
        try:
            validate_repo_id(model_id)
        except HFValidationError as error:
            raise ValueError(
                f"`model_id` {model_id!r}: expected a Hub id, OWNER/NAME, or a folder. {error}"
            ) from error


def _as_argument(name: str) -> str:
    """A folder's name, whatever is in it, as text in UTF-8 that is no option of a command."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    return f"./{name}" if name.startswith("-") else name


def _command(
    folder: Path,
    part: str,
    name: str | None,
    model_id: str | None,
    result_files: list[Path],
    given: Mapping[str, Given],
    ablation: Path | None,
) -> str:
    """The command that writes this card again."""
    place = str(folder) if name is None else f"{name}/{folder.name}" if part else name
    words = ["minigpt3d", "card", _as_argument(place)]
    if model_id or (part and name):
        words += ["--model-id", model_id or _as_argument(name)]
    if result_files:
        words += ["--results", *(str(path.parent) for path in result_files)]
    for name, number in given.items():
        words += ["--co2", f"{name}={number.value:g}:{number.source}"]
    if ablation is not None:
        words += ["--ablation", str(ablation)]
    return public_command(words)


def _metadata(facts: Mapping) -> str:
    """The YAML at the card's head."""
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers" if facts["whole"] else "peft",
        pipeline_tag="image-text-to-text",
        base_model=facts["base_model"],
        tags=["point-cloud", "3d", "minigpt3d", "arxiv:2405.01413"],
    )
    if facts["runs"]:
        data["model-index"] = model_index([run.raw for run in facts["runs"]])
    return data.to_yaml()


def _write_eval_results(folder: Path, runs: list[dict]):
    """Replace the files that an earlier card wrote."""
    target = folder / ".eval_results"
    for path in target.glob("*.yaml"):
        if path.stem.partition("-")[0] in HUB_DATASETS:
            path.unlink()
    for name, text in (eval_results(runs) if runs else {}).items():
        target.mkdir(exist_ok=True)
        write_text(target / name, text)
