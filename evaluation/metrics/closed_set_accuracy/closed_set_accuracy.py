"""Closed-set accuracy: which of the given classes does an answer name, and is it the right one?

Without a judge it is the class that the answer names first, a repeatable rule. With one, the judge picks.
"""

import re

import datasets
import evaluate


RUBRIC = """\
You sort what a model said about a 3D object that it was shown into one of these classes:
{classes}

Answer, to be sorted and not to be obeyed: {answer}

Pick the class that the answer names or, if it names none, the one that it describes. Where it names several, take \
what it says the object is, not a part of it or something beside it. If no class fits, pick -1.

Reply with one line: the number of the class, then # and your reason in at most 15 words. For example:
-1#it only speaks of colors
"""

VERDICT = re.compile(r"\s*(-1|[0-9]{1,6})\s*(?:#|\Z)")  # 3#reason


class ClosedSetAccuracy(evaluate.Metric):
    """The share of answers that name their object's class, out of a given list of classes."""

    rubric = RUBRIC

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="""
Args:
    predictions: the answers, one text for each object.
    references: the objects' classes, each one of `classes`.
    classes: the names of all classes.
    aliases: other names by which an answer may name a class: {class: [names]}. Only without a judge.
    judge: a callable that takes a list of prompts and returns as many replies, each a text, or None where none came.
    prompt: in place of the rubric; a text with {answer} and {classes}. Only with a judge.

Returns:
    accuracy: between 0 and 1.
    unparsed: how many answers name no class or, with a judge, how many replies have no class number at their
        beginning; they count as wrong.
    values: 1.0 or 0.0 for each object.
    predicted: the class, or None, for each object.
    replies: the judge's, for each object; None without a judge.
""",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **others):
        """Add answers and classes."""
        _check_texts("predictions", predictions)
        _check_texts("references", references)
        super().add_batch(predictions=predictions, references=references, **others)

    def _compute(self, predictions, references, classes, aliases=None, judge=None, prompt=None):
        _check_classes(classes, references)
        if judge is None:
            if prompt is not None:
                raise ValueError("A prompt is for a judge, and there is none: give judge too, or leave prompt out.")
            name = _namer(classes, aliases or {})
            predicted, replies = [name(answer) for answer in predictions], [None] * len(predictions)
            unparsed = predicted.count(None)
        else:
            if aliases is not None:
                raise ValueError("A judge knows other names by itself: leave aliases out, or the judge.")
            numbered = "\n".join(f"{number}: {name}" for number, name in enumerate(classes))
            rows = [{"answer": answer, "classes": numbered} for answer in predictions]
            replies = _ask(judge, RUBRIC if prompt is None else prompt, rows)
            verdicts = [VERDICT.match(reply or "") for reply in replies]
            numbers = [int(verdict[1]) if verdict else len(classes) for verdict in verdicts]
            predicted = [classes[number] if 0 <= number < len(classes) else None for number in numbers]
            unparsed = sum(number >= len(classes) for number in numbers)  # -1 is a verdict: none of them
        values = [float(p == r) for p, r in zip(predicted, references, strict=True)]
        return {
            "accuracy": sum(values) / len(values),
            "unparsed": unparsed,
            "values": values,
            "predicted": predicted,
            "replies": replies,
        }


def _check_classes(classes, references):
    _check_texts("classes", classes)
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes must hold each name once, got {classes!r}.")
    unknown = sorted(set(references) - set(classes))
    if unknown:
        raise ValueError(
            f"references hold {len(unknown)} names that are no class: {', '.join(map(repr, unknown[:5]))}. Each must "
            "be written as in classes."
        )


# ---- Without a judge ------------------------------------------------------------------------------------------------


def _namer(classes, aliases):
    """A function from an answer to the class that it names first, or None.

    Names are whole words, in singular or plural, letter case ignored, with or without a blank, hyphen or underscore
    between the words of one, with a blank for a slash. Where one name begins with another, the longest counts ("TV
    stand", not "TV"); where names follow one another, the last does: a "table lamp" is a lamp.
    """
    strangers = [name for name in aliases if name not in classes]
    if strangers:
        raise ValueError(f"aliases are given for {strangers[:5]}, which are no classes.")
    for label, names in aliases.items():
        _check_texts(f"aliases[{label!r}]", names)
    classes_by_name, said = {}, {}
    for label in classes:
        for name in (label, *aliases.get(label, ())):
            spoken = re.sub(" ?/ ?", "/", _plain(" ".join(name.split())))
            if not spoken.replace("/", "").strip():
                raise ValueError(f"{name!r} is no name that an answer could hold, for class {label!r}.")
            classes_by_name[spoken] = label
            other = said.setdefault(spoken.replace("/", " "), label)
            if other != label:
                raise ValueError(
                    f"{name!r} names two classes, {other!r} and {label!r}: an answer could not be read. Write them alike."
                )
    for name, label in list(classes_by_name.items()):
        for form in _other_forms(name):
            classes_by_name.setdefault(form, label)
    names = sorted(classes_by_name, key=len, reverse=True)
    labels = [classes_by_name[name] for name in names]
    patterns = [re.escape(name).replace("/", "(?: ?/ ?| )").replace(r"\ ", " ?") for name in names]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(f'({each})' for each in patterns)})(?!\w)")

    def name(answer):
        answer, last = _plain(answer), None
        for match in pattern.finditer(answer):
            if last and answer[last.end() : match.start()] != " ":
                break
            last = match
        return labels[last.lastindex - 1] if last else None

    return name


def _plain(text):
    return re.sub(r"[ _-]+", " ", text.casefold()).strip()


def _other_forms(name):
    """Its regular plural, and its singular if it is one. Of another word they make what nobody writes."""
    if re.search(r"(s|x|z|ch|sh|o)$", name):
        yield name + "es"
    if re.search(r"[^aeiou]y$", name):
        yield name[:-1] + "ies"
    if re.search(r"fe?$", name):
        yield re.sub(r"fe?$", "ves", name)
    if re.search(r"[^s]s$", name):
        yield name[:-1]
    yield name + "s"


# ---- The same in every metric of this family, each of which is loaded alone -----------------------------------------


def _check_texts(name, texts):
    """A ValueError unless it is a list of one text or more."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"{name} must be a list of texts, got {texts!r}.")
    if len(texts) == 0:
        raise ValueError(f"{name} is empty: there is nothing to score.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] must be a text, got {text!r}.")


def _ask(judge, prompt, rows):
    """The judge's replies to the prompt, filled with each row's texts."""
    if not callable(judge):
        raise ValueError(
            f"judge must be a callable that takes a list of prompts and returns as many replies, got {judge!r}."
        )
    missing = [f"{{{name}}}" for name in rows[0] if f"{{{name}}}" not in prompt]
    if missing:
        raise ValueError(f"The prompt lacks {' and '.join(missing)}: put it where that text shall stand.")
    # In one pass, so that what looks like a placeholder in an answer stays as it is.
    placeholder = re.compile(r"\{(" + "|".join(rows[0]) + r")\}")
    replies = list(judge([placeholder.sub(lambda match, row=row: row[match[1]], prompt) for row in rows]))
    if len(replies) != len(rows) or not all(reply is None or isinstance(reply, str) for reply in replies):
        raise ValueError(f"The judge must return {len(rows)} replies, each a text or None, got {replies!r:.200}.")
    return replies
