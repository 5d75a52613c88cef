"""The files of the repository."""

import subprocess
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FLAT_FILES = sorted(path.name for path in ROOT.glob("*_minigpt3d.py"))


@cache
def tracked_files() -> list[Path]:
    """Files that git has or would add, relative to the root; skips the test outside a checkout."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, check=True, capture_output=True, text=True, timeout=60).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]
