"""Scores and names as people read them: numbers in their units, intervals, Markdown."""

import re


def scaled(value: float, unit: str) -> float:
    """Shares as per cent, all else as it is."""
    return 100 * value if unit == "share" else value


def number(value: float, unit: str) -> str:
    """A score in its unit: "71.0 %" of a share."""
    return f"{scaled(value, unit):.{2 if unit == 'count' else 1}f}" + (" %" if unit == "share" else "")


def interval(low: float, high: float, unit: str) -> str:
    """Its ends in the same unit: "(61.5–79.0)"."""
    digits = 2 if unit == "count" else 1
    return f"({scaled(low, unit):.{digits}f}–{scaled(high, unit):.{digits}f})"


def with_interval(score: dict) -> str:
    """A score with its 95 % interval: "71.0 % (61.5–79.0)"."""
    return f"{number(score['value'], score['unit'])} {interval(score['low'], score['high'], score['unit'])}"


def escaped(text: str) -> str:
    """As Markdown shows it, on one line: what a model, a judge or a folder is called becomes no markup.

    An address may become a link to itself, as it is written.
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = _MARKUP.sub(lambda found: "\\" + found[0], text)
    return re.sub(r"\A(\d+)([.)])(?= )", r"\1\\\2", text)  # no list


# An underscore within a word is none, nor are #, >, + and - but at the start.
_MARKUP = re.compile(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])|\A[#>]|\A[+-](?= )|\A-(?=--)")


def same_judge(name: str | None) -> str | None:
    """What a model's name is compared by: without the folder or owner before it, letter case and kind of dash."""
    return name and name.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-").replace(" ", "-")


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first the head."""
    head, *body = ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join([head, "|" + "-|" * len(rows[0]), *body])
