"""A folder that is a Space of the Hub with the page: the code of this package, what it needs, and the name of a model."""

import shutil
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from minigpt3d.files import write_text, written_whole
from minigpt3d.hub import BUNDLED_MODEL, PACKAGE_DIR, is_hub_id
from minigpt3d.messages import one_line


CODE_DIR = "minigpt3d"
# What a Space does not run, and what is left of builds.
_LEFT_OUT = ("__pycache__", "*.pyc", "node_modules", "recipes", "viewer", "household.parquet")
_PORT = 7860  # on which the Hub expects a Space

APP = '''"""MiniGPT-3D as a Space. It also runs on your machine: pip install -r requirements.txt && python app.py"""

import sys

from minigpt3d.cli.main import main


sys.exit(main({arguments}))
'''

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Ask a small language model about a 3D object
models:
- {model}
---

# {title}

A page to see 3D objects, turn them, and ask [{model}](https://huggingface.co/{model}) about them. Written by
`minigpt3d demo --space`.
"""


def write_space(folder: Path, model: str | None):
    """Write the folder; it replaces one that was written before.

    Args:
        model: Hub id; None puts the bundled model into the folder.

    Raises:
        ValueError: the model is a local folder, which a Space cannot load, or `folder` holds something else.
    """
    if model is not None and (not is_hub_id(model) or Path(model).is_dir()):
        raise ValueError(
            f"`model` {model}: a Space loads its model from the Hub. Publish it and pass OWNER/NAME, or leave it out for the "
            "bundled one."
        )
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not (folder / CODE_DIR / "page").is_dir():
        raise ValueError(f"`space` {folder} holds something else; pass a new folder, or one that was written before")
    arguments = ["demo", "--host", "0.0.0.0", "--port", str(_PORT), *(["--model", model] if model else [])]
    with written_whole(folder) as partial:
        _copy_code(partial / CODE_DIR, with_model=model is None)
        write_text(partial / "app.py", APP.format(arguments=json_list(arguments)))
        write_text(partial / "requirements.txt", "".join(f"{line}\n" for line in requirements()))
        write_text(partial / "README.md", readme(model))
        for name in ("LICENSE", "NOTICE"):
            if (PACKAGE_DIR / name).exists():
                shutil.copyfile(PACKAGE_DIR / name, partial / name)
