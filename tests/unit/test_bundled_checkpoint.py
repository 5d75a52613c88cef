"""The bundled checkpoint carries the code of this package."""

from pathlib import Path

from minigpt3d.hub import BUNDLED_MODEL, write_code


def read_code(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def test_its_code_is_the_packages(tmp_path):
    write_code(tmp_path)
    expected, bundled = read_code(tmp_path), read_code(BUNDLED_MODEL)
    different = [name for name in expected.keys() | bundled.keys() if expected.get(name) != bundled.get(name)]
    assert not different, f"{', '.join(sorted(different))} in checkpoints/household is out of date; run: make sync"
