"""docs/own-objects.md as it is written: from meshes and captions to an adapter that describes them."""

import os

import pytest
from documents import all_blocks, assert_output, make_workspace, read_commands, run_shell, run_snippets


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links to the checkout")
def test_own_objects(tmp_path):
    make_workspace(tmp_path)
    blocks = [block for block in all_blocks() if block.document == "docs/own-objects.md" and not block.is_run]
    (snippet,) = [block for block in blocks if block.language == "python"]
    commands = next(block for block in blocks if block.language == "bash")
    ((_, error),) = run_snippets([("toys", snippet.title, snippet.code)], tmp_path)
    assert error is None, error
    output = "".join(run_shell(command, tmp_path) for command in read_commands(commands.code))
    assert_output(commands, output)
    # Every toy of the captions is named, shape and color.
    for color in ("red", "green", "blue"):
        for shape in ("ring", "cone", "capsule", "die"):
            assert f"toys/{color}_{shape}.glb: This is a {color} toy {shape}." in output
    adapter = tmp_path / "mine"
    assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "config.json").exists()
    assert "loss" in (adapter / "README.md").read_text(encoding="utf-8")
