"""Snippets, commands and references of README.md and docs/ are run, compared and looked up.

How a block is treated:
- ```python blocks run in order, with one namespace for each document.
- ```bash blocks run line by line in a folder that looks like the checkout (a trailing backslash joins lines). Python
  programs of ours share one process with the snippets. `make demo` runs; of other `make` targets, installs and training
  launches only existence and options are checked.
- ```text right behind a block is its output; blanks count once, `...` stands for anything.
- `<!-- slow -->` before a block: it runs in the slow tests.
- `<!-- not run: reason -->` before a block: Python is compiled, and the options of commands are checked.
"""

import pytest
from documents import (
    DOCUMENTS,
    ROOT,
    all_blocks,
    anchors,
    as_module,
    as_python,
    assert_options,
    assert_output,
    broken_links,
    defines,
    has_option,
    help_command,
    is_launch,
    make_workspace,
    mentioned_options,
    read_blocks,
    read_commands,
    run_other,
    run_snippets,
    same_output,
    unique,
    unknown_references,
)


BLOCKS = all_blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]


def is_only_checked(block, command) -> bool:
    return not block.is_run or is_launch(command)


CHECKED = unique(
    command
    for block in BASH
    for command in read_commands(block.code)
    if is_only_checked(block, command) and as_module(command)
)

# The options that documents name outside of blocks are options of these.
HELPS = [
    f"python -m minigpt3d.cli {name} --help"
    for name in (
        "describe",
        "classify",
        "search",
        "chat",
        "convert",
        "verify",
        "pack",
        "evaluate",
        "compare",
        "card",
        "new",
        "look",
        "embed",
        "serve",
        "demo",
    )
]
HELPS += [
    f"python -m minigpt3d.{name} --help"
    for name in ("training.stage1", "training.finetune", "recipes.household", "recipes.household.ablate")
]
ACCELERATE_OPTIONS = {"--config_file", "--quiet"}


def title(block) -> str:
    return block.title


# ---- What is written ------------------------------------------------------------------------------------------------


def test_first_commands_of_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [c for block in read_blocks(text) if block.language == "bash" for c in read_commands(block.code)]
    assert {"make demo", "make test", "make test-fast"} <= set(commands[:4])
    assert len(text.splitlines()) <= 200


def test_installs_use_the_constraints():
    for command in (command for block in BASH for command in read_commands(block.code)):
        if command.startswith("pip install") and "minigpt3d" not in command:
            assert "-c constraints.txt" in command, command


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_references(path):
    assert broken_links(path) == []
    assert unknown_references(path.read_text(encoding="utf-8")) == []


# ---- What is run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    make_workspace(folder)
    return folder


def collect(slow: bool) -> list[tuple[str, str, str]]:
    """Namespace, title and code of everything that shares a process, repeated commands once."""
    snippets = []
    for block in BLOCKS:
        if not block.is_run or (block.mark == "slow") is not slow:
            continue
        if block.language == "python":
            snippets.append((block.document, block.title, block.code))
        elif block.language == "bash":
            commands = [c for c in read_commands(block.code) if not is_launch(c) and as_python(c)]
            snippets += [(command, command, as_python(command)) for command in commands]
    if not slow:
        snippets += [(command, command, as_python(command)) for command in [*map(help_command, CHECKED), *HELPS]]
    return unique(snippets)


def run_all(slow: bool, workspace) -> dict[str, tuple[str, str | None]]:
    snippets = collect(slow)
    outputs = run_snippets(snippets, workspace)
    return {name: output for (_, name, _), output in zip(snippets, outputs, strict=True)}


@pytest.fixture(scope="module")
def results(workspace):
    """Output and error of every snippet and command, by its title."""
    return run_all(False, workspace)


@pytest.fixture(scope="module")
def slow_results(workspace):
    return run_all(True, workspace)


def output_of(results, name: str) -> str:
    output, error = results[name]
    assert error is None, f"{name}\n{output}\n{error}"
    return output


def check_bash(block, results, workspace):
    outputs = []
    for command in read_commands(block.code):
        if is_launch(command):
            outputs.append(None)  # `test_options` checks it
        elif as_python(command):
            outputs.append(output_of(results, command))
        else:
            outputs.append(run_other(command, workspace))
    if block.output is not None:
        assert None not in outputs, f"{block.title} shows an output, but holds a command that is not run"
        assert_output(block, "".join(outputs))


@pytest.mark.parametrize("block", PYTHON, ids=title)
def test_python_snippets(block, request):
    compile(block.code, block.title, "exec")
    if block.is_run:
        assert_output(block, output_of(request.getfixturevalue("results"), block.title))


@pytest.mark.parametrize("block", [b for b in BASH if b.mark is None], ids=title)
def test_commands(block, results, workspace):
    check_bash(block, results, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BASH if b.mark == "slow"], ids=title)
def test_slow_commands(block, slow_results, workspace):
    check_bash(block, slow_results, workspace)


@pytest.mark.parametrize("command", CHECKED)
def test_options(command, results):
    shown = output_of(results, help_command(command))
    assert shown.startswith("usage: ")
    assert_options(command, shown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_in_text(path, results):
    helps = "\n".join(output_of(results, command) for command in HELPS)
    options = mentioned_options(path.read_text(encoding="utf-8")) - ACCELERATE_OPTIONS
    assert {option for option in options if not has_option(helps, option)} == set()


# ---- The helpers ----------------------------------------------------------------------------------------------------

EXAMPLE = """
# An example, with `code`

```python
number = 6 * 7
print("the answer  is", number)
```

```text
the answer is 42
```

Later blocks see earlier names.

<!-- slow -->
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


def test_read_blocks():
    blocks = read_blocks(EXAMPLE)
    assert [block.language for block in blocks] == ["python", "python", "python", "bash", "console"]
    assert [block.output for block in blocks] == ["the answer is 42\n", "43 xxx...\n", None, None, None]
    assert [block.mark for block in blocks] == [None, "slow", "not run: it needs the internet", None, None]
    assert [block.is_run for block in blocks] == [True, True, False, True, True]
    assert blocks[0].line == 4 and EXAMPLE.splitlines()[blocks[3].line - 1].strip() == "```bash"
    assert read_commands(blocks[3].code) == ["echo one    two", "make help"]


def test_snippets_share_a_namespace_and_report_errors(tmp_path):
    codes = ["x = 41", "print(x + 1)", "raise SystemExit(0)", "raise SystemExit(3)", "print(undefined)", "print(x)"]
    names = ["a", "a", "a", "a", "a", "b"]
    results = run_snippets([(name, code, code) for name, code in zip(names, codes, strict=True)], tmp_path)
    outputs, errors = zip(*results, strict=True)
    assert outputs == ("", "42\n", "", "", "", "")
    assert errors[:3] == (None, None, None)
    assert "3" in errors[3] and "NameError" in errors[4] and "NameError" in errors[5]


def test_programs_are_found_in_commands():
    assert as_module("minigpt3d describe x.glb") == ("minigpt3d.cli", ["describe", "x.glb"])
    assert as_module("accelerate launch --config_file a.yaml training/stage1.py --init b") == (
        "training/stage1.py",
        ["--init", "b"],
    )
    assert as_module("accelerate launch -m minigpt3d.training.stage4 --init b") == (
        "minigpt3d.training.stage4",
        ["--init", "b"],
    )
    assert as_module("make demo") is None and as_module("echo one") is None


def test_options_are_compared_with_the_help():
    assert help_command("minigpt3d pack --out DIR") == "python -m minigpt3d.cli pack --help"
    assert_options("minigpt3d pack --num_workers=2 --out DIR", "--num-workers N  --out DIR")
    for option in ("--num", "--none"):
        with pytest.raises(AssertionError, match=option):
            assert_options(f"minigpt3d pack {option} 1", "--num-workers N")


def test_other_commands_are_run_or_checked(tmp_path):
    assert run_other("echo one  two", tmp_path) == "one two\n"
    assert run_other("pip install -c constraints.txt -e .", tmp_path) is None
    for command in ("false", "make no-such-target", "pip install -r none.txt"):
        with pytest.raises(AssertionError):
            run_other(command, tmp_path)


def test_references_are_looked_up(tmp_path):
    assert anchors(EXAMPLE) == {"an-example-with-code"}
    (tmp_path / "a.md").write_text("# One\n[good](a.md#one) [good](https://example.org) [bad](b.md) ![bad](#two)")
    assert broken_links(tmp_path / "a.md") == ["b.md", "#two"]
    assert mentioned_options("`--data DIR` or `minigpt3d pack --max-broken`; --not-code") == {"--data", "--max-broken"}
    text = (
        "`tests/support/documents.py::defines` `tests/` `nowhere/x` `tests/none.py` `none.py` `hub.py::no_such_name`"
    )
    assert unknown_references(text) == ["tests/none.py", "none.py", "hub.py::no_such_name"]
    assert defines("class A:\n    def b(self): ...\nC: int = 1", "b") and not defines("d()", "d")


def test_output_comparison():
    assert same_output("a  b\n c", "a b c\n")
    assert same_output("took ... s", "took 1.3 s")
    assert not same_output("took ... s", "took 1.3 min")
    assert not same_output("a.b", "axb")
