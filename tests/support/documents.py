"""Snippets and commands of README and docs: find them, run them, compare their output."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


README = ROOT / "README.md"


TIMEOUT = 300  # seconds per command


ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
}


FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\s*\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)


# Reads a JSON list of snippets, runs them in one namespace, writes the JSON list of what each printed.
RUNNER = """
import contextlib, io, json, sys, traceback
namespace = {"__name__": "__main__"}
outputs = []
for title, code in json.load(sys.stdin):
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, title, "exec"), namespace)
    except BaseException:
        traceback.print_exc()
        sys.exit(f"{title} failed")
    outputs.append(output.getvalue())
json.dump(outputs, sys.stdout)
"""


@dataclass
class Block:
    """A fenced block: its language, code, line in the document, why it is not run, and the output shown for it."""

    language: str
    code: str
    line: int
    reason: str | None = None
    output: str | None = None

    @property
    def title(self) -> str:
        return f"README.md, {self.language} block at line {self.line}"


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks in order; a text block right behind another becomes its output."""
    blocks, end = [], None
    for match in FENCE.finditer(text):
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        follows = end is not None and not text[end : match.start()].strip()
        if match["language"] == "text" and follows and blocks[-1].output is None:
            blocks[-1].output = code
        else:
            line = text.count("\n", 0, match.start("language")) + 1
            blocks.append(Block(match["language"], code, line, match["reason"]))
        end = match.end()
    return blocks


def same_output(shown: str, real: str) -> bool:
    """Equal but for the amount of white space; `...` or `…` in what is shown stands for anything, or nothing."""
    parts = re.split(r" ?(?:\.\.\.|…) ?", " ".join(shown.split()))
    return re.fullmatch(".*".join(re.escape(part) for part in parts), " ".join(real.split()), re.S) is not None


def assert_output(block: Block, real: str):
    if block.output is not None:
        assert same_output(block.output, real), f"{block.title} shows\n{block.output}\nbut printed\n{real}"


def run_python(blocks: list[Block], cwd: Path = ROOT):
    """Run all in one fresh process; compare the outputs."""
    for block in blocks:
        compile(block.code, block.title, "exec")
    blocks = [block for block in blocks if not block.reason]
    if not blocks:
        return
    snippets = json.dumps([(block.title, block.code) for block in blocks])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=snippets, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for block, output in zip(blocks, json.loads(done.stdout), strict=True):
        assert_output(block, output)


def read_commands(code: str) -> list[str]:
    """The commands of a bash block, comments and prompts gone, continued lines joined."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines())
    return [line.removeprefix("$ ") for line in lines if line]


@lru_cache
def options_of(script: str) -> str:
    """The --help of a script of ours."""
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_launch(words: list[str]):
    """A training launch: its script exists and knows every option that follows it."""
    scripts = [word for word in words if word.endswith(".py")]
    assert scripts and (ROOT / scripts[0]).is_file(), f"no such script: {' '.join(words)}"
    arguments = words[words.index(scripts[0]) + 1 :]
    for option in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", options_of(scripts[0])), f"{scripts[0]} knows no {option}"


def check_make(words: list[str]):
    if shutil.which("make") is None:
        pytest.skip("no make")
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_command(command: str, scratch: Path) -> str | None:
    """Run one command, or check it where running would install, train for hours or recurse.

    Returns:
        What it printed, or None where it was only checked.
    """
    words = shlex.split(command)
    if words[:2] == ["make", "demo"] and shutil.which("make"):
        # An environment that is up to date and runs this very Python.
        python = scratch / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (scratch / ".installed").touch()
        command = f"make --no-print-directory demo VENV={shlex.quote(str(scratch))}"
    elif words[0] == "make":
        return check_make(words)
    elif words[0] in ("git", "cd", "source", ".") or words[:3] in (
        ["python", "-m", "venv"],
        ["python3", "-m", "venv"],
    ):
        return None
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            assert not word.endswith(".txt") or (ROOT / word).is_file(), f"no such file: {word}"
        return None
    elif words[:2] == ["accelerate", "launch"]:
        return check_launch(words)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("build/", f"{scratch}/")],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.replace(f"{scratch}/", "build/")


def run_bash(block: Block, scratch: Path):
    outputs = [run_command(command, scratch) for command in read_commands(block.code)]
    if block.output is not None:
        assert None not in outputs, f"{block.title} shows an output, but holds a command that is not run"
        assert_output(block, "".join(outputs))
