"""Scores and names for people: numbers in their units, intervals, conditions, Markdown."""

import re


# Conditions of objects with their names in texts: the objects as they are, and the controls. All others are corruptions.
CONDITIONS = {
    "seeing": "as it is",
    "blind": "blind",
    "no_color": "color removed",
    "shuffled": "another object's answer",
}


def scaled(value: float, unit: str) -> float:
    """A share as a percentage, other scores unchanged."""
    return 100 * value if unit == "share" else value


def number(value: float, unit: str) -> str:
    """A score in its unit: "71.0 %" of a share."""
    return f"{scaled(value, unit):.{2 if unit == 'count' else 1}f}" + (" %" if unit == "share" else "")


def interval(low: float, high: float, unit: str) -> str:
    """The ends of an interval in the unit: "(61.5–79.0)"."""
    digits = 2 if unit == "count" else 1
    return f"({scaled(low, unit):.{digits}f}–{scaled(high, unit):.{digits}f})"


def escaped(text: str) -> str:
    """Escape Markdown in the name of a model, judge or folder, and put it on one line.

    A URL may still become a link to itself.
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = _MARKUP.sub(lambda match: "\\" + match[0], text)
    return re.sub(r"\A(\d+)([.)])(?= )", r"\1\\\2", text)  # else a numbered list


# An underscore within a word is no markup; #, >, + and - are markup at the start only.
_MARKUP = re.compile(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])|\A[#>]|\A[+-](?= )|\A-(?=--)")


def same_judge(name: str | None) -> str | None:
    """A model's name for comparisons: without folder or owner, in lower case, with one kind of dash."""
    return name and name.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-").replace(" ", "-")


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table of rows of cells; the first row is the head."""
    head, *body = ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join([head, "|" + "-|" * len(rows[0]), *body])
