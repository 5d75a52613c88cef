"""Values that know where they stand, so that a text can be asked where each of its numbers comes from.

A `Fact` is a value and its place, as in `results.json#/scores/0/value` (a file, and a JSON pointer into it: RFC 6901). What
is taken out of a fact is a fact with a place of its own. Printed, a fact stands between marks; `take_marks` makes them a
list of sources, and `find_unsourced` finds the numbers that stand outside of all marks: somebody typed them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Around a fact's place and its text; of Unicode's private use, so that they are in no text of people.
_OPEN, _BETWEEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"[{_OPEN}{_BETWEEN}{_CLOSE}]")
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}]*?){_BETWEEN}([^{_OPEN}]*?){_CLOSE}")


class Fact:
    """A value and its place.

    Args:
        raw: the value, as JSON has it.
        place: `FILE#/POINTER`, or for a value that is computed, of what and how.
    """

    def __init__(self, raw: Any, place: str):
        self.raw, self.place = raw, place

    def __getitem__(self, key: str | int) -> "Fact | None":
        """A part of the value; None for JSON's null."""
        raw = self.raw[key]
        pointer = str(key).replace("~", "~0").replace("/", "~1")
        place = f"{self.place}{'' if '#' in self.place else '#'}/{pointer}"
        return None if raw is None else Fact(raw, place)

    def __iter__(self) -> Iterator["Fact | None"]:
        return (self[key] for key in range(len(self.raw)))

    def items(self) -> Iterator[tuple["Fact", "Fact | None"]]:
        """Of an object: its keys are facts, too."""
        for key in self.raw:
            value = self[key]
            yield Fact(key, value.place if value is not None else self.place), value

    def says(self, text: str) -> "Fact":
        """The same fact in other words."""
        return Fact(text, self.place)

    def __contains__(self, key) -> bool:
        return key in self.raw

    def __len__(self) -> int:
        return len(self.raw)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __eq__(self, other) -> bool:
        return self.raw == (other.raw if isinstance(other, Fact) else other)

    def __hash__(self) -> int:
        return hash(self.raw)

    def __str__(self) -> str:
        text = self.raw if isinstance(self.raw, str) else json.dumps(self.raw, ensure_ascii=False)
        return f"{_OPEN}{_MARK.sub('', self.place)}{_BETWEEN}{_MARK.sub('', text)}{_CLOSE}"


def read_fact(path: Path, name: str | None = None) -> Fact | None:
    """A JSON file, under a public name; None where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}). Write it again with the command that made it.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(raw).__name__}.")
    return Fact(raw, name or path.name)


def take_marks(marked: str) -> tuple[str, list[dict[str, str]]]:
    """The text without marks, and what of it holds numbers, in its order: `{"text", "source"}`."""
    sources = [{"text": text, "source": place} for place, text in _MARKED.findall(marked) if _NUMBER.search(text)]
    return _MARKED.sub(r"\2", marked), sources


# ---- Numbers that nobody vouches for --------------------------------------------------------------------------------

# What holds digits and states no quantity.
_NOT_PROSE = (
    r"\A---\n.*?\n---\n",  # metadata: names, and the model-index, which `minigpt3d.evaluation` makes of the results
    r"^(`{3,})[^`\n]*\n.*?^\1$",  # code, commands, BibTeX, the tables of a conversion
    r"\]\([^)\n]*\)",  # a link's target
    r"https?://\S+",
    r"\barXiv[: ]\d{4}\.\d{4,5}\b",
    # names of models, licenses, a hash and gases
    r"\b(?:MiniGPT-3D|[23]D|SHA-256|Phi-2|BLIP-2|ULIP-2|Apache-2\.0|BSD-3-Clause|CC BY-NC-SA 4\.0|CO2e?)(?!\w)",
)
_CODE = re.compile(r"`([^`\n]+)`")  # names of files and options, which may hold digits within a word
_NUMBER_ALONE = re.compile(r"(?<![\w.-])\d[\d.,]*(?:e-?\d+)?(?![\w.-])")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def find_unsourced(marked: str) -> list[str]:
    """The numbers in prose and tables that stand outside of marks, each with the words around it that are no facts."""
    text = _MARKED.sub(" ", marked)
    for pattern in _NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    text = _CODE.sub(lambda code: code[1] if _NUMBER_ALONE.search(code[1]) else " ", text)
    around = [text[max(0, found.start() - 30) : found.end() + 30] for found in _NUMBER.finditer(text)]
    return [" ".join(words.split()) for words in around]
