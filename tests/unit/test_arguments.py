"""Command lines made from dataclasses: parsers, defaults, both spellings, and flags in messages."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from minigpt3d.arguments import (
    Parser,
    add_options,
    normalize,
    number_between,
    option,
    path_or_url,
    positive_int,
    read_options,
    with_flags,
)


@dataclass(kw_only=True)
class Options:
    path: Path = option("file", positional=True, metavar="FILE")
    output_dir: Path = option("folder")
    from_: str | None = option("a keyword", default=None)
    seed: int = option("seed", default=0)
    rate: float = option("rate", default=0.5)
    dry_run: bool = option("dry run", default=False)
    kinds: list[Literal["a", "b"]] = option("kinds", default=[])
    ignore: list[str] = option("patterns", default=[], action="append", group="filters")
    limits: list[int] | None = option("two numbers", default=None, nargs=2)
    count: int | None = option("count", default=None, type=positive_int)
    command: list[str] = field(default_factory=list)  # no option


def make_parser(separator: str) -> Parser:
    parser = Parser(prog="x")
    add_options(parser, Options, separator)
    return parser


@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize("typed", ["-", "_"])
def test_options_are_read_in_both_spellings(separator, typed):
    argv = (
        f"x.ply --output{typed}dir out --from y --dry{typed}run --kinds a b --ignore p --ignore q --limits 1 2".split()
    )
    options = read_options(Options, make_parser(separator).parse_args(normalize(argv, separator)))
    assert options == Options(
        path=Path("x.ply"),
        output_dir=Path("out"),
        from_="y",
        dry_run=True,
        kinds=["a", "b"],
        ignore=["p", "q"],
        limits=[1, 2],
    )


def test_what_is_not_given_keeps_its_default():
    options = read_options(Options, make_parser("-").parse_args(["x", "--output-dir", "y"]))
    assert (options.seed, options.rate, options.dry_run, options.kinds, options.count) == (0, 0.5, False, [], None)
    options.ignore.append("p")
    assert read_options(Options, make_parser("-").parse_args(["x", "--output-dir", "y"])).ignore == []


@pytest.mark.parametrize(
    "argv", [["x"], ["x", "--output-dir", "y", "--kinds", "c"], ["x", "--output-dir", "y", "--count", "0"]]
)
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        make_parser("-").parse_args(argv)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "usage:" not in printed and "x --help" in printed


@pytest.mark.parametrize(
    "argv", [["", "--output-dir", "y"], ["x", "--output-dir="], ["x", "--output-dir", "y", "--from", " "]]
)
def test_empty_paths_and_texts_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser("-").parse_args(argv)
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "has_hint"), [("-x.glb", True), ("-there", True), ("-absent", False)])
def test_a_file_name_that_looks_like_an_option_gets_a_hint(name, has_hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-there").touch()
    with pytest.raises(SystemExit, match="2"):
        make_parser("-").parse_args([name, "--output-dir", "y"])
    assert (f"./{name}" in capsys.readouterr().err) is has_hint
    assert make_parser("-").parse_args(["--output-dir", "y", "--", name]).path == Path(name)


def test_a_value_that_looks_like_an_option_gets_a_hint(capsys):
    for value, has_hint in (("-new", True), ("--seed", False)):
        with pytest.raises(SystemExit, match="2"):
            make_parser("-").parse_args(["x", "--output-dir", value])
        assert ("--output-dir=-new" in capsys.readouterr().err) is has_hint
    assert make_parser("-").parse_args(["x", "--output-dir=-new"]).output_dir == Path("-new")


def test_urls_stay_text():
    assert path_or_url("https://host/a.glb") == "https://host/a.glb"
    assert path_or_url("a/b.glb") == Path("a/b.glb") and path_or_url("C:/b.glb") == Path("C:/b.glb")


def test_help_shows_defaults_and_groups():
    text = " ".join(make_parser("_").format_help().split())
    assert "seed (default: 0)" in text and "rate (default: 0.5)" in text
    assert "dry run (default" not in text and "kinds (default" not in text and "--command" not in text
    assert "filters: --ignore IGNORE" in text


def test_only_names_of_options_are_normalized():
    argv = ["--data_dir=my_data", "my_file", "--a-b_c", "_x", "--", "--my_file"]
    assert normalize(argv, "-") == ["--data-dir=my_data", "my_file", "--a-b-c", "_x", "--", "--my_file"]
    assert normalize(["--data-dir", "my-data"], "_") == ["--data_dir", "my-data"]


def test_flags_replace_arguments_in_messages():
    message = "`output_dir` and `from_` are needed, `other` and output_dir are not"
    assert with_flags(message, Options, "-") == "--output-dir and --from are needed, `other` and output_dir are not"
    assert with_flags(message, Options, "_").startswith("--output_dir and --from")


@pytest.mark.parametrize("text", ["-1", "nan", "1e999", "many"])
def test_numbers_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 2"):
        number_between(0, 2)(text)
    assert number_between(0, 2)("0.5") == 0.5
