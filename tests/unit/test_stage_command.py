"""The command line of the stages, up to where a run begins."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt3d.training import command
from minigpt3d.training.run_options import RunOptions


ROOT = Path(__file__).parents[2]
REQUIRED = ["--init", "org/model", "--data", "org/data", "--output_dir", "result"]


@pytest.fixture
def parsed(monkeypatch):
    """`parsed(*arguments)` → the options that a stage would run with."""
    runs = []
    monkeypatch.setattr(command, "_run", lambda stage, options: runs.append((stage, options)))

    def parse(*arguments):
        command.main("II", [*REQUIRED, *map(str, arguments)])
        return runs[-1][1]

    return parse


def run_stage(*arguments, form=("training/stage3.py",)):
    command_line = [sys.executable, "-X", "importtime", *form, *map(str, arguments)]
    return subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("form", [("training/stage3.py",), ("-m", "minigpt3d.training.stage3")])
def test_help_describes_the_stage_and_imports_nothing_heavy(form):
    done = run_stage("--help", form=form)
    assert done.returncode == 0
    for word in ("Stage III", "multi_round (4 a step)", "--resume", "--gradient_checkpointing"):
        assert word in done.stdout
    assert not {"torch", "transformers", "accelerate", "numpy"} & {
        line.split("|")[-1].strip() for line in done.stderr.splitlines()
    }


def test_fine_tuning_is_called_by_its_name(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main("own", ["--help"])
    text = capsys.readouterr().out
    assert "Fine-tuning" in text and "Stage own" not in text


def test_mistakes_are_found_before_heavy_imports():
    done = run_stage(*REQUIRED, "--annotations", "none.json")
    assert done.returncode == 1 and "error: --data" in done.stderr and "| torch" not in done.stderr
    assert run_stage("--init", "x").returncode == 2


def test_options_are_read_in_both_spellings(parsed):
    options = parsed("--device-batch", 4, "--report_to", "tensorboard", "wandb", "--recipe=household")
    assert options == RunOptions(
        "org/model", "org/data", Path("result"), device_batch=4, report_to=["tensorboard", "wandb"], recipe="household"
    )
    assert options.work_dir == Path("result.unfinished")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], False), (["--export"], True), (["--export", "true"], True), (["--export", "False"], False)],
)
def test_switches_take_a_value_as_those_of_transformers_do(arguments, value, parsed):
    assert parsed(*arguments).export is value


def test_a_switch_refuses_other_values(parsed):
    with pytest.raises(SystemExit, match="2"):
        parsed("--export", "perhaps")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "`max_steps` .*at least 1, got 0"),
        ({"hub_every": 0}, "`hub_every` .*at least 1, got 0"),
        ({"annotations": [Path("none.json")]}, "`data` org/data"),
        ({"data": ".", "annotations": [Path("none.json")]}, "`annotations` none.json"),
        ({"output_dir": Path(".")}, "`output_dir` . exists"),
        ({"push_to_hub": True}, "`push_to_hub` and `hub_model_id`"),
        ({"hub_model_id": "org/model"}, "`push_to_hub` and `hub_model_id`"),
        ({"hub_every": 1}, "`hub_every` needs"),
        ({"compile": True, "gradient_checkpointing": True}, "`compile` and `gradient_checkpointing`"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RunOptions("org/model", "org/data", Path("result")), **changes).check()


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    options = RunOptions("org/model", "org/data", tmp_path / "result")
    options.work_dir.mkdir()
    options.check()
    (options.work_dir / "history.jsonl").touch()
    with pytest.raises(ValueError, match="unfinished.*`resume`"):
        options.check()
    replace(options, resume="auto").check()


def test_missing_bitsandbytes_is_reported(monkeypatch):
    monkeypatch.setattr("minigpt3d.training.run_options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`load_in_4bit`.*minigpt3d\[quantization\]"):
        RunOptions("org/model", "org/data", Path("result"), load_in_4bit=True).check()


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("ValueError('`data` is wrong')", 1, "error: --data is wrong"),
        ("OSError(28, 'the disk is full')", 1, "error: the disk is full"),
        ("LossError('the loss is nan')", 1, "error: the loss is nan"),
        ("torch.OutOfMemoryError('CUDA out of memory')", 1, "--device_batch"),
        ("RuntimeError('DataLoader worker exited')", 1, "--num_workers"),
        ("Stopped(15, Path('work'), 7)", 143, "--resume"),
    ],
)
def test_known_failures_end_with_a_message_and_a_code(error, code, words, monkeypatch, capsys):
    import torch

    from minigpt3d.training.loop import LossError
    from minigpt3d.training.run_state import Stopped

    names = {"LossError": LossError, "torch": torch, "Stopped": Stopped, "Path": Path}
    monkeypatch.setattr("minigpt3d.training.loop.train", lambda *args: _raise(eval(error, names)))
    with pytest.raises(SystemExit) as stop:
        command.main("I", REQUIRED)
    printed = str(stop.value.code) + capsys.readouterr().err
    assert words in printed and (code == 1) == isinstance(stop.value.code, str)
    assert code == 1 or stop.value.code == code


def test_other_errors_are_not_hidden(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("minigpt3d.training.loop.train", lambda *args: _raise(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        command.main("I", REQUIRED)
