"""The wheel and the sdist: what they hold, and that the wheel works alone and without a network."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import FLAT_FILES, ROOT, tracked_files


TIMEOUT = 300  # seconds a command


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist, built offline from a copy, so that no build folder stays in the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked_files():
        if path.parts[:2] != ("tests", "golden"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    build = "from setuptools import build_meta as backend; backend.build_wheel({0!r}); backend.build_sdist({0!r})"
    done = subprocess.run(
        [sys.executable, "-c", build.format(str(output))], cwd=source, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return next(output.glob("*.whl")), next(output.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(distributions) -> email.message.Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(distributions[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def run_installed(distributions, tmp_path_factory):
    """Run a program with the wheel in a folder of its own, from another folder, without a network → standard output."""
    pytest.importorskip("pip")
    target, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", target, distributions[0]], check=True, timeout=TIMEOUT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONPATH": str(target),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(elsewhere / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.target = target
    return run


# ---- Content --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_no_more(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
    expected = {"__init__.py", "evaluation/household.parquet", "checkpoints/household/model.safetensors", *FLAT_FILES}
    others = ("tests", "benchmarks", "demo", "docs", ".ci")
    absent = ("checkpoints/household/evaluation/", "page/viewer/")
    for path in tracked_files():
        is_code = path.suffix in (".py", ".json", ".jinja", ".yaml") and len(path.parts) > 1
        if is_code and path.parts[0] not in others and not path.as_posix().startswith(absent):
            expected.add(path.as_posix())
    missing = sorted(name for name in expected if f"minigpt3d/{name}" not in names)
    assert not missing, f"add them to pyproject.toml: {missing}"
    folders = [*(f"{name}/" for name in others), *absent]
    unwanted = [name for name in names if any(name.startswith((folder, f"minigpt3d/{folder}")) for folder in folders)]
    unwanted = [name for name in unwanted if not name.startswith("minigpt3d/demo/objects/")]
    unwanted += [name for name in names if name.endswith((".pyc", "Makefile", "conftest.py"))]
    assert not unwanted
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert distributions[0].stat().st_size < 20e6


def test_the_wheels_metadata(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "train",
        "quantization",
        "onnx",
        "eval",
        "demo",
        "look",
        "serve",
        "trl",
        "notebooks",
        "formats",
        "dev",
    }


def test_the_sdist_holds_what_a_build_and_a_reader_need(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {*FLAT_FILES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "Makefile"} <= names
    assert {
        "tests/conftest.py",
        "benchmarks/encode.py",
        "docs/training.md",
        "checkpoints/household/model.safetensors",
    } <= names
    assert "evaluation/household.parquet" in names
    assert not any("__pycache__" in name for name in names)


def test_constraints_pin_every_direct_requirement(metadata):
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        chosen = {}
        for pin in pins:
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{pin} is no exact pin"
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert canonicalize_name(pin.name) not in chosen, f"{pin.name} is pinned twice for Python {python}"
                chosen[canonicalize_name(pin.name)] = specifier.version
        for requirement in requirements:
            name, marker = canonicalize_name(requirement.name), requirement.marker
            environments = [{"python_version": python, "extra": extra} for extra in metadata.get_all("Provides-Extra")]
            is_needed = marker is None or any(marker.evaluate(environment) for environment in environments)
            if is_needed and name != "minigpt3d":
                assert name in chosen, f"constraints.txt does not pin {name} for Python {python}"
                assert requirement.specifier.contains(chosen[name]), f"{requirement} excludes the tested version"
    assert chosen["torch"] == "2.13.0"


def test_the_oldest_tested_versions_are_the_lower_bounds(metadata):
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    bounds = {}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        name = canonicalize_name(requirement.name)
        if name in pins:
            (bounds[name],) = [bound.version for bound in requirement.specifier]
    oldest = {name: next(iter(specifiers)).version for name, specifiers in pins.items()}
    assert bounds.keys() == pins.keys() - {"tokenizers"}
    assert all(Version(oldest[name]) == Version(bound) for name, bound in bounds.items())


# ---- Installed ------------------------------------------------------------------------------------------------------


def test_the_installed_package_is_that_of_the_wheel(run_installed, metadata):
    printed = run_installed("-c", "import minigpt3d; print(minigpt3d.__file__, minigpt3d.__version__)")
    assert printed.split() == [str(run_installed.target / "minigpt3d" / "__init__.py"), metadata["Version"]]


def test_the_installed_command_describes_an_object(run_installed):
    """With the checkpoint in the wheel: without a network, a cache or a checkout."""
    script = run_installed.target / "bin" / "minigpt3d"
    assert "table" in run_installed(script, "describe", ROOT / "demo" / "objects" / "oakTable.ply")


@pytest.mark.slow
def test_the_installed_command_evaluates_the_household_objects(run_installed, tmp_path):
    script = run_installed.target / "bin" / "minigpt3d"
    printed = run_installed(script, "evaluate", "household", "--limit", "2", "--greedy", "--out", tmp_path / "out")
    assert "closed_set_accuracy" in (tmp_path / "out" / "results.json").read_text() and printed
