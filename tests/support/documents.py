"""Snippets, commands and references of README.md and docs/: find them, run them, compare their output."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT = 600  # seconds per command
SERVER = "127.0.0.1:8000"  # in the documents; it runs at a free port
PROGRAMS = {"minigpt3d": "minigpt3d.cli"}  # installed commands and the modules that run them
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
    "COLUMNS": "200",  # --help wraps no option
}
FENCE = re.compile(
    r"(?:<!-- (?P<mark>slow|not run: [^\n]+?) -->\s*\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)

# Reads a JSON list of [namespace, code], runs them in this process, and writes a JSON list of [output, error or null].
RUNNER = """
import contextlib, io, json, sys, traceback
namespaces, results = {}, []
for name, title, code in json.load(sys.stdin):
    output, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, title, "exec"), namespaces.setdefault(name, {"__name__": "__main__"}))
    except SystemExit as end:
        error = None if end.code in (0, None) else f"exit code {end.code}"
    except BaseException:
        error = traceback.format_exc()
    results.append((output.getvalue(), error))
json.dump(results, sys.stdout)
"""


@dataclass
class Block:
    """A fenced block.

    Args:
        language, code: as written.
        document, line: where it starts.
        mark: None, "slow", or "not run: REASON".
        output: the text block right behind it.
    """

    language: str
    code: str
    document: str
    line: int
    mark: str | None = None
    output: str | None = None

    @property
    def title(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_run(self) -> bool:
        return not (self.mark or "").startswith("not run")


def read_blocks(text: str, document: str = "") -> list[Block]:
    """All fenced blocks in order; a text block right behind another becomes its output."""
    blocks, end = [], None
    for match in FENCE.finditer(text):
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        follows = end is not None and not text[end : match.start()].strip()
        if match["language"] == "text" and follows and blocks[-1].output is None:
            blocks[-1].output = code
        else:
            line = text.count("\n", 0, match.start("language")) + 1
            blocks.append(Block(match["language"], code, document, line, match["mark"]))
        end = match.end()
    return blocks


def all_blocks() -> list[Block]:
    """The blocks of every document."""
    return [
        block
        for path in DOCUMENTS
        for block in read_blocks(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def same_output(shown: str, real: str) -> bool:
    """Equal but for the amount of white space; `...` or `…` in what is shown stands for anything, or nothing."""
    parts = re.split(r" ?(?:\.\.\.|…) ?", " ".join(shown.split()))
    return re.fullmatch(".*".join(re.escape(part) for part in parts), " ".join(real.split()), re.S) is not None


def assert_output(block: Block, real: str):
    if block.output is not None:
        assert same_output(block.output, real), f"{block.title} shows\n{block.output}\nbut printed\n{real}"


# ---- Run ------------------------------------------------------------------------------------------------------------


def run_snippets(snippets: list[tuple[str, str, str]], cwd: Path) -> list[tuple[str, str | None]]:
    """Run Python code in one fresh process.

    Args:
        snippets: namespace, title and code of each.
        cwd: working directory.

    Returns:
        What each printed, and its error or None.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = f"127.0.0.1:{listener.getsockname()[1]}"
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(snippets).replace(SERVER, server),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=len(snippets) * TIMEOUT,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.replace(server, SERVER))


def read_commands(code: str) -> list[str]:
    """The commands of a bash block, comments and prompts gone, continued lines joined."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines())
    return [line.removeprefix("$ ") for line in lines if line]


def as_module(command: str) -> tuple[str, list[str]] | None:
    """Module or script of a command that is a Python program of ours, and its arguments; None for any other command."""
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        index = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), len(words))
        words = ["python", *words[index:]]
    if words[0] in PROGRAMS:
        return PROGRAMS[words[0]], words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("minigpt3d"):
        return words[2], words[3:]
    if words[0] == "python" and words[1:] and words[1].endswith(".py"):
        return words[1], words[2:]
    return None


def as_python(command: str) -> str | None:
    """Code that does what a command of ours does, so that commands can share a process; None for any other command.

    A server runs in the background until that process ends; `curl` asks it.
    """
    words = shlex.split(command)
    if words[0] == "curl":
        return f"import subprocess\nprint(subprocess.run({words!r}, check=True, stdout=-1, text=True, timeout={TIMEOUT}).stdout)"
    program = as_module(command)
    if program is None:
        return None
    target, arguments = program
    if target == PROGRAMS["minigpt3d"] and arguments[:1] == ["serve"] and "--help" not in arguments:
        return (
            f"import atexit, subprocess, sys\ncommand = [sys.executable, '-m', {target!r}, *{arguments!r}, '--port', '{SERVER}'.split(':')[1]]\n"
            "server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)\natexit.register(server.kill)\n"
            "print(server.stdout.readline())"
        )
    code = f"import runpy, sys\nsys.argv = {[target, *arguments]!r}\n"
    if not target.endswith(".py"):
        return f"{code}runpy.run_module({target!r}, run_name='__main__')"
    folder = str(Path(target).parent)  # where a script's own imports are looked up
    run = f"runpy.run_path({target!r}, run_name='__main__')"
    return f"{code}sys.path.insert(0, {folder!r})\ntry:\n    {run}\nfinally:\n    sys.path.remove({folder!r})"


def is_launch(command: str) -> bool:
    return shlex.split(command)[:2] == ["accelerate", "launch"]


def make_workspace(folder: Path):
    """A folder where documents' commands run: links to the checkout, and copies of what commands write to."""
    for path in ROOT.iterdir():
        if path.name in ("checkpoints", "demo"):
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith(".") and path.name not in ("build", "dist"):
            (folder / path.name).symlink_to(path)


def run_shell(command: str, cwd: Path) -> str:
    """Run a command, and return what it printed."""
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@lru_cache
def run_other(command: str, cwd: Path) -> str | None:
    """Run a command that is no Python program of ours, or check it where running would install, test or recurse; once.

    Returns:
        What it printed, or None where it was only checked.
    """
    words = shlex.split(command)
    if words[0] == "make":
        return run_make(words[1:], cwd)
    if words[:2] == ["pip", "install"]:
        for word in words[2:]:
            assert not word.endswith(".txt") or (ROOT / word).is_file(), f"no such file: {word}"
        return None
    if words[0] in ("git", "cd", "source", "."):
        return None
    return run_shell(command, cwd)


def run_make(targets: list[str], cwd: Path) -> str | None:
    """`make demo` in this environment; of other targets only that they exist."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    if targets != ["demo"]:
        process = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        return None
    python = cwd / "environment" / "bin" / "python"  # an environment that is up to date and runs this very Python
    if not python.exists():
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (cwd / "environment" / ".installed").touch()
    return run_shell("make --no-print-directory demo VENV=environment", cwd)


# ---- Check ----------------------------------------------------------------------------------------------------------


def help_command(command: str) -> str | None:
    """The command that prints the options of a command of ours; None for any other command."""
    program = as_module(command)
    if program is None:
        return None
    target, arguments = program
    subcommand = arguments[:1] if target == PROGRAMS["minigpt3d"] else []
    return shlex.join(["python", *([] if target.endswith(".py") else ["-m"]), target, *subcommand, "--help"])


def options_of(command: str) -> list[str]:
    """The options that a command of ours is given."""
    _, arguments = as_module(command)
    return [word.split("=")[0] for word in arguments if word.startswith("--")]


def has_option(help_text: str, option: str) -> bool:
    """Whether a help text lists an option, with dashes or underscores."""
    spellings = {option, option.replace("_", "-"), "--" + option[2:].replace("-", "_")}
    return any(re.search(rf"{re.escape(spelling)}(?![\w-])", help_text) for spelling in spellings)


def assert_options(command: str, help_text: str):
    unknown = [option for option in options_of(command) if not has_option(help_text, option)]
    assert not unknown, f"{command}: unknown {', '.join(unknown)}"


def mentioned_options(text: str) -> set[str]:
    """The options in backticks, outside of blocks."""
    codes = re.findall(r"`([^`\n]+)`", without_blocks(text))
    return {option for code in codes for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}


# ---- References -----------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(FENCE, "", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Links and pictures of a document that lead nowhere in this checkout."""
    text = without_blocks(path.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def unknown_references(text: str) -> list[str]:
    """Paths and names in backticks that are not in this checkout.

    `training/loop.py` and `training/` must exist; `training/loop.py::train` must define `train`. Paths outside the
    checkout's folders are not looked at, unless they name a Python file.
    """
    unknown = []
    for word in re.findall(r"`([\w./-]+(?:::\w+)?)`", without_blocks(text)):
        file, _, name = word.partition("::")
        folder = file.partition("/")[0] if "/" in file else ""
        in_checkout = folder != "" and (ROOT / folder).is_dir()
        if not (in_checkout or file.endswith(".py")):
            continue
        path = ROOT / file
        if not path.exists() or (name and not defines(path.read_text(encoding="utf-8"), name)):
            unknown.append(word)
    return unknown


def defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*{name}\b.*=", code, re.M) is not None


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))
