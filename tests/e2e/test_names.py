"""The name of a folder is a text: whatever the file system takes, every command takes, and writes where it belongs."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from training_runs import STAGES, options, tiny

from minigpt3d.hub import find_model
from minigpt3d.model_card.readme import write_card
from minigpt3d.training.loop import train


NAMES = [
    "7",
    "n" * 120,
    "--out",
    "-grün, 椅子",
    "a..b--c.git",
    "\"'`$HOME` | {{ 7 }}\\",
    "new\nline",
    "not utf-8 \udcff",
]


def named_in(card: str) -> set[str]:
    """The folders that the card's Python and its command name."""
    python = re.findall(r'(?:model=|model, |\()("(?:[^"\\\n]|\\.)*")[,)]', card)
    command = re.search(r"Or on the command line: (`+) ?(.*?) ?\1\.\n", card)[2]
    names = {ast.literal_eval(text) for text in python} | {shlex.split(command)[-1]}
    return {name.replace("\n", " ") for name in names - {"point-cloud-to-text", "chair.ply", "base"}}


@pytest.mark.parametrize(("name", "whole"), [*((name, True) for name in NAMES), (NAMES[5], False)])
def test_a_card_takes_any_name(name, whole, tmp_path):
    config = {"model_type": "minigpt3d"} if whole else {"base_model_name_or_path": "./base"}
    (tmp_path / ("config.json" if whole else "adapter_config.json")).write_text(json.dumps(config))
    card = write_card(tmp_path, name=name).read_text()
    shown = name.replace("\udcff", "?").replace("\n", " ")
    assert named_in(card) == {f"./{shown}" if name.startswith("-") else shown}


def test_a_stage_and_its_export_take_any_name(base, release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("-- grün, a..b `7`") / "2"
    folder = train(tiny(STAGES["I"]), options(base, name, release, max_steps=1, export=True))
    assert folder == name and find_model(folder).base == str(name)
    assert [path.name for path in name.parent.iterdir()] == ["2"], "nothing is left beside it"
    for wrong, message in ((name / "none" / "..", "exists already"), (Path("a\udcff"), "not UTF-8")):
        with pytest.raises(ValueError, match=message):
            train(tiny(STAGES["I"]), options(base, wrong, release))
