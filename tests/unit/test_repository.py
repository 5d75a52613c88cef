"""What the repository's files may import, and what must not be in them."""

import ast
import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from repository import FLAT_FILES, ROOT, tracked_files

import minigpt3d
from minigpt3d.data.reading import Limits


# The last two are hard requirements of transformers, so the Hub's loader finds them wherever it runs.
FLAT_IMPORTS = {"torch", "transformers", "numpy", "huggingface_hub", "tokenizers"}


def read_text(path: Path) -> str | None:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an object, a picture, weights
        return None


def test_versions_agree():
    version = minigpt3d.__version__
    assert re.search(rf'^version = "{re.escape(version)}"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert importlib.metadata.version("minigpt3d") == version
    assert re.search(r"^## (\S+?)[, ]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1) == version


def test_notice_names_what_is_not_ours():
    notice = (ROOT / "NOTICE").read_text()
    for owner, license in [
        ("this project", "Apache License, Version 2.0"),
        ("Phi-2, Microsoft", "MIT"),
        ("BLIP-2", "BSD-3-Clause"),
        ("MiniGPT-3D, its authors", "CC BY-NC-SA 4.0"),
        ("MiniGPT-3D authors' data", "CC BY-NC-SA 4.0"),
        ("three.js", "MIT"),
        ("BlendSwap-CC-0", "CC0 1.0"),
        ("sweethome3d-furniture", "CC BY 3.0"),
    ]:
        assert owner in notice, f"NOTICE does not name {owner}"
        assert license in notice[notice.index(owner) :], f"NOTICE gives no {license} for {owner}"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Version 2.0" in (ROOT / "LICENSE").read_text()


def test_no_paths_of_one_machine_and_no_package_indexes():
    roots = "|".join(["work", "root", "home", "Users", "tmp/work", "opt/pypi", "opt/wheels"])
    patterns = [rf"(?<![\w.:/~}}])/(?:{roots})/", re.escape(f"{ROOT}/"), "index" + "-url", "PIP_" + "INDEX"]
    problems = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate((read_text(path) or "").splitlines(), 1)
        if any(re.search(pattern, line) for pattern in patterns)
    ]
    assert not problems, "\n".join(problems)


def test_no_two_modules_have_one_name():
    """So that a name leads to one file. The files in checkpoints are copies."""
    names = [path.name for path in tracked_files() if path.suffix == ".py" and path.parts[0] != "checkpoints"]
    twice = {name for name, count in Counter(names).items() if count > 1}
    assert twice <= {"__init__.py", "__main__.py"}


def unguarded_imports(tree: ast.Module):
    """Absolute imports (top module, line) outside a top-level `try` with `except ImportError`.

    The Hub's loader demands every one of them, also those inside functions.
    """
    guarded = set()
    for node in tree.body:
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type or h) for h in node.handlers):
            guarded |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


@pytest.mark.parametrize("name", FLAT_FILES)
def test_flat_files_import_only_what_the_hub_loader_can_serve(name):
    source = (ROOT / name).read_text()
    allowed = FLAT_IMPORTS | sys.stdlib_module_names
    unserved = [
        f"{name}:{line}: {module}" for module, line in unguarded_imports(ast.parse(source)) if module not in allowed
    ]
    assert not unserved, "guard these by a top-level try/except ImportError: " + ", ".join(unserved)
    # The loader reads relative imports by line, docstrings too.
    for module, names in re.findall(r"^\s*from\s+\.(\S*)\s+import\s+(.*)$", source, re.M):
        assert f"{module}.py" in FLAT_FILES, f"{name}: 'from .{module} import {names}' is not served from the Hub"


def unpickles_arrays_only(tree: ast.AST) -> bool:
    """Whether a module uses pickle only to derive a reader from `Unpickler` that restricts what may be called."""
    readers = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["pickle.Unpickler"]
    ]
    strict = all(any(getattr(part, "name", "") == "find_class" for part in reader.body) for reader in readers)
    used = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    ]
    return strict and used.count("Unpickler") == len(readers) and set(used) <= {"Unpickler", "UnpicklingError"}


def find_unpickling(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines that can run code from a file, with what they do."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if {module.split(".")[0] for module in modules} & {"pickle", "dill", "joblib", "cloudpickle"}:
                lines.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call == "torch.load" and options.get("weights_only") != "True":
                lines.append((node.lineno, "torch.load without weights_only=True"))
            if call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                lines.append((node.lineno, "np.load with allow_pickle"))
    return lines


def test_nothing_unpickles():
    """Except the reader of PointLLM's test objects, which accepts only arrays (see its own test), and the pipes between
    processes of ours in data/reading.py, which hold nothing of a file but arrays that were read.
    """
    problems, restricted_readers = [], []
    for path in tracked_files():
        if path.suffix != ".py" or path.parts[0] == "tests" or path == Path("data/reading.py"):
            continue
        tree = ast.parse((ROOT / path).read_text())
        for line, problem in find_unpickling(tree):
            if path.parts[0] == "evaluation" and problem == "import pickle" and unpickles_arrays_only(tree):
                restricted_readers.append(path)
            else:
                problems.append(f"{path}:{line}: {problem}")
    assert not problems, "\n".join(problems)
    assert len(restricted_readers) <= 1, restricted_readers


@pytest.mark.parametrize(
    "target",
    ["help", "demo", "test", "test-fast", "test-slow", "test-common", "test-oldest", "lint", "sync", "household"],
)
def test_make_targets_exist(target):
    if shutil.which("make") is None:
        pytest.skip("no make")
    done = subprocess.run(
        ["make", "--dry-run", target, "LIBRARIES=x"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_ci_lints_and_runs_all_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text().splitlines()]
    commands = [line for line in lines if line.startswith("make ")]
    assert commands == ["make lint", "make test", "make test-oldest", "make test-slow"]


def test_limits_of_reading_are_documented():
    text = (ROOT / "docs" / "reading.md").read_text()
    section = text[text.index("### Limits") : text.index("## Up axis")]
    documented = set(re.findall(r"`((?:max|ratio|url)_\w+)`", section))
    assert documented == {field.name for field in dataclasses.fields(minigpt3d.ReadingLimits)}
    assert f"| `max_faces` | {minigpt3d.ReadingLimits().max_faces:,} |" in section
    limits = Limits()
    assert f"| `--max-seconds` | {limits.seconds} |" in section
    assert f"| `--max-memory` | {limits.memory // 1024**3} |" in section
