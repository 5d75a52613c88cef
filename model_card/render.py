"""Fill a template with facts: the text has marks around every fact, from which its sources are read."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .evaluations import score_rows
from .facts import Fact
from .words import escaped, number


TEMPLATES = Path(__file__).parent


def render(template: str, facts: Mapping) -> str:
    """The text of a template of this folder, with marks around its facts."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "block": as_block,
        "code": as_code,
        "count": count,
        "fixed": fixed,
        "literal": as_literal,
        "percent": percent,
        "plain": as_plain_text,
        "rough": rough,
        "row": in_row,
        "score": as_score,
        "score_rows": score_rows,
        "words": in_words,
    }
    return environment.get_template(template).render(facts)


def fixed(fact: Fact, digits: int) -> Fact:
    """A number with so many digits after the point."""
    return fact.says(f"{fact.raw:,.{digits}f}")


def count(fact: Fact) -> Fact:
    """A count, with commas between thousands."""
    return fact.says(f"{fact.raw:,}")


def rough(fact: Fact) -> Fact:
    """Three significant digits; of larger numbers all digits before the point."""
    return fact.says(f"{fact.raw:,.0f}" if abs(fact.raw) >= 100 else f"{fact.raw:.3g}")


def percent(fact: Fact) -> Fact:
    """A share as a whole percentage."""
    return fact.says(f"{100 * fact.raw:.0f} %")


def as_score(fact: Fact, unit: Fact) -> Fact:
    """A score in its unit: shares as percentages."""
    return fact.says(number(fact.raw, unit.raw))


def in_row(fact: Fact) -> Fact:
    """A text as a cell of a table."""
    return fact.says(" ".join(str(fact.raw).split()).replace("|", "\\|"))


def as_plain_text(fact: Fact) -> Fact:
    """A name or a sentence from outside, without markup."""
    return fact.says(escaped(fact.raw))


def as_literal(name: Fact, part: str = "") -> Fact:
    """A name, and a folder in it, as a string of Python."""
    return name.says(json.dumps(name.raw + part, ensure_ascii=False))


def as_code(text: Fact, command: str = "") -> str:
    """A text as code within a line, whatever is in it.

    Args:
        command: whose last argument the text is.
    """
    line = " ".join((shlex.quote(text.raw) if command else text.raw).split("\n"))
    ticks = re.findall("`+", line)
    fence, blank = ("`" * (1 + max(map(len, ticks))), " ") if ticks else ("`", "")
    return f"{fence}{blank}{command}{' ' * bool(command)}{text.says(line)}{blank}{fence}"


def as_block(command: Fact | str) -> str:
    """A command as a block of code, whose fence is longer than any in the command."""
    ticks = re.findall("`+", command.raw if isinstance(command, Fact) else command)
    fence = "`" * max(3, 1 + max(map(len, ticks), default=0))
    return f"{fence}bash\n{command}\n{fence}"


def in_words(fact: Fact) -> Fact:
    """An identifier as words."""
    return fact.says(fact.raw.replace("_", " "))
