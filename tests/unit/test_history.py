"""Reading the history of a run."""

import json

import pytest
from made_up_histories import PAPER, healthy

from minigpt3d.training.history import read_history


@pytest.mark.parametrize("rest", ["", '{"step": 3, "lo', '{"step": 3, "router": {"load": [0.5]}'])
def test_an_incomplete_last_line_is_ignored(tmp_path, rest):
    history = healthy(PAPER["I"], 3)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history) + rest)
    assert read_history(path) == history


def test_a_complete_last_line_needs_no_newline(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 1}')
    assert read_history(tmp_path / "history.jsonl") == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("broken", ['{"step": 1, "lo', "", "7", "\x00\x00\x00\x00"])
def test_another_broken_line_is_named(tmp_path, broken):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2"):
        read_history(path)


def test_an_empty_file_has_no_entries(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    assert read_history(tmp_path / "history.jsonl") == []
