"""What gets installed, what the files may import, and what must not stand in them."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minigpt3d


ROOT = Path(__file__).parents[2]
FLAT_FILES = sorted(path.name for path in ROOT.glob("*_minigpt3d.py"))
# The last two are hard requirements of transformers, so the Hub's loader finds them wherever it runs.
FLAT_IMPORTS = {"torch", "transformers", "numpy", "huggingface_hub", "tokenizers"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files that git has or would take, relative to the root."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def distributions(tracked, tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist, built offline from a copy, so that no build folder stays in the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked:
        if path.parts[0] != "checkpoints" and path.parts[:2] != ("tests", "golden"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    build = "from setuptools import build_meta as backend; backend.build_wheel({0!r}); backend.build_sdist({0!r})"
    done = subprocess.run(
        [sys.executable, "-c", build.format(str(output))], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(output.glob("*.whl")), next(output.glob("*.tar.gz"))


def read_text(path: Path) -> str | None:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an object, a picture, weights
        return None


def test_wheel_holds_the_package_and_no_more(distributions, tracked):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    for name in ("__init__.py", *FLAT_FILES):
        assert f"minigpt3d/{name}" in names
    for path in tracked:
        if path.parts[0] in ("training", "conversion", "model_card") and path.suffix in (".py", ".json", ".jinja"):
            assert f"minigpt3d/{path.as_posix()}" in names, f"{path} is missing from the wheel: see pyproject.toml"
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    outside = ("tests", "benchmarks", "demo", "checkpoints", ".ci")
    strangers = [n for n in names if any(n.startswith((f"{d}/", f"minigpt3d/{d}/")) for d in outside)]
    strangers += [n for n in names if n.endswith((".safetensors", ".pyc", "Makefile", "conftest.py"))]
    assert not strangers
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    for extra in ("train", "eval", "demo", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_sdist_holds_what_a_build_and_a_reader_need(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {*FLAT_FILES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "Makefile"} <= names
    assert {"tests/conftest.py", "benchmarks/encode.py"} <= names
    assert not any("__pycache__" in name or name.startswith("checkpoints/") for name in names)


def test_installed_wheel_imports_from_its_own_folder(distributions, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(distributions[0]) as wheel:
        wheel.extractall(target)
    code = "import minigpt3d; print(minigpt3d.__file__, minigpt3d.__version__)"
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(target / "minigpt3d" / "__init__.py"), minigpt3d.__version__]


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom minigpt3d.cli import main as minigpt3d_cli\n"
        "sys.argv = ['minigpt3d', '--help']\n"
        "try: minigpt3d_cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'trimesh'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "describe" in done.stdout and "chat" in done.stdout


def test_versions_agree():
    version = minigpt3d.__version__
    assert re.search(rf'^version = "{re.escape(version)}"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert importlib.metadata.version("minigpt3d") == version
    assert re.search(r"^## (\S+?)[, ]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1) == version


def test_constraints_pin_every_direct_requirement():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        chosen = {}
        for pin in pins:
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{pin} is no exact pin"
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert canonicalize_name(pin.name) not in chosen, f"{pin.name} is pinned twice for Python {python}"
                chosen[canonicalize_name(pin.name)] = specifier.version
        for line in importlib.metadata.requires("minigpt3d"):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name != "minigpt3d":
                assert name in chosen, f"constraints.txt does not pin {name} for Python {python}"
                assert requirement.specifier.contains(chosen[name]), f"{line} excludes the version that was tested"
    assert chosen["torch"] == "2.13.0"


def test_notice_names_what_is_not_ours():
    notice = (ROOT / "NOTICE").read_text()
    for owner, licence in [
        ("this project", "Apache License, Version 2.0"),
        ("Phi-2, Microsoft", "MIT"),
        ("BLIP-2", "BSD-3-Clause"),
        ("MiniGPT-3D, its authors", "CC BY-NC-SA 4.0"),
        ("MiniGPT-3D authors' data", "CC BY-NC-SA 4.0"),
        ("BlendSwap-CC-0", "CC0 1.0"),
        ("sweethome3d-furniture", "CC BY 3.0"),
    ]:
        assert owner in notice, f"NOTICE does not name {owner}"
        assert licence in notice[notice.index(owner) :], f"NOTICE gives no {licence} for {owner}"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Version 2.0" in (ROOT / "LICENSE").read_text()


def test_no_paths_of_one_machine_and_no_package_indexes(tracked):
    roots = "|".join(["work", "root", "home", "Users", "tmp/work", "opt/pypi", "opt/wheels"])
    patterns = [rf"(?<![\w.:/~}}])/(?:{roots})/", re.escape(f"{ROOT}/"), "index" + "-url", "PIP_" + "INDEX"]
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in tracked
        for number, line in enumerate((read_text(path) or "").splitlines(), 1)
        if any(re.search(pattern, line) for pattern in patterns)
    ]
    assert not found, "\n".join(found)


def unguarded_imports(tree: ast.Module):
    """Absolute imports (top module, line) outside a top-level `try` with `except ImportError`; the Hub's loader
    demands every one of them, also those inside functions."""
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
    strangers = [
        f"{name}:{line}: {module}" for module, line in unguarded_imports(ast.parse(source)) if module not in allowed
    ]
    assert not strangers, "guard these by a top-level try/except ImportError: " + ", ".join(strangers)
    # The loader reads relative imports by line, docstrings too.
    for module, names in re.findall(r"^\s*from\s+\.(\S*)\s+import\s+(.*)$", source, re.M):
        assert f"{module}.py" in FLAT_FILES, f"{name}: 'from .{module} import {names}' is not served from the Hub"


def unpickles_arrays_only(tree: ast.AST) -> bool:
    """Whether all that a module does with pickle is to derive a reader from `Unpickler` that says what may be called."""
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


def test_nothing_unpickles(tracked):
    found = []
    for path in tracked:
        if path.suffix != ".py" or path.parts[0] == "tests":
            continue
        tree = ast.parse((ROOT / path).read_text())
        for node in ast.walk(tree):
            # PointLLM's test objects are a pickle; tests/test_evaluate.py shows that nothing but arrays gets through.
            if (
                str(path) == "evaluation/objects.py"
                and ast.unparse(node) == "import pickle"
                and unpickles_arrays_only(tree)
            ):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                if {module.split(".")[0] for module in modules} & {"pickle", "dill", "joblib", "cloudpickle"}:
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if call == "torch.load" and options.get("weights_only") != "True":
                    found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
                if call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                    found.append(f"{path}:{node.lineno}: np.load with allow_pickle")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "household"])
def test_make_targets_exist(target):
    if shutil.which("make") is None:
        pytest.skip("no make")
    done = subprocess.run(["make", "--dry-run", target, "LIBRARIES=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_what_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]
