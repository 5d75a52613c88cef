"""Write CREATORS.md: packs, creators and licenses of all captioned objects, and where to get them.

python -m minigpt3d.recipes.open_objects.creators
"""

from collections import defaultdict
from pathlib import Path

from minigpt3d.files import write_text

from .captioned_objects import FURNITURE_SOURCE, CaptionedObject, read_captions


CREATORS_FILE = Path(__file__).with_name("CREATORS.md")
# By source: who publishes the packs, and where.
PLACES = {
    "quaternius": ("Quaternius", "quaternius.com"),
    "quaternius-showcase": ("Quaternius", "quaternius.com"),
    "kenney": ("Kenney", "kenney.nl/assets"),
    "citybuilder": ("Kenney", "github.com/KenneyNL/Starter-Kit-City-Builder"),
    "kenney-racing": ("Kenney", "github.com/KenneyNL/Starter-Kit-Racing"),
    "kaykit": ("Kay Lousberg", "kaylousberg.com/game-assets"),
    "kaykit2": ("Kay Lousberg", "kaylousberg.com/game-assets"),
    "market": ("pmndrs market", "market.pmnd.rs"),
    FURNITURE_SOURCE: ("Sweet Home 3D", "sweethome3d.com, or Debian's sweethome3d-furniture"),
}


def creators(objects: list[CaptionedObject]) -> str:
    """The table of packs, and the creators of packs that have several, as Markdown."""
    packs = defaultdict(list)
    for item in objects:
        packs[item.source, item.pack].append(item)
    lines = ["# Creators of the captioned objects", ""]
    lines += ["The captions were written for this project. The models are not part of it.", ""]
    lines += ["| pack | objects | license | published by | where |", "|-|-|-|-|-|"]
    shared = {}
    for (source, pack), items in sorted(packs.items(), key=lambda entry: (PLACES[entry[0][0]], entry[0][1].lower())):
        publisher, place = PLACES[source]
        licenses = ", ".join(sorted({item.license for item in items}))
        lines.append(f"| {pack} | {len(items)} | {licenses} | {publisher} | {place} |")
        if {item.creator.lower() for item in items} != {publisher.lower()}:
            shared[pack] = items
    for pack, items in sorted(shared.items()):
        by_creator = defaultdict(list)
        for item in items:
            by_creator[item.creator].append(
                f"{item.noun} ({item.license})" if item.license != "CC0-1.0" else item.noun
            )
        lines += ["", f"## {pack}", ""]
        lines += [f"- {name}: {', '.join(sorted(nouns))}" for name, nouns in sorted(by_creator.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(CREATORS_FILE, creators(read_captions()))
