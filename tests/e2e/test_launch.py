"""The stages under `accelerate launch`: as a script of the checkout, and as a module of the installed package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "training" / "stage4.py"


@pytest.mark.parametrize(
    "form",
    [
        pytest.param([str(SCRIPT)], id="script"),
        pytest.param(["-m", "minigpt3d.training.stage4"], id="module", marks=pytest.mark.slow),
    ],
)
def test_a_stage_runs_under_accelerate(form, base, release, tmp_path):
    data_dir, (annotations,) = release
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *form]
    options = ["--recipe", "household", "--init", base, "--data", data_dir, "--annotations", annotations]
    options += ["--output_dir", tmp_path / "stage4", "--max_steps", "1", "--device_batch", "8", "--num_workers", "0"]
    done = subprocess.run(
        [*launch, *map(str, options)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "stage4" / "stage.json").read_text())["stage"] == "IV"
    assert (tmp_path / "stage4" / "adapter" / "adapter_config.json").is_file()
