"""Errors on one line, and command lines that may be published."""

import pytest

from minigpt3d.messages import one_line, public_command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "x.ply"), "x.ply: No such file"),
        (OSError("disk is full"), "disk is full"),
        (ImportError("no peft"), "no peft"),
        (ValueError(), "ValueError:"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (KeyError("name"), "KeyError: 'name'"),
    ],
)
def test_an_error_on_one_line(error, line):
    assert one_line(error) == line


@pytest.mark.parametrize(
    ("word", "public"),
    [
        ("/srv/alice/out", "out"),
        ("--out=/srv/alice/out", "--out=out"),
        ("--data=~/objects/mine.csv", "--data=mine.csv"),
        ("../../alice/a=b/mine.csv", "mine.csv"),
        ("caption_score=/srv/alice/p.txt", "caption_score=p.txt"),
        ("http://user:secret@host:8000/v1?api_key=secret", "http://host:8000/v1"),
        ("--judge-url=https://user:secret@host/v1#secret", "--judge-url=https://host/v1"),
        ("build/report", "build/report"),
        ("This is a {}. = so", "'This is a {}. = so'"),
        ("--limit=10", "--limit=10"),
        ("--data=/srv/alice/date=2026/mine.csv", "--data=mine.csv"),
        ("--judge-prompt=caption_score=/srv/al=ice/p.txt", "--judge-prompt=caption_score=p.txt"),
        ("/srv/run=3/out", "out"),
        ("./../../alice/out", "out"),
        ("data/run=3/out", "data/run=3/out"),
        ("--judge-url=HTTP://user:secret@host/v1?key=secret", "--judge-url=http://host/v1"),
        ("http://user:secret@host/v1\n", "http://host/v1"),
        ("http://[bad", "URL"),
        ("--data=file:///srv/alice/mine.csv", "--data=mine.csv"),
    ],
)
def test_a_public_command_hides_paths_passwords_and_keys(word, public):
    assert public_command(["minigpt3d", "evaluate", word]) == f"minigpt3d evaluate {public}"
