"""Values with their source, so that the source of every number in a text can be listed.

A `Fact` is a value and its place, as in `results.json#/scores/0/value` (a file and a JSON pointer: RFC 6901). A part of a
fact is a fact, too. In a text, a fact is printed between marks: `take_marks` turns the marks into a list of sources, and
`find_unsourced` finds the numbers outside of marks.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt3d.files import read_json


# Around a fact's place and its text; from Unicode's private use area, so that no other text contains them.
_OPEN, _BETWEEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"[{_OPEN}{_BETWEEN}{_CLOSE}]")
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}]*?){_BETWEEN}([^{_OPEN}]*?){_CLOSE}")


class Fact:
    """A value and its place.

    Args:
        raw: the value, as in JSON.
        place: `FILE#/POINTER`; for a computed value, a description of how it is computed.
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
        """Keys and values of an object; the keys are facts, too."""
        for key in self.raw:
            value = self[key]
            yield Fact(key, value.place if value is not None else self.place), value

    def says(self, text: str) -> "Fact":
        """The same place with another text."""
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
    """A JSON file; None if it does not exist.

    Args:
        name: of the file in places (default: its name).

    Raises:
        ValueError: the file holds no JSON object.
    """
    return Fact(read_json(path), name or path.name) if path.is_file() else None


def take_marks(marked: str) -> tuple[str, list[dict[str, str]]]:
    """Split a text with marks.

    Returns:
        The text without marks, and the facts in it that hold numbers, in order: `{"text", "source"}`.
    """
    sources = [{"text": text, "source": place} for place, text in _MARKED.findall(marked) if _NUMBER.search(text)]
    return _MARKED.sub(r"\2", marked), sources


# ---- Numbers without a source ---------------------------------------------------------------------------------------

# Digits that state no quantity.
_NOT_PROSE = (
    r"\A---\n.*?\n---\n",  # metadata: names, and the model-index, which is made from results.json
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
    """The numbers in prose and tables that are outside of marks, each with the words around it."""
    text = _MARKED.sub(" ", marked)
    for pattern in _NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    text = _CODE.sub(lambda match: match[1] if _NUMBER_ALONE.search(match[1]) else " ", text)
    contexts = [text[max(0, match.start() - 30) : match.end() + 30] for match in _NUMBER.finditer(text)]
    return [" ".join(context.split()) for context in contexts]
