"""The rows of a catalog, and how they become cells of a table."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from minigpt3d.readers_minigpt3d import printable


NOT_SURE = "not sure"
# Colors of a smaller share are not listed.
LEAST_SHARE = 0.01
# Columns beside the answers: name and type.
BEFORE = {"file": str, "node": str}
AFTER = {
    "kind": str, "confidence": float, "num_points": int, "num_faces": int, "has_color": bool, "up_axis": str,
    "side_x": float, "side_y": float, "side_z": float, "main_color": str, "colors": str, "warnings": str,
    "thumbnail": str, "error": str,
}  # fmt: skip
# A spreadsheet takes cells that begin with these for formulas.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


class Question(NamedTuple):
    """A question about every object.

    Args:
        name: of the column with its answers.
        text: the prompt.
    """

    name: str
    text: str


def check_questions(questions: Sequence[Question]):
    """
    Raises:
        ValueError: two columns would have one name.
    """
    names = [*BEFORE, *AFTER, "sides", *(question.name for question in questions)]
    for question in questions:
        if names.count(question.name) > 1:
            raise ValueError(
                f"`ask` {question.name}={question.text!r}: there is a column {question.name} already. Give another name."
            )


def measure(cloud, has_color: bool) -> dict:
    """Sides of the bounding box relative to the longest, y up, and the shares of the main colors, for (P, 6)."""
    from minigpt3d.evaluation.vocabulary.colors import COLORS, color_shares

    sides = cloud[:, :3].max(0) - cloud[:, :3].min(0)
    sides = {axis: round(float(side), 3) for axis, side in zip("xyz", sides / sides.max(), strict=True)}
    shares = sorted(zip(color_shares(cloud[:, 3:]), COLORS, strict=True), reverse=True) if has_color else ()
    return {"sides": sides, "colors": {name: round(float(share), 3) for share, name in shares if share >= LEAST_SHARE}}


def columns(questions: Sequence[Question], has_nodes: bool) -> dict[str, type]:
    """The columns of a table in their order, with their types."""
    before = {name: kind for name, kind in BEFORE.items() if name != "node" or has_nodes}
    return before | {question.name: str for question in questions} | AFTER


def to_cells(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """A row as cells of the columns; None where it has no value."""
    sides, colors = row.get("sides") or {}, row.get("colors") or {}
    flat = row | {f"side_{axis}": side for axis, side in sides.items()}
    flat |= {name: printable(row[name]) for name in ("file", "node", "thumbnail") if row.get(name)}
    flat["main_color"] = next(iter(colors), None)
    flat["colors"] = ", ".join(f"{name} {share:.0%}" for name, share in colors.items()) or None
    flat["warnings"] = "\n".join(row.get("warnings") or ()) or None
    return [flat.get(name) for name in names]


def safe_cell(value: Any) -> Any:
    """A cell that a spreadsheet shows as it is: a text that it would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.lstrip(" \u00a0").startswith(FORMULA_STARTS) else value


def json_line(record: dict) -> str:
    """JSON in which letters of all languages are readable and control characters are escaped."""
    text = json.dumps(record, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
