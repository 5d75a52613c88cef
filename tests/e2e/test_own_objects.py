"""README's "Train on your own objects", as it stands there: from meshes and captions to an adapter that describes them."""

import os
import re
import subprocess
from dataclasses import replace

import pytest
from documents import ENVIRONMENT, README, ROOT, read_blocks, read_commands, run_python, same_output


def test_own_objects(tmp_path):
    if os.name == "nt":
        pytest.skip("links to the checkout")
    for name in ("checkpoints", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    make, commands = [
        block
        for block in read_blocks(README.read_text(encoding="utf-8"))
        if block.reason and "test_own_objects" in block.reason
    ]
    run_python([replace(make, reason=None)], cwd=tmp_path)
    output = ""
    for command in read_commands(commands.code):
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
    assert same_output(commands.output, output), output
    # Every toy that was trained on is named, shape and color.
    for color in ("red", "green", "blue"):
        for shape in ("ring", "cone", "capsule", "die"):
            assert f"toys/{color}_{shape}.glb: This is a {color} toy {shape}." in output
    adapter = tmp_path / "mine"
    assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "config.json").exists()
    assert re.search(r"\| loss \| .* in the first steps", (adapter / "README.md").read_text())
