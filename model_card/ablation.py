"""The report of an ablation: ablation.json of `recipes/household/ablate` → Markdown, for itself and in a card."""

from collections.abc import Iterator
from pathlib import Path

from jinja2 import UndefinedError

from .facts import Fact, read_fact, take_marks
from .render import render


TITLE = "What each part of the recipe contributes"


def ablation_report(content: dict) -> str:
    """The report on the content of an ablation.json, as a document of its own."""
    return f"# {TITLE}\n\n{take_marks(_render(Fact(content, 'ablation.json'), '##'))[0]}"


def ablation_section(path: Path) -> str:
    """The report on an ablation.json as a section of a card, with marks around its facts.

    Raises:
        ValueError: the file is something else.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`ablation` {path}: no such file. Give the ablation.json, or its folder.")
    try:
        return _render(read_fact(path, "ablation.json"), "####").strip()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, UndefinedError) as error:
        raise ValueError(
            f"`ablation` {path}: expected an ablation.json, or its folder, as `python -m minigpt3d.recipes.household.ablate` "
            f"writes it, got {error!r:.100}."
        ) from error


def ablation_table(content: dict) -> str:
    """The report's table alone."""
    return take_marks(_table(Fact(content, "ablation.json")))[0]


def _render(ablation: Fact, heading: str) -> str:
    return render(
        "ablation.jinja",
        {
            "ablation": ablation,
            "heading": heading,
            "num_seeds": Fact(len(ablation["seeds"]), "ablation.json: number of seeds"),
            "minutes": ablation["minutes"].says(f"{ablation['minutes'].raw:.0f}"),
            "scale": ablation["scale"].says(f"{ablation['scale'].raw:g}"),
            "table": _table(ablation),
            "findings": list(_findings(ablation)),
        },
    )


def _table(ablation: Fact) -> str:
    """All variants with their differences to the full recipe."""
    measures = ablation["measures"].raw
    columns = [measure["title"] + (", %" if measure["unit"] == "share" else "") for measure in measures.values()]
    rows = {(row["variant"].raw, row["measure"].raw): row for row in ablation["rows"]}
    lines = [f"| variant | {' | '.join(f'{column} | difference' for column in columns)} |"]
    lines.append("|" + "-|" * (1 + 2 * len(columns)))
    for variant in dict.fromkeys(row["variant"] for row in ablation["rows"]):
        cells = [str(variant)]
        for name, measure in measures.items():
            row = rows[variant.raw, name]
            difference = _difference(row, measure["unit"]) if "p" in row else ""
            cells += [
                _value(row, measure["unit"]),
                f"**{difference}**" if _is_significant(row, ablation) else difference,
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _findings(ablation: Fact) -> Iterator[str]:
    """A sentence for each group of variants: its significant differences, and the size that others may have."""
    measures = ablation["measures"].raw
    for group in ablation["groups"]:
        rows = [row for row in ablation["rows"] if row["variant"].raw in group["variants"].raw]
        if not rows:
            continue
        significant = []
        for row in rows:
            if _is_significant(row, ablation):
                measure = measures[row["measure"].raw]
                significant.append(f"{row['variant']}: {measure['title']} {_difference(row, measure['unit'])}")
        differences = f"Significant: {'; '.join(significant)}. No other" if significant else "No"
        half = max(
            (row["difference_high"].raw - row["difference_low"].raw) / 2 for row in rows if row["measure"] == "kind"
        )
        place = f"ablation.json: half of the widest interval of a difference in kinds, {group['name'].raw}"
        yield (
            f"**{group['name']}** (the recipe: {group['recipe']}). "
            f"{differences} difference is significant. A difference in kinds is certain to be significant only above "
            f"{Fact(half, place).says(f'{100 * half:.1f}')} points, and above more after Holm's correction."
        )


def _is_significant(row: Fact, ablation: Fact) -> bool:
    return "p" in row and row["p"].raw < ablation["significance"].raw


def _value(row: Fact, unit: str) -> str:
    """ "71.0 (62.1 to 79.3)"."""
    return _with_interval(row, ("value", "low", "high"), unit, "")


def _difference(row: Fact, unit: str) -> str:
    """ "-2.5 (-7.0 to +1.9)"."""
    return _with_interval(row, ("difference", "difference_low", "difference_high"), unit, "+")


def _with_interval(row: Fact, keys: tuple[str, str, str], unit: str, sign: str) -> str:
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    middle, low, high = (row[key].says(f"{scale * row[key].raw:{sign}.{digits}f}") for key in keys)
    return f"{middle} ({low} to {high})"
