"""The command line of `minigpt3d`: options, help, exit codes and errors, without a model."""

import os
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

from minigpt3d.cli import batches, describe, main as cli
from minigpt3d.cli.console import printable, warnings_in_one_line
from minigpt3d.messages import MultilineError
from minigpt3d.pipeline_minigpt3d import DEFAULT_MAX_NEW_TOKENS


# Renaming or dropping one of these breaks somebody's scripts.
OPTIONS = {
    "describe": "ask batch-size clean device dtype each-node json labels max-memory max-new-tokens max-seconds min-confidence "
    "missing-color model out prompt thumbnails up-axis",
    "classify": "batch-size clean csv device dtype json labels max-memory max-seconds missing-color model phrase prompt up-axis",
    "search": "batch-size clean device dtype json max-memory max-seconds missing-color model top up-axis",
    "chat": "clean device dtype max-memory max-new-tokens max-seconds missing-color model up-axis",
    "embed": "batch-size clean device dtype max-memory max-seconds missing-color model out up-axis",
    "look": "clean device dtype max-memory max-new-tokens max-seconds missing-color model out up-axis",
    "serve": "api-key batch-size batch-wait clean device dtype host max-body max-memory max-new-tokens max-requests max-seconds "
    "missing-color model port root timeout up-axis",
    "demo": "clean device dtype host max-memory max-new-tokens max-seconds missing-color model port push space up-axis",
    "convert": "blip2 config dtype ignore lora out overwrite phi point-encoder revision router stage-result stage3 stage4 "
    "tinygpt-v verify yes",
    "new": "dtype llm out point-encoder qformer",
    "verify": "trust-remote-code",
    "pack": "annotations clean data from groups max-broken max-memory max-seconds mesh-column missing-color num-workers out preview "
    "private push-to-hub seed split text-column up-axis",
    "evaluate": "annotations answers batch-size clean data device dtype greedy judge judge-cache judge-concurrency "
    "judge-max-tokens judge-price judge-prompt judge-rpm judge-timeout judge-url limit max-memory max-seconds metrics "
    "missing-color model out "
    "phrase robustness s-bert seed simcse template up-axis",
    "compare": "",
    "card": "ablation co2 model-id results",
}


def options_of(command: str) -> dict:
    """Actions of a command's parser by name."""
    subparsers = next(action for action in cli.build_parser()._actions if isinstance(action.choices, dict))
    return {action.dest: action for action in subparsers.choices[command]._actions}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_there(command):
    flags = {flag for action in options_of(command).values() for flag in action.option_strings}
    assert flags == {"-h", "--help"} | {f"--{name}" for name in OPTIONS[command].split()}
    assert set(cli.COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_has_help(command, capsys):
    assert all(action.help for action in options_of(command).values())
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and f"usage: minigpt3d {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["describe", "--help"], ["evaluate", "--help"], ["paint", "x"]])
def test_help_and_mistyped_commands_import_nothing_heavy(arguments):
    program = """
import sys
import warnings
from minigpt3d.cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "scipy", "trimesh", "huggingface_hub"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert "minigpt3d" in (done.stdout if "--help" in arguments else done.stderr)


@pytest.mark.parametrize("arguments", [[], ["describe"], ["paint", "x"], ["describe", "x", "--max-new-tokens", "0"]])
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    error, pointer = capsys.readouterr().err.splitlines()
    assert error.startswith("minigpt3d") and "--help" in pointer


def test_an_unknown_option_points_to_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["describe", "x", "--paint"])
    error, pointer = capsys.readouterr().err.splitlines()
    assert "--paint" in error and "minigpt3d describe --help" in pointer


def test_version_names_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    packages = ("minigpt3d", "torch", "transformers")
    assert capsys.readouterr().out.strip().split(", ") == [f"{name} {version(name)}" for name in packages]


@pytest.mark.parametrize(
    "arguments", [["describe", ""], ["describe", "x", "--prompt="], ["verify", " "], ["card", "x", "--model-id="],
                  ["evaluate", "household", "--out=y", "--judge", " "], ["compare", ""]]
)  # fmt: skip
def test_empty_texts_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
@pytest.mark.parametrize("command", ["describe x", "evaluate household --out y"])
def test_a_device_that_is_not_there(command, name, capsys, monkeypatch):
    monkeypatch.setattr("minigpt3d.hub.load_model", fail_with(AssertionError("before the model is loaded")))
    assert cli.main([*command.split(), "--device", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device" in line and name in line and "cpu" in line and "mkldnn" not in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "nope"], ["nope", "minigpt3d evaluate"]),
        (["card", "nope"], ["nope", "minigpt3d convert"]),
        (["card", "nope", "--results", "nope"], ["nope", "minigpt3d convert"]),
        (["convert", "--out", "y", "--phi", "nope"], ["--phi nope", "no such"]),
        (["convert", "--out", "y", "--stage-result", "nope"], ["--stage-result nope", "no such"]),
        (["pack", "--out", "y", "--from", "nope.csv"], ["nope.csv", "no such", "caption"]),
        (["pack", "--out", "y", "--from", "chair.glb"], ["chair.glb", ".glb", "caption"]),
        (["pack", "--out", "y", "--from", "header.csv"], ["header.csv", "no rows", "caption"]),
        (["pack", "--out", "y", "--from", "."], ["folder", "caption"]),
        (["describe", "https://127.0.0.1/a.ply"], ["https://127.0.0.1/a.ply: ", "public"]),
    ],
)
def test_what_is_missing_is_named_with_what_is_expected(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chair.glb").write_bytes(b"glTF")
    (tmp_path / "header.csv").write_text("file,caption\n")
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        *((["describe", "x", f"--max-new-tokens={text}"], "--max-new-tokens") for text in ("abc", "-1", "2.5")),
        (["evaluate", "household", "--out", "y", "--seed", "-1"], "--seed"),
        (["pack", "--out", "y", "--seed", "-1"], "--seed"),
        *(
            (["evaluate", "own", "--out", "y", "--judge", "m", "--judge-price", "0", text], "--judge-price")
            for text in ("-1", "nan", "inf", "1e999", "cheap")
        ),
    ],
)
def test_numbers_out_of_range(arguments, option, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "describe chair.ply --out chair.xyz",
        "describe chair.ply --labels kinds.txt",
        "classify chair.ply --labels absent.txt",
        "search chair absent.ply",
        "chat absent.ply",
        "embed chair.ply --out chair.txt",
        "look chair.ply --out absent/chair.html",
        "serve --root absent",
        "demo --push me/space",
        "convert --stage4 absent.pth --tinygpt-v absent --phi absent --blip2 absent --point-encoder absent --out out",
        "verify absent",
        "pack --out out",
        "evaluate own --data absent.csv --out out",
        "compare absent",
        "card absent",
    ],
)
def test_what_cannot_be_used_exits_with_1_and_what_cannot_be_parsed_with_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chair.ply").touch()
    assert cli.main(arguments.split()) == 1
    assert capsys.readouterr().err.startswith("minigpt3d: ")
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments.split(), "--no-such-option"])
    assert end.value.code == 2
    assert os.listdir(tmp_path) == ["chair.ply"]


def test_defaults_are_those_of_the_code():
    """Help must not import what has them, so they are written twice."""
    assert options_of("describe")["max_new_tokens"].help.endswith(f"(default: {DEFAULT_MAX_NEW_TOKENS})")
    assert describe.Options(paths=[]).max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def fail_with(error: BaseException):
    def run(options, argv):
        raise error

    return run


def test_underscores_are_accepted(monkeypatch):
    calls = []
    monkeypatch.setattr(describe, "run", lambda options, argv: calls.append((options, argv)) or 0)
    argv = ["describe", "my_file", "--max_new_tokens", "7"]
    assert cli.main(argv) == 0
    ((options, typed),) = calls
    assert options.max_new_tokens == 7 and [path.name for path in options.paths] == ["my_file"]
    assert typed == argv


@pytest.mark.parametrize(("error", "space"), [(ValueError, " "), (MultilineError, "\n")])
def test_errors_name_the_option(error, space, monkeypatch, capsys):
    monkeypatch.setattr(describe, "run", fail_with(error("`max_new_tokens`\nis `odd`")))
    assert cli.main(["describe", "x"]) == 1
    assert capsys.readouterr().err == f"minigpt3d: --max-new-tokens{space}is `odd`\n"


def test_missing_files_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(describe, "run", fail_with(FileNotFoundError(2, "No such file", "x.ply")))
    assert cli.main(["describe", "x.ply"]) == 1
    assert capsys.readouterr().err == "minigpt3d: x.ply: No such file\n"


def test_an_interrupt_is_quiet(monkeypatch, capfd):
    monkeypatch.setattr(describe, "run", fail_with(KeyboardInterrupt()))
    assert cli.main(["describe", "x"]) == 130
    assert capfd.readouterr() == ("", "")


def test_an_error_that_nobody_expected_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(describe, "run", fail_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["describe", "x"])


def test_a_warning_for_users_is_printed_once_on_one_line(capsys):
    with pytest.warns(DeprecationWarning) as others, warnings_in_one_line(describe.Options):
        for _ in range(2):
            warnings.warn("two\nlines", UserWarning, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "minigpt3d: warning: two lines\n"
    assert len(others) == 2


def test_names_that_are_not_utf8_are_printable():
    assert printable("a\udcff.npy") == "a\\udcff.npy"
    assert printable("Möbel.npy") == "Möbel.npy"


def test_files_in_a_folder(tmp_path):
    for name in ("b.OBJ", "a.ply.gz", "notes.gz", "notes.md", ".hidden.ply", "below/c.usdz", "d.wrl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.mkfifo(tmp_path / "pipe.ply")
    (tmp_path / "broken.ply").symlink_to("absent.ply")
    progress = batches.Progress()
    progress.add(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in progress.files]
    assert names == ["a.ply.gz", "b.OBJ", "below/c.usdz"]
    assert progress.skipped == {".md": 1, ".gz": 1, ".wrl": 1, "pipes and broken links": 2}
    assert "2 pipes and broken links" in progress.summary()
