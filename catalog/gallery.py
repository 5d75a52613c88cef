"""A catalog as one page that can be searched; it needs no network, and its policy allows none."""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from minigpt3d.readers_minigpt3d import printable

from .rows import AFTER, BEFORE, NOT_SURE


FOLDER = Path(__file__).parent


def write_gallery(path: Path, rows: Iterable[dict[str, Any]], columns: dict[str, type], title: str):
    """Write the page, a card for each row; every text of a row is escaped.

    Args:
        rows: with `picture`, a PNG in base64, where there is one.
        columns: of tables; those that every catalog has are shown in their own places, the others as answers.
        title: of the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("gallery.js", "gallery.css"))
    template = environment.get_template("gallery.jinja")
    answers = [name for name in columns if name not in BEFORE | AFTER]
    page = template.stream(
        title=title,
        cards=_cards(rows, answers),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    page.dump(str(path), encoding="utf-8", errors="backslashreplace")


def _cards(rows: Iterable[dict[str, Any]], answers: list[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        file = PurePosixPath(printable(row["file"].replace("\\", "/")))
        node = printable(row["node"]) if row.get("node") else None
        folder = "" if str(file.parent) == "." else f"{file.parent}/"
        colors = row["colors"] or {}
        texts = [str(file), node, *(row.get(name) for name in answers), row["kind"], *colors, row["error"]]
        size = [(row["num_points"], "points"), (row["num_faces"], "faces")]
        yield row | {
            "picture": row.get("picture"),
            "error": row["error"] and row["error"].removeprefix(f"{file}: "),
            "name": node or file.name,
            "place": str(file) if node else folder,
            "answers": [(name, row[name]) for name in answers if row.get(name)],
            "colors": colors,
            "warnings": row["warnings"] or (),
            "is_sure": row["kind"] != NOT_SURE,
            "size": next((f"{count:,} {what}" for count, what in size if count), None),
            "text": " ".join(filter(None, [*texts, *(row["warnings"] or ())])),
        }
