"""README's snippets and commands are run, and what it shows as their output is compared.

How a README block is treated:
- ```python blocks run in order in one fresh process at the root, so that later ones use earlier names.
- ```bash blocks run line by line at the root (a trailing backslash joins lines), with build/ elsewhere. Not run but
  checked: installs, clones and environments; `make` targets (must exist); training launches (their script must exist and
  know every option). `make demo` runs, in this environment.
- ```text right behind a block is its output; blanks count once, `...` stands for anything.
- ```console and other languages are not looked at.
- `<!-- not run: reason -->` before a block exempts it; Python is compiled all the same.
"""

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


BLOCKS = read_blocks(README.read_text(encoding="utf-8"))


def test_first_commands_are_there():
    commands = [command for block in BLOCKS if block.language == "bash" for command in read_commands(block.code)]
    assert "make demo" in commands and "make test" in commands
    for command in commands:
        if command.startswith("pip install") and "minigpt3d" not in command:
            assert "-c constraints.txt" in command, f"installs without the constraints: {command}"


def test_links_lead_somewhere():
    text = re.sub(FENCE, "", README.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if not re.match(r"[a-z]+:|#", target):
            assert (ROOT / target.split("#")[0]).exists(), f"README links to {target}, which is not there"


def test_python_snippets():
    run_python([block for block in BLOCKS if block.language == "python"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One for all blocks, as later ones read what earlier ones wrote to build/."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "bash" and not b.reason], ids=lambda block: f"line{block.line}"
)
def test_commands(block, scratch):
    run_bash(block, scratch)


# The machinery itself ------------------------------------------------------------------------------------------------

EXAMPLE = """
# Example

```python
number = 6 * 7
print("the answer  is", number)
```

```text
the answer is 42
```

Later blocks see earlier names.

```python
print(number + 1, "x" * 50)
```
```text
43 xxx...
```

<!-- not run: it needs the internet -->
```python
raise SystemExit("never")
```

1. A list:
   ```bash
   echo one \\
     two   # a comment
   make help
   ```

```console
$ never --looked-at
```
"""


def test_blocks_are_read():
    blocks = read_blocks(EXAMPLE)
    assert [block.language for block in blocks] == ["python", "python", "python", "bash", "console"]
    assert [block.output for block in blocks] == ["the answer is 42\n", "43 xxx...\n", None, None, None]
    assert [block.reason for block in blocks] == [None, None, "it needs the internet", None, None]
    assert blocks[0].line == 4 and EXAMPLE.splitlines()[blocks[3].line - 1].strip() == "```bash"
    assert read_commands(blocks[3].code) == ["echo one    two", "make help"]


def test_snippets_share_a_namespace_and_outputs_are_compared(tmp_path):
    blocks = [block for block in read_blocks(EXAMPLE) if block.language == "python"]
    run_python(blocks, cwd=tmp_path)
    blocks[1].output = "44"
    with pytest.raises(AssertionError, match="but printed"):
        run_python(blocks, cwd=tmp_path)
    blocks[1].code = "print(undefined)"
    with pytest.raises(AssertionError, match="NameError"):
        run_python(blocks, cwd=tmp_path)


def test_commands_are_run_or_checked(tmp_path):
    assert run_command("echo one  two", tmp_path) == "one two\n"
    assert run_command("pip install -c constraints.txt -e .", tmp_path) is None
    for command in ("false", "make no-such-target", "accelerate launch training/none.py", "pip install -r none.txt"):
        with pytest.raises(AssertionError):
            run_command(command, tmp_path)


def test_output_comparison():
    assert same_output("a  b\n c", "a b c\n")
    assert same_output("took ... s", "took 1.3 s")
    assert not same_output("took ... s", "took 1.3 min")
    assert not same_output("a.b", "axb")
