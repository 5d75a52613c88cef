"""Closed-set accuracy: the class that an answer names, out of a given list. Paper: §4, zero-shot ModelNet40."""

import re
from collections.abc import Callable, Iterator, Sequence

from .checks import check_pairs, check_texts
from .prompts import PROMPTS, ask_judge


VERDICT = re.compile(r"\s*(-1|[0-9]{1,6})\s*(?:#|\Z)")  # 3#reason


def closed_set_accuracy(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    classes: Sequence[str],
    aliases: dict[str, Sequence[str]] | None = None,
    judge: Callable | None = None,
    prompt: str | None = None,
) -> dict:
    """Share of answers that name their object's class, out of a given list of classes.

    Without a judge, it is the first class that the answer names (see `class_namer`). With a judge, the judge picks it.

    Args:
        predictions: the answers, one text per object.
        references: the objects' classes, each one of `classes`.
        classes: the names of all classes.
        aliases: other names by which an answer may name a class: {class: [names]}. Only without a judge.
        judge: takes a list of prompts, returns one reply per prompt: a text, or None if there is no reply.
        prompt: replaces the default prompt; a text with {answer} and {classes}. Only with a judge.

    Returns:
        accuracy: between 0 and 1.
        unparsed: number of answers that name no class or, with a judge, of replies that do not begin with a class number;
            they count as wrong.
        values: 1.0 or 0.0 per object.
        predicted: the class per object, or None.
        replies: the judge's reply per object; None without a judge.
    """
    check_pairs(predictions, references)
    _check_classes(classes, references)
    if judge is None:
        if prompt is not None:
            raise ValueError("`prompt` is given, but there is no judge: give `judge` too, or leave out `prompt`")
        name_class = class_namer(classes, aliases or {})
        predicted, replies = [name_class(answer) for answer in predictions], [None] * len(predictions)
        unparsed = predicted.count(None)
    else:
        if aliases is not None:
            raise ValueError("a judge recognizes other names by itself: leave out `aliases` or `judge`")
        numbered = "\n".join(f"{number}: {name}" for number, name in enumerate(classes))
        rows = [{"answer": answer, "classes": numbered} for answer in predictions]
        replies = ask_judge(judge, PROMPTS["closed_set_accuracy"] if prompt is None else prompt, rows)
        verdicts = [VERDICT.match(reply or "") for reply in replies]
        numbers = [int(verdict[1]) if verdict else len(classes) for verdict in verdicts]
        predicted = [classes[number] if 0 <= number < len(classes) else None for number in numbers]
        unparsed = sum(number >= len(classes) for number in numbers)  # -1 is a verdict: none of the classes
    values = [float(p == r) for p, r in zip(predicted, references, strict=True)]
    return {
        "accuracy": sum(values) / len(values),
        "unparsed": unparsed,
        "values": values,
        "predicted": predicted,
        "replies": replies,
    }


def _check_classes(classes, references):
    check_texts("classes", classes)
    if len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must contain each name once, got {classes!r}.")
    unknown = sorted(set(references) - set(classes))
    if unknown:
        raise ValueError(
            f"`references` contains {len(unknown)} names that are not in `classes`: {', '.join(map(repr, unknown[:5]))}. "
            "Use the spelling of `classes`."
        )


# ---- Without a judge ------------------------------------------------------------------------------------------------


def class_namer(classes: Sequence[str], aliases: dict[str, Sequence[str]]) -> Callable[[str], str | None]:
    """Make a function from an answer to the class that it names first, or None.

    Names are matched as whole words, singular or plural, ignoring case; the words of one name may be separated by a blank,
    hyphen, underscore or nothing, and a blank may stand for a slash. If one name begins with another, the longest counts
    ("TV stand", not "TV"). If names follow one another, the last counts: a "table lamp" is a lamp.

    Raises:
        ValueError: an alias of an unknown class, a name without letters, or one name for two classes.
    """
    unknown = [label for label in aliases if label not in classes]
    if unknown:
        raise ValueError(f"`aliases` has names for {unknown[:5]}, which are not in `classes`.")
    for label, names in aliases.items():
        check_texts(f"aliases[{label!r}]", names)
    class_by_name = _normalized_names(classes, aliases)
    for name, label in list(class_by_name.items()):
        for form in _inflections(name):
            class_by_name.setdefault(form, label)
    names = sorted(class_by_name, key=len, reverse=True)
    labels = [class_by_name[name] for name in names]
    patterns = [re.escape(name).replace("/", "(?: ?/ ?| )").replace(r"\ ", " ?") for name in names]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(f'({one})' for one in patterns)})(?!\w)")

    def name_class(answer: str) -> str | None:
        answer, last = _normalize(answer), None
        for match in pattern.finditer(answer):
            if last and answer[last.end() : match.start()] != " ":
                break
            last = match
        return labels[last.lastindex - 1] if last else None

    return name_class


def _normalized_names(classes, aliases) -> dict[str, str]:
    """Class by each of its normalized names."""
    class_by_name, class_by_reading = {}, {}
    for label in classes:
        for name in (label, *aliases.get(label, ())):
            normalized = re.sub(" ?/ ?", "/", _normalize(" ".join(name.split())))
            if not normalized.replace("/", "").strip():
                raise ValueError(f"{name!r} of class {label!r} has no letters, so no answer can contain it.")
            class_by_name[normalized] = label
            other = class_by_reading.setdefault(normalized.replace("/", " "), label)
            if other != label:
                raise ValueError(
                    f"{name!r} names two classes, {other!r} and {label!r}, so an answer would be ambiguous. Use one name."
                )
    return class_by_name


def _normalize(text: str) -> str:
    return re.sub(r"[ _-]+", " ", text.casefold()).strip()


def _inflections(name: str) -> Iterator[str]:
    """The regular plural of a name, and its singular if it is a plural; other forms that result are not words."""
    if re.search(r"(s|x|z|ch|sh|o)$", name):
        yield name + "es"
    if re.search(r"[^aeiou]y$", name):
        yield name[:-1] + "ies"
    if re.search(r"fe?$", name):
        yield re.sub(r"fe?$", "ves", name)
    if re.search(r"[^s]s$", name):
        yield name[:-1]
    yield name + "s"
