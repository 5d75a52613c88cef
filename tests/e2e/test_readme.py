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

import re

import pytest
from documents import FENCE, README, ROOT, read_blocks, read_commands, run_bash, run_command, run_python, same_output


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
