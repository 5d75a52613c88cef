"""The authors' state dicts and ours: one table of names, read in both directions, and every key accounted for.

What comes in is used, superseded by a later file, or a named leftover; what the model needs comes from one place.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

from .lora import LORA_KEY, lora_scale
from .names import ALIASES, FILES, FUSED_ATTENTION, LEFTOVERS, NAMES, SPLIT_ATTENTION, ZEROS, File


FLOATS = ("float16", "bfloat16", "float32", "float64")


# ---- Names ----------------------------------------------------------------------------------------------------------

_SPLIT_KEY = re.compile(
    rf"(?P<attention>.+\.self_attn)\.(?P<which>{'|'.join(SPLIT_ATTENTION)})\.(?P<kind>weight|bias)"
)


def _compile(table: dict[str, str]) -> list[tuple[re.Pattern, str, str]]:
    """Rows of a table of names, the longest beginning first."""
    rows = sorted(table.items(), key=lambda item: -len(item[0]))
    return [(re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), old, new) for old, new in rows]


def _rename(name: str, rows: list[tuple[re.Pattern, str, str]]) -> str | None:
    """`name` with the first matching beginning replaced; None where nothing matches."""
    for pattern, old, new in rows:
        if match := pattern.match(name):
            return new.replace("#", match[1] if "#" in old else "#") + name[match.end() :]
    return None


_TO_OURS, _ORIGINALS = _compile(NAMES), _compile(ALIASES)
_TO_AUTHORS = _compile(
    {ours: theirs for theirs, ours in NAMES.items() if theirs != "query_expert_dict.#"}
    | {"model.query_experts.#.weight": "query_expert_dict.#"}
)


def our_name(name: str) -> str | None:
    """Our name of the authors' tensor, old and new peft spellings alike; None where the table has none."""
    name = _rename(name.replace(".base_layer.", "."), _TO_OURS)
    return name and re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name)


def authors_name(name: str) -> str | None:
    """The authors' name of our tensor (the inverse of `our_name`); None where the table has none."""
    name = _rename(name, _TO_AUTHORS)
    return name and re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", name)


def expected_shapes(config: MiniGPT3DConfig, part: str = "") -> dict[str, torch.Size]:
    """Shapes of what a model's files hold, or of the part of it whose names begin so; tied weights count once."""
    with torch.device("meta"):
        model = MiniGPT3DForConditionalGeneration(config)
    tied = model.all_tied_weights_keys
    return {name: t.shape for name, t in model.state_dict().items() if name.startswith(part) and name not in tied}


# ---- Accounting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: keys of one file; three of them where the file has q, k and v apart."""

    file: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' + '.join(self.keys)}"


@dataclass
class Account:
    """What became of every tensor, and where every parameter comes from.

    Args:
        origins: our name → where it comes from, LoRA factors among them.
        superseded: (origin that a later file took the place of, our name).
        aliases: (file, key, key of the same tensor).
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
    new: Callable[[str], bool] = lambda name: False,
    ignore: Iterable[str] = (),
    same: Callable[[str, str, str], bool] = lambda slot, key, original: True,
    dtypes: dict[str, dict[str, str]] | None = None,
) -> Account:
    """Find every parameter's origin, and say all that does not fit in one message.

    Args:
        files: keys and shapes in each file, in the order of loading.
        expected: our names and shapes of the model, or of the part that the files are for.
        lora_modules: modules that have LoRA factors in the files that give them.
        new: whether a parameter that no file gives is for training to learn.
        ignore: shell patterns of authors' keys, or of `slot:key`: what they match is not used where it is, and not asked of
            the file where it is missing. Another file must give it, if the model needs it.
        same: whether two keys of a file hold equal tensors.
        dtypes: of each slot's keys, such as "float16"; not looked at by default.

    Raises:
        ValueError: keys that nothing knows, keys that are missing, second names of other tensors, LoRA halves, wrong
            shapes or dtypes.
    """
    result, problems = Account(), []
    required = [*expected, *(f"{module}.lora_{matrix}.weight" for module in lora_modules for matrix in "AB")]
    shapes: dict[str, tuple[int, ...]] = {}
    missing: set[str] = set()
    for file, keys in files.items():
        ignored = partial(is_ignored, ignore, file.slot)
        given = _names_in(file, keys, expected, result, problems, ignored)
        for name, origin in given.items():
            if not _matches(name, (*file.gives, *file.may_give)):
                problems.append(f"{file.slot}: {origin.keys[0]} ({name}) is not what this file should hold")
                continue
            if name in result.origins:
                result.superseded.append((result.origins[name], name))
            shape = _our_shape([keys[key] for key in origin.keys], name)
            if name in expected and shape != tuple(expected[name]):
                problems.append(f"{origin} has shape {shape}, the configuration needs {tuple(expected[name])}")
            allowed = ("int64",) if name.endswith("num_batches_tracked") else FLOATS
            for key in origin.keys if dtypes else ():
                if dtypes[file.slot][key] not in allowed:
                    problems.append(f"{file.slot}: {key} is {dtypes[file.slot][key]}, expected {' or '.join(allowed)}")
            result.origins[name], shapes[name] = origin, shape
        for name in required:
            if name not in given and _matches(name, file.gives):
                key = (authors_name(name) or name).removeprefix(file.prefix)
                if ignored(key):
                    result.ignored.append((file.slot, key))
                else:
                    missing.add(name)
                    apart = (
                        f", or {', '.join(SPLIT_ATTENTION)} apart" if FUSED_ATTENTION in key and file.prefix else ""
                    )
                    problems.append(f"{file.slot}: {key} is missing{apart} (it becomes {name})")
    for slot, key, original in result.aliases:
        if not same(slot, key, original):
            problems.append(f"{slot}: {key} should be the same tensor as {original}, but differs from it")
    for name in expected.keys() - result.origins.keys() - missing:
        if _matches(name, ZEROS):
            result.zeros.append(name)
        elif new(name):
            result.new.append(name)
        else:
            givers = [file.slot for file in files if _matches(name, (*file.gives, *file.may_give))]
            problems.append(
                f"{authors_name(name)} is missing from all files (it becomes {name}; {' or '.join(givers)} should have it)"
            )
    problems += _lora_problems(result, shapes, expected)
    known = {*expected, *result.lora}
    problems += [
        f"{o} (here {name}) is not in this configuration" for name, o in result.origins.items() if name not in known
    ]
    if problems:
        raise ValueError(_report(problems, files))
    result.zeros.sort()
    result.new.sort()
    return result


def is_ignored(patterns: Iterable[str], slot: str, key: str) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(f"{slot}:{key}", pattern) for pattern in patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _names_in(file: File, keys: dict, expected: dict, result: Account, problems: list[str], ignored) -> dict:
    """Our name of everything that one file gives; what is left over or an alias goes into `result`."""
    given: dict[str, Origin] = {}
    split: dict[str, dict[str, str]] = {}
    for key in keys:
        full = file.prefix + key
        reason = next((why for p, why in (LEFTOVERS | file.leftovers).items() if re.fullmatch(p, full)), None)
        original = _rename(full, _ORIGINALS)
        name = our_name(original or full)
        if reason is not None:
            result.leftovers.append((file.slot, key, reason))
        elif ignored(key):
            result.ignored.append((file.slot, key))
        elif original in keys:
            result.aliases.append((file.slot, key, original))
        elif name is None:
            problems.append(f"{file.slot}: {key} is no tensor of MiniGPT-3D")
        elif (match := _SPLIT_KEY.fullmatch(name)) and (fused := _fused_name(match)) in expected:
            split.setdefault(fused, {})[match["which"]] = key
        elif name in given:
            problems.append(f"{file.slot}: {key} and {given[name].keys[0]} are both {name}")
        else:
            given[name] = Origin(file.slot, (key,))
    for name, parts in split.items():
        if name in given or len(parts) < len(SPLIT_ATTENTION):
            absent = [which for which in SPLIT_ATTENTION if which not in parts]
            what = (
                f"{', '.join(absent)} beside it" if absent else f"to be there once, not also as {given[name].keys[0]}"
            )
            problems.append(f"{file.slot}: {next(iter(parts.values()))} needs {what}")
        elif len({keys[key] for key in parts.values()}) > 1:
            problems.append(f"{file.slot}: {', '.join(parts.values())} have different shapes")
        given.setdefault(name, Origin(file.slot, tuple(parts[which] for which in SPLIT_ATTENTION if which in parts)))
    return given


def _fused_name(match: re.Match) -> str:
    return f"{match['attention']}.{FUSED_ATTENTION}.{match['kind']}"


def _our_shape(shapes: list[tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape that `to_our_shape` gives."""
    shape = tuple(shapes[0])
    if len(shapes) > 1:  # q, k and v
        return (sum(each[0] for each in shapes), *shape[1:])
    if ".mini_pointnet.linear_" in name and len(shape) == 3 and shape[2] == 1:
        return shape[:2]
    if name.startswith("model.query_experts.") and len(shape) == 3 and shape[0] == 1:
        return shape[1:]
    return shape


def _lora_problems(result: Account, shapes: dict, expected: dict) -> Iterable[str]:
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


def _report(problems: list[str], files: dict) -> str:
    """All problems, and which file looks like another slot's."""
    lines, count = sorted(set(problems)), len(set(problems))
    for file, keys in files.items():
        if file not in FILES:
            continue
        fits = {}
        for other in FILES:
            names = [our_name(_rename(other.prefix + key, _ORIGINALS) or other.prefix + key) for key in keys]
            fits[other] = sum(name is not None and _matches(name, other.gives) for name in names)
        best = max(fits, key=fits.get)
        if best is not file and fits[best] > fits[file]:
            lines.insert(0, f"{file.slot}: this looks like the file of --{best.slot.replace('_', '-')} ({best.title})")
    listed = "\n  ".join(lines)
    return (
        f"the tensors do not add up to the model of this configuration; {count} things do not fit:\n  {listed}\n"
        "Check that each file is the right one and whole. To leave a key out, or to do without it in a file where "
        "another gives it, name it by a pattern: --ignore 'PATTERN', or 'FILE:PATTERN' for one file."
    )


# ---- Tensors --------------------------------------------------------------------------------------------------------


def fuse_attention(parts: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    """q, k, v of shape (D, ...) each → (3*D, ...) laid out (heads, 3, head_dim), as TinyGPT-V has it."""
    return torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], dim=1).flatten(0, 2)


def to_our_shape(tensors: list[torch.Tensor], name: str, config: MiniGPT3DConfig) -> torch.Tensor:
    """1×1 convolutions are linear layers here, query tokens have no batch dimension, q, k and v are one matrix."""
    if len(tensors) > 1:
        return fuse_attention(tensors, config.text_config.num_attention_heads)
    return tensors[0].reshape(_our_shape([tuple(tensors[0].shape)], name))


def merge_lora_factors(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + alpha/r · B A, in float32."""
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


class Reader:
    """Tensors of the model by our names, read one at a time from where the account says.

    Args:
        accounted: of the files.
        config: of the model.
        read: (file's slot, key) → tensor.
        fresh: our name → initial value of a parameter that is new.
        scale: (module, rank) → factor of its LoRA product.
    """

    def __init__(
        self,
        accounted: Account,
        config: MiniGPT3DConfig,
        expected: dict[str, torch.Size],
        read: Callable[[str, str], torch.Tensor],
        fresh: Callable[[str], torch.Tensor] | None = None,
        scale: Callable[[str, int], float] = lora_scale,
    ):
        self.accounted, self.config, self.expected, self.fresh = accounted, config, expected, fresh
        self.read, self.scale = read, scale
        self.lora = set(accounted.lora)

    def __call__(self, name: str, merge_lora: bool = False) -> torch.Tensor:
        """The parameter; with its LoRA product added if asked for and it has one, then in float32."""
        origin = self.accounted.origins.get(name)
        if origin is None:
            return torch.zeros(self.expected[name]) if name in self.accounted.zeros else self.fresh(name)
        tensor = to_our_shape([self.read(origin.file, key) for key in origin.keys], name, self.config)
        module = name.removesuffix(".weight")
        if merge_lora and f"{module}.lora_A.weight" in self.lora:
            lora_a, lora_b = self(f"{module}.lora_A.weight"), self(f"{module}.lora_B.weight")
            tensor = merge_lora_factors(tensor, lora_a, lora_b, self.scale(module, len(lora_a)))
        return tensor


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], config: MiniGPT3DConfig, merge_lora: bool = True, part: str = ""
) -> dict[str, torch.Tensor]:
    """The authors' state dict as ours.

    Args:
        state_dict: the authors' names, LoRA matrices as peft wrote them (old spelling or new).
        config: the model that the result is for.
        merge_lora: add the LoRA products to their weights; otherwise they stay, as `….lora_A.weight` and
            `….lora_B.weight` under our names, for the adapter of `lora_config`.
        part: only this part of the model is in the file, by our name, such as "model.qformer"; by default all of it.

    Returns:
        State dict of `MiniGPT3DForConditionalGeneration` (of `part` alone where given), complete and nothing else, in
        the dtypes that came in.

    Raises:
        ValueError: keys that nothing knows, keys that are missing, LoRA halves, aliases that differ, wrong shapes;
            all of them in one message.
    """
    expected = expected_shapes(config, part)
    if not expected:
        raise ValueError(f"part must be the beginning of our names, such as 'model.qformer', got {part!r}.")
    file = File("state dict", "a state dict", gives=(r"(?!.*lora_).*",), may_give=(r".*",))
    same = lambda slot, key, original: torch.equal(state_dict[key], state_dict[original])  # noqa: E731
    accounted = account({file: {key: tuple(tensor.shape) for key, tensor in state_dict.items()}}, expected, same=same)
    reader = Reader(accounted, config, expected, lambda slot, key: state_dict[key])
    names = [*expected, *([] if merge_lora else accounted.lora)]
    return {name: _like(reader(name, merge_lora), state_dict, accounted.origins.get(name)) for name in names}


def _like(tensor: torch.Tensor, state_dict: dict[str, torch.Tensor], origin: Origin | None) -> torch.Tensor:
    return tensor if origin is None else tensor.to(state_dict[origin.keys[0]].dtype)
