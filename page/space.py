"""A folder that is a Space of the Hub with the page: the code of this package, what it needs, and the name of a model."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from minigpt3d.files import write_text, written_whole
from minigpt3d.hub import BUNDLED_MODEL, PACKAGE_DIR, is_hub_id
from minigpt3d.messages import one_line

from .shown import EXAMPLES


CODE_DIR = "minigpt3d"
# What a Space does not run, and what is left of builds.
_LEFT_OUT = ("__pycache__", "*.pyc", "node_modules", "recipes", "viewer", "household.parquet")
# What this command writes, as patterns; nothing else of the folder is replaced or published.
_WRITTEN = ("README.md", "LICENSE", "NOTICE", "requirements.txt", "app.py", f"{CODE_DIR}/*")
_MARK = "This folder was written by `minigpt3d demo --space`, which replaces what it wrote when it runs again."

APP = '''"""MiniGPT-3D as a Space. It also runs on your machine: pip install -r requirements.txt && python app.py"""

import sys

from minigpt3d.cli.main import main


sys.exit(main({arguments}))
'''

README = """---
title: MiniGPT-3D
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Ask a small language model about a 3D object
{models}---

# MiniGPT-3D

A page to see 3D objects, turn them, and ask {model} about them.

{mark}
"""


def write_space(folder: Path, model: str | None, options: Sequence[str] = ()):
    """Write the folder. In one that was written before, the same files are replaced, and others stay.

    Args:
        model: Hub id; None puts the bundled model into the folder.
        options: of `minigpt3d demo`, with which the Space runs.

    Raises:
        ValueError: the model is a local folder, which a Space cannot load, or `folder` holds something else.
    """
    if model is not None and (not is_hub_id(model) or Path(model).is_dir()):
        raise ValueError(
            f"`model` {model}: a Space loads its model from the Hub. Publish it and pass OWNER/NAME, or leave it out for the "
            "bundled one."
        )
    _check_free(folder)
    arguments = ["demo", "--host", "0.0.0.0", *(["--model", model] if model else []), *options]
    texts = {
        "README.md": readme(model),  # first, so that a run that was interrupted can be repeated
        "app.py": APP.format(arguments=json.dumps(arguments)),
        "requirements.txt": "".join(f"{line}\n" for line in requirements(with_adapters=model is not None)),
    }
    texts |= {
        name: (PACKAGE_DIR / name).read_text("utf-8")
        for name in ("LICENSE", "NOTICE")
        if (PACKAGE_DIR / name).exists()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    with written_whole(folder / CODE_DIR) as partial:
        _copy_code(partial, with_model=model is None)


def _check_free(folder: Path):
    """
    Raises:
        ValueError: the folder has files that `write_space` would replace, and did not write.
    """
    advice = "pass a new folder, or one that was written before"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`space` {folder} is a file; {advice}")
    if (folder / CODE_DIR / ".git").exists():
        raise ValueError(f"`space` {folder}: {CODE_DIR} in it is a git repository, not a copy of the code; {advice}")
    try:
        is_ours = _MARK in (folder / "README.md").read_text("utf-8", errors="replace")
    except OSError:
        is_ours = False
    # A clone of an empty repository has files of git only.
    others = (
        []
        if is_ours or not folder.exists()
        else [path for path in folder.iterdir() if not path.name.startswith(".git")]
    )
    if others:
        raise ValueError(
            f"`space` {folder} holds something else ({min(path.name for path in others)}), and no README.md that says that this "
            f"command wrote it; {advice}"
        )


def readme(model: str | None) -> str:
    """README.md with the metadata that the Hub reads."""
    models = f"models:\n- {model}\n" if model else ""
    name = f"[{model}](https://huggingface.co/{model})" if model else "a small model, which is part of it,"
    return README.format(gradio=version("gradio"), models=models, model=name, mark=_MARK)


def requirements(with_adapters: bool) -> list[str]:
    """What the page needs to read all formats, one requirement a line; the Hub installs the gradio of README.md itself."""
    extras, lines = [{"extra": "demo"}, {"extra": "formats"}], []
    for requirement in map(Requirement, requires("minigpt3d")):
        wanted = requirement.marker is None or any(map(requirement.marker.evaluate, extras))
        if wanted or with_adapters and requirement.name == "peft":
            requirement.marker = None
            lines.append(str(requirement))
    return lines


def _copy_code(target: Path, with_model: bool):
    """This package, with the objects that are examples and the bundled model if it is wanted."""
    ignore = shutil.ignore_patterns(*_LEFT_OUT)
    for source in sorted(PACKAGE_DIR.glob("*.py")):
        shutil.copyfile(source, target / source.name)
    folders = [path.parent.name for path in PACKAGE_DIR.glob("*/__init__.py") if path.parent.name not in _LEFT_OUT]
    if with_model:
        folders.append(BUNDLED_MODEL.relative_to(PACKAGE_DIR))
    for folder in [*folders, EXAMPLES.relative_to(PACKAGE_DIR)]:
        shutil.copytree(PACKAGE_DIR / folder, target / folder, ignore=ignore)


def push_space(folder: Path, repo_id: str) -> str:
    """Publish the folder as a Space, which is created if there is none; returns its address.

    Raises:
        ValueError: the name is not OWNER/NAME, or the Hub refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            commit_message="Update the page",
            allow_patterns=list(_WRITTEN),
            delete_patterns=f"{CODE_DIR}/*",
        )
    except Exception as error:  # no token, no network, a name that the Hub refuses
        again = f"hf upload --repo-type space {repo_id} {folder}"
        raise ValueError(
            f"`push` {repo_id}: not published ({one_line(error)[:300]}). Run `hf auth login`, then: {again}"
        ) from error
    return f"{api.endpoint}/spaces/{repo_id}"
