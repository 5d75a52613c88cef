"""What WordNet says about nouns: definition, what they are a kind of, and their parts.

Reads `index.noun` and `data.noun` of WordNet 3.0 (Debian's `wordnet-base`, in usr/share/wordnet).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


# Files of the lexicographers: animals, artifacts, bodies, food, natural objects, plants.
CONCRETE = ("05", "06", "08", "13", "17", "20")


@dataclass(frozen=True)
class Entry:
    """The first sense of a noun: its definition, what it is a kind of, and its parts."""

    definition: str
    kind_of: str
    parts: tuple[str, ...]


class WordNet:
    """An open database.

    Raises:
        ValueError: the folder does not hold it.
    """

    def __init__(self, folder: Path):
        try:
            index = (folder / "index.noun").read_text(encoding="utf-8")
            data = (folder / "data.noun").read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"`wordnet` {folder}: no index.noun and data.noun of WordNet there.") from error
        self.first_sense = {}
        for line in index.splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self.first_sense[fields[0]] = fields[6 + int(fields[3])]
        self.lines = {line[:8]: line for line in data.splitlines() if not line.startswith(" ")}

    def look_up(self, noun: str) -> Entry | None:
        """The entry of a noun, or of its last word; None if there is none."""
        for name in (noun.lower().replace(" ", "_"), noun.lower().split()[-1]):
            for form in (name, name.removesuffix("s"), name.removesuffix("es")):
                if offset := self.first_sense.get(form):
                    return self._entry(offset)
        return None

    def concrete_nouns(self, max_definition: int = 120) -> Iterator[dict]:
        """Noun, definition and kind of every noun whose first sense is a thing that can be seen."""
        for name, offset in sorted(self.first_sense.items()):
            if self.lines[offset].split()[1] in CONCRETE and name.replace("_", "").isalpha() and name.islower():
                entry = self._entry(offset)
                is_group = entry.kind_of.endswith((" genus", " family", " order"))
                if len(entry.definition) <= max_definition and not is_group:
                    yield {"noun": name.replace("_", " "), "definition": entry.definition, "kind_of": entry.kind_of}

    def _words(self, offset: str) -> list[str]:
        fields = self.lines[offset].split()
        return [fields[4 + 2 * number].replace("_", " ") for number in range(int(fields[3], 16))]

    def _entry(self, offset: str) -> Entry:
        relations, gloss = self.lines[offset].split(" | ", 1)
        fields = relations.split()
        first = 4 + 2 * int(fields[3], 16)
        pointers = [fields[first + 1 + 4 * n : first + 5 + 4 * n] for n in range(int(fields[first]))]
        above = [target for symbol, target, part_of_speech, _ in pointers if symbol == "@" and part_of_speech == "n"]
        parts = [target for symbol, target, _, _ in pointers if symbol == "%p"]
        definition = gloss.split('; "')[0].split(";")[0].strip()
        return Entry(
            definition, self._words(above[0])[0] if above else "", tuple(self._words(p)[0] for p in parts[:3])
        )
