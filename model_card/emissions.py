"""Energy and emissions of a training, from the numbers that a user gives with their sources."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .facts import Fact


# What energy and emissions are computed from: unit and meaning.
GIVEN = {
    "hours": ("h", "wall time of the training"),
    "watts": ("W", "mean power of all devices together"),
    "pue": ("", "power usage effectiveness of the building (total power divided by the devices' power)"),
    "grid": ("g CO2e/kWh", "emissions of the electricity"),
}


@dataclass(frozen=True)
class Given:
    """A number that is in no file, and its source."""

    value: float
    source: str


def read_given(options: Iterable[str]) -> dict[str, Given]:
    """Parse `NAME=VALUE:SOURCE`, as in "watts=285:nvidia-smi, mean of the run".

    Returns:
        The numbers by name, a key of `GIVEN`.

    Raises:
        ValueError: an option has another form, or no source.
    """
    given = {}
    for option in options:
        name, _, rest = option.partition("=")
        value, _, source = rest.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        least = 1 if name == "pue" else 0
        if name not in GIVEN or not least <= number < math.inf or not source.strip():
            raise ValueError(
                f"`co2` {option!r}: expected NAME=VALUE:SOURCE with a name of {', '.join(GIVEN)}, a number of at least 0 "
                '(pue: 1) and its source, as in "watts=285:nvidia-smi, mean of the run".'
            )
        given[name] = Given(number, source.strip())
    return given


def estimate_emissions(hours: Fact | None, given: Mapping[str, Given]) -> dict:
    """Energy and emissions of the training, as far as their inputs are known.

    Args:
        hours: measured wall time; a given one has precedence.
        given: by name, a key of `GIVEN`.

    Returns:
        "inputs": the known ones as (meaning, fact, unit, source); "missing": the meanings of the others; "energy" in
        kWh and "emissions" in kg CO2e, each None if an input is missing.
    """
    values = {name: Fact(number.value, f"{number.source} (given: {name})") for name, number in given.items()}
    sources = {name: Fact(number.source, f"given: the source of {name}") for name, number in given.items()}
    if hours is not None and "hours" not in values:
        values["hours"], sources["hours"] = hours, Fact(hours.place, hours.place)
    energy = emissions = None
    if {"hours", "watts", "pue"} <= set(values):
        kwh = values["hours"].raw * values["watts"].raw * values["pue"].raw / 1000
        energy = Fact(kwh, "hours × watts × pue")
        if "grid" in values:
            emissions = Fact(kwh * values["grid"].raw / 1000, "hours × watts × pue × grid")
    return {
        "inputs": [
            (meaning, values[name], unit, sources[name]) for name, (unit, meaning) in GIVEN.items() if name in values
        ],
        "missing": [meaning for name, (_, meaning) in GIVEN.items() if name not in values],
        "energy": energy,
        "emissions": emissions,
    }
