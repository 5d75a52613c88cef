"""Account for every tensor: each one in a file is used, superseded or a named leftover; each parameter has one origin.

`account` needs names, shapes and dtypes only. Its steps are the functions below it, in the order of their calls. Every
step lists all problems that it finds, so that one message names them all.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from minigpt3d.messages import MultilineError

from .lora import LORA_KEY
from .names import (
    FILES,
    FOLDED,
    FUSED_ATTENTION,
    LEFTOVERS,
    SPLIT_ATTENTION,
    ZEROS,
    File,
    authors_name,
    first_name,
    matches,
    our_name,
    parts_of,
)


FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: keys of one file, several if the file has it in parts (`parts_of`)."""

    file: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' + '.join(self.keys)}"


@dataclass
class Account:
    """What became of every tensor, and where every parameter comes from.

    Args:
        origins: our name → where it comes from, LoRA factors included.
        superseded: (origin that a later file replaced, our name).
        aliases: (file, key, first key of the same tensor).
        leftovers: (file, key, reason).
        ignored: (file, key or missing name) that `ignore` let pass.
        zeros: our names that are in no file and are zero.
        new: our names that are in no file and are for training to learn.
    """

    origins: dict[str, Origin] = field(default_factory=dict)
    superseded: list[tuple[Origin, str]] = field(default_factory=list)
    aliases: list[tuple[str, str, str]] = field(default_factory=list)
    leftovers: list[tuple[str, str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def lora(self) -> list[str]:
        return [name for name in self.origins if LORA_KEY.fullmatch(name)]


def account(
    files: dict[File, dict[str, tuple[int, ...]]],
    expected: dict[str, torch.Size],
    lora_modules: Iterable[str] = (),
    is_new: Callable[[str], bool] = lambda name: False,
    ignore: Iterable[str] = (),
    are_equal: Callable[[str, str, str], bool] = lambda slot, key, first: True,
    dtypes: dict[str, dict[str, str]] | None = None,
) -> Account:
    """Find every parameter's origin, or list everything that does not fit.

    Args:
        files: keys and shapes in each file, in the order of loading.
        expected: our names and shapes of the model, or of the part that the files are for.
        lora_modules: modules that have LoRA factors in the files that give them.
        is_new: whether a parameter that no file gives is for training to learn.
        ignore: shell patterns of authors' keys, or of `slot:key`. A key that matches is not used where it is present, and
            not required where it is missing; another file must give it if the model needs it.
        are_equal: (slot, key, first key) → whether the tensors of two keys are equal.
        dtypes: of each slot's keys, such as "float16"; not checked by default.

    Raises:
        MultilineError: unknown keys, missing keys, unequal aliases, LoRA halves, wrong shapes or dtypes.
    """
    result, shapes = Account(), {}
    required = [*expected, *(f"{module}.lora_{matrix}.weight" for module in lora_modules for matrix in "AB")]
    problems, missing = [], set()
    for file, keys in files.items():
        given, unknown = _sort_keys(file, keys, expected, ignore, result)
        problems += unknown
        problems += _take_file(file, keys, given, expected, result, shapes)
        problems += _check_dtypes(given, dtypes[file.slot]) if dtypes else ()
        absent = [name for name in required if name not in given and matches(name, file.gives)]
        problems += _report_absent(file, absent, ignore, result, missing)
    problems += [
        f"{slot}: {key} should be the same tensor as {first}, but differs from it"
        for slot, key, first in result.aliases
        if not are_equal(slot, key, first)
    ]
    problems += _settle_without_file(expected.keys() - result.origins.keys() - missing, files, is_new, result)
    problems += _check_lora(result, shapes, expected)
    in_model = {*expected, *result.lora}
    problems += [
        f"{origin} (here {name}) is not in this configuration"
        for name, origin in result.origins.items()
        if name not in in_model
    ]
    if problems:
        raise MultilineError(_describe(problems, files))
    return result


def is_ignored(patterns: Iterable[str], slot: str, key: str) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(f"{slot}:{key}", pattern) for pattern in patterns)


# ---- One file -------------------------------------------------------------------------------------------------------


def _sort_keys(
    file: File, keys: dict, expected: dict, ignore: Iterable[str], result: Account
) -> tuple[dict[str, Origin], list[str]]:
    """Our name → origin of everything that the file gives, and problems; other keys go into `result`."""
    given: dict[str, Origin] = {}
    wholes = defaultdict(list)  # name of a part → our names that it goes into
    for name in expected:
        for part in parts_of(name):
            wholes[part].append(name)
    found = defaultdict(dict)  # our name → its part → key
    problems = []
    for key in keys:
        full = file.prefix + key
        reason = next((why for p, why in (LEFTOVERS | file.leftovers).items() if re.fullmatch(p, full)), None)
        first = first_name(full)
        name = our_name(first or full) or (full if full in expected else None)
        if reason is not None:
            result.leftovers.append((file.slot, key, reason))
        elif is_ignored(ignore, file.slot, key):
            result.ignored.append((file.slot, key))
        elif first in keys:
            result.aliases.append((file.slot, key, first))
        elif name is None:
            problems.append(f"{file.slot}: {key} is no tensor of MiniGPT-3D")
        elif name in wholes:
            for whole in wholes[name]:
                found[whole][name] = key
        elif name in given:
            problems.append(f"{file.slot}: {key} and {given[name].keys[0]} are both {name}")
        else:
            given[name] = Origin(file.slot, (key,))
    for name, parts in found.items():
        problems += _check_parts(file, name, parts, keys, given)
        given.setdefault(name, Origin(file.slot, tuple(parts[part] for part in parts_of(name) if part in parts)))
    return given, problems


def _check_parts(file: File, name: str, parts: dict[str, str], keys: dict, given: dict[str, Origin]) -> Iterator[str]:
    """Problems of a parameter that a file has in parts."""
    key, shapes = next(iter(parts.values())), [keys[key] for key in parts.values()]
    absent = [authors_name(part).removeprefix(file.prefix) for part in parts_of(name) if part not in parts]
    if absent:
        yield f"{file.slot}: {key} needs {', '.join(absent)} beside it"
    elif name in given:
        yield f"{file.slot}: {key} needs to be there once, not also as {given[name].keys[0]}"
    elif len({shape[:1] for shape in shapes}) > 1 or len({shape[1:] for shape in shapes if shape[1:]}) > 1:
        yield f"{file.slot}: {', '.join(parts.values())} have shapes that do not fit"


def _take_file(
    file: File, keys: dict, given: dict[str, Origin], expected: dict, result: Account, shapes: dict
) -> Iterator[str]:
    """Make the file the origin of what it gives, over the files before it; list what it should not hold."""
    for name, origin in given.items():
        if not matches(name, (*file.gives, *file.may_give)):
            yield f"{file.slot}: {origin.keys[0]} ({name}) is not what this file should hold"
            continue
        if name in result.origins:
            result.superseded.append((result.origins[name], name))
        shape = converted_shape([keys[key] for key in origin.keys], name)
        if name in expected and shape != tuple(expected[name]):
            yield f"{origin} has shape {shape}, the configuration needs {tuple(expected[name])}"
        result.origins[name], shapes[name] = origin, shape


def converted_shape(shapes: list[tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape of our parameter, from the shapes of its one tensor or of its parts in the authors' file."""
    shape = tuple(shapes[0])
    if ".mini_pointnet." in name and len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    if name in FOLDED and name.endswith(".bias"):
        return shape[:1]
    if name in FOLDED and "_linear_3." in name and len(shapes) > 1:
        return (shape[0], shape[1] // 2)
    if len(shapes) > 1 and name not in FOLDED:
        return (sum(part[0] for part in shapes), *shape[1:])
    if name.startswith("model.query_experts.") and len(shape) == 3 and shape[0] == 1:
        return shape[1:]
    return shape


def _check_dtypes(given: dict[str, Origin], dtypes: dict[str, str]) -> Iterator[str]:
    for origin in given.values():
        for key in origin.keys:
            if dtypes[key] not in FLOATS:
                yield f"{origin.file}: {key} is {dtypes[key]}, expected {' or '.join(FLOATS)}"


def _report_absent(
    file: File, absent: list[str], ignore: Iterable[str], result: Account, missing: set[str]
) -> Iterator[str]:
    """List parameters that the file must hold and does not, unless they are ignored."""
    for name in absent:
        key = _authors_key(name).removeprefix(file.prefix)
        if is_ignored(ignore, file.slot, key):
            result.ignored.append((file.slot, key))
            continue
        missing.add(name)
        or_split = f", or {', '.join(SPLIT_ATTENTION)} separately" if FUSED_ATTENTION in key and file.prefix else ""
        yield f"{file.slot}: {key} is missing{or_split} (it becomes {name})"


def _authors_key(name: str) -> str:
    """What the authors call our parameter, or the first of its parts."""
    return next(filter(None, map(authors_name, (name, *parts_of(name)))), name)


# ---- All files together ---------------------------------------------------------------------------------------------


def _settle_without_file(
    names: Iterable[str], files: Iterable[File], is_new: Callable[[str], bool], result: Account
) -> Iterator[str]:
    """Parameters that no file gives are zero, new, or missing."""
    for name in sorted(names):
        if matches(name, ZEROS):
            result.zeros.append(name)
        elif is_new(name):
            result.new.append(name)
        else:
            givers = [file.slot for file in files if matches(name, (*file.gives, *file.may_give))]
            yield (
                f"{_authors_key(name)} is missing from all files (it becomes {name}; {' or '.join(givers)} should have it)"
            )


def _check_lora(result: Account, shapes: dict, expected: dict) -> Iterator[str]:
    """Problems of LoRA factors: both must be in one file, and their product must fit a weight."""
    for name in result.lora:
        match, origin = LORA_KEY.fullmatch(name), result.origins[name]
        partner = f"{match['module']}.lora_{'B' if match['matrix'] == 'A' else 'A'}.weight"
        weight = expected.get(f"{match['module']}.weight")
        if partner not in result.origins:
            yield f"{origin} has no partner: {authors_name(partner)} is missing"
        elif result.origins[partner].file != origin.file:
            yield f"{origin} and {result.origins[partner]} are halves of different products"
        elif weight is None:
            yield f"{origin} belongs to no weight of this configuration"
        elif match["matrix"] == "A":
            a, b = shapes[name], shapes[partner]
            if len(a) != 2 or len(b) != 2 or b[1] != a[0] or (b[0], a[1]) != tuple(weight):
                yield f"{origin} and its partner have shapes {a} and {b}, their product does not fit {tuple(weight)}"


def _describe(problems: list[str], files: dict[File, dict]) -> str:
    """All problems in one message, and which file looks like another slot's."""
    lines = sorted(set(problems))
    listed = "\n  ".join([*_find_swapped(files), *lines])
    return (
        f"the tensors do not add up to the model of this configuration; {len(lines)} things do not fit:\n  {listed}\n"
        "Check that each file is complete and the right one. To leave a key out, or to accept that a file lacks it where "
        "another has it, name it by a pattern in `ignore`: 'PATTERN', or 'FILE:PATTERN' for one file."
    )


def _find_swapped(files: dict[File, dict]) -> Iterator[str]:
    for file, keys in files.items():
        if file not in FILES:
            continue
        counts = {}
        for candidate in FILES:
            full_names = [candidate.prefix + key for key in keys]
            names = [our_name(first_name(full) or full) for full in full_names]
            counts[candidate] = sum(name is not None and matches(name, candidate.gives) for name in names)
        best = max(counts, key=counts.get)
        if counts[best] > counts[file]:
            yield f"{file.slot}: this looks like the file of `{best.slot}` ({best.title})"
