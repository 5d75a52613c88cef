"""Texts about an object: captions and questions in several wordings, and answers that geometry and points decide.

Half of the yes/no answers are "no". Shapes that are nothing get one answer to the question what they are: `NOT_SURE`.
"""

from dataclasses import dataclass

import numpy as np

from minigpt3d.evaluation.vocabulary.articles import is_plural, with_article
from minigpt3d.evaluation.vocabulary.colors import COLORS, color_shares
from minigpt3d.recipes.household.captions import (
    BRIEF_QUESTIONS,
    COLOR_QUESTIONS,
    DETAILED_QUESTIONS,
    Facts,
    shape_answer,
)

from .nothing import NOTHING
from .wordnet import Entry


NOT_SURE = "I am not sure what this is."
KIND_QUESTIONS = (
    "What kind of thing is it?",
    "Which kind of thing is this?",
    "What group of things does it belong to?",
)
SHAPE_QUESTIONS = ("What shape is it?", "Describe its proportions.", "How is it proportioned?")
SHAPES = (
    "tall and narrow", "taller than wide", "very flat", "thin like a board", "low and wide", "wider than tall",
    "about as tall as wide",
)  # fmt: skip
MOST_GIST = 16  # words of the captions among the keywords
# Kinds that name a thing, so that "Is this a …?" can be asked with them.
NAMING_KINDS = frozenset(
    "tree building plant container chair person rock table tool lamp door cabinet gun car fish animal bed sofa sword shelf "
    "book fence dinosaur truck spacecraft flower robot bridge train aircraft boat".split()
)


@dataclass(frozen=True)
class Described:
    """What texts are made from.

    Args:
        object_id: in records.
        noun, kind, brief, detailed, questions, material: of the caption; noun and kind are `NOTHING` for nothing.
        colors: main color of the points, then other colors of at least a sixth of them.
        extent: width, height and depth of the bounding box, y up.
        meaning: what WordNet says about the noun.
    """

    object_id: str
    noun: str
    kind: str
    brief: str
    detailed: str
    questions: tuple[tuple[str, str], ...]
    material: str
    colors: tuple[str, ...]
    extent: tuple[float, float, float]
    meaning: Entry | None = None

    @property
    def is_nothing(self) -> bool:
        return self.kind == NOTHING

    @property
    def shape(self) -> str:
        """Proportions in words."""
        return shape_answer(Facts(self.noun, self.noun, None, "", self.colors, self.extent))

    @property
    def thing(self) -> str:
        """Main color and noun, with an article."""
        words = self.noun.split()
        return with_article(self.noun if set(words) & set(COLORS) else f"{self.colors[0]} {self.noun}")


def measure(cloud: np.ndarray) -> tuple[tuple[str, ...], tuple[float, float, float]]:
    """Colors and extent of a cloud (N, 6), see `Described`."""
    shares = color_shares(cloud[:, 3:])
    order = np.argsort(-shares, kind="stable")
    colors = (COLORS[order[0]], *(COLORS[i] for i in order[1:3] if shares[i] >= 1 / 6))
    low, high = np.quantile(cloud[:, :3], (0.002, 0.998), axis=0)
    return colors, tuple(float(side) for side in high - low)


def brief(item: Described, rng: np.random.Generator) -> str:
    """A short description: the caption, or color and noun."""
    if item.is_nothing:
        return NOT_SURE
    thing, named = item.thing, what_is_this(item)
    return _pick(
        rng,
        item.brief or named,
        named,
        named,
        f"{thing[0].upper()}{thing[1:]}.",
    )


def what_is_this(item: Described) -> str:
    """The answer to "What is this?"."""
    if item.is_nothing:
        return NOT_SURE
    return f"{'These are' if is_plural(item.noun) else 'This is'} {item.thing}."


def detailed(item: Described, rng: np.random.Generator) -> str:
    """A long description: the caption after a sentence that names the thing, or with its proportions."""
    if item.is_nothing:
        return f"{NOT_SURE} It is {item.shape}, and its main color is {item.colors[0]}."
    start = what_is_this(item)
    if not item.detailed:
        return f"{start} It is {item.shape}."
    return _pick(rng, item.detailed, f"{start} {item.detailed}", f"{start} It is {item.shape}. {item.detailed}")


def facts_questions(item: Described, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions that points decide."""
    width, height, depth = item.extent
    tall = height >= max(width, depth)
    longest = "Its height is the longest side." if tall else "It is longer sideways than it is tall."
    pairs = [
        (_pick(rng, *SHAPE_QUESTIONS), f"It is {item.shape}."),
        (_pick(rng, "Which side is the longest?", "What is its longest side?"), longest),
    ]
    if len(item.colors) > 1:
        pairs.append(
            (
                _pick(rng, "Which colors does it have?", "What colors does it have?"),
                f"It is {' and '.join(item.colors)}.",
            )
        )
    return pairs


def yes_no(item: Described, others: list["Described"], rng: np.random.Generator) -> tuple[str, str]:
    """A question whose answer is yes or no with equal probability: about noun, kind, color or proportions."""
    yes = bool(rng.random() < 0.5)
    topic = rng.integers(6)
    if topic == 0:
        asked = item.colors[0] if yes else _pick(rng, *(color for color in COLORS if color not in item.colors))
        verdict = f"Yes, it is mostly {asked}." if yes else f"No, it is mostly {item.colors[0]}."
        return _pick(rng, f"Is it {asked}?", f"Is it mostly {asked}?", f"Is its main color {asked}?"), verdict
    if topic == 1:
        asked = item.shape if yes else _pick(rng, *(shape for shape in SHAPES if not _alike(shape, item.shape)))
        return f"Is it {asked}?", f"{'Yes' if yes else 'No'}, it is {item.shape}."
    if topic == 2 and item.questions and item.questions[0][1].startswith("Yes" if yes else "No"):
        return item.questions[0]
    if item.is_nothing:
        return _is_this(_other(item, others, rng).noun), NOT_SURE
    asked = item if yes else _other(item, others, rng)
    name = _pick(rng, *[asked.noun] + [asked.kind] * (asked.kind in NAMING_KINDS))
    subject = "they are" if is_plural(item.noun) else "it is"
    return _is_this(name), f"{'Yes' if yes else 'No'}, {subject} {with_article(item.noun)}."


def _is_this(noun: str) -> str:
    return f"{'Are these' if is_plural(noun) else 'Is this'} {with_article(noun)}?"


def _alike(first: str, second: str) -> bool:
    """Whether two proportions border on each other, so that neither is clearly wrong."""
    return abs(SHAPES.index(first) - SHAPES.index(second)) <= 1 or {first, second} <= {
        "taller than wide", "about as tall as wide", "thin like a board", "tall and narrow"
    }  # fmt: skip


def _other(item: Described, others: list[Described], rng: np.random.Generator) -> Described:
    """An object of another kind."""
    while True:
        other = others[rng.integers(len(others))]
        if other.kind not in (item.kind, NOTHING) and other.noun not in item.noun and item.noun not in other.noun:
            return other


def meaning_questions(item: Described, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about the noun in general."""
    if item.meaning is None:
        return []
    thing = with_article(item.noun)
    be = "are" if is_plural(item.noun) else "is"
    pairs = [(f"What {be} {thing}?", f"{thing[0].upper()}{thing[1:]} {be} {item.meaning.definition}.")]
    if item.meaning.kind_of:
        pairs.append((f"What {be} {thing} a kind of?", f"It is a kind of {item.meaning.kind_of}."))
    if len(item.meaning.parts) > 1:
        pairs.append(
            (
                f"What parts {'do' if be == 'are' else 'does'} {thing} have?",
                f"Its parts are {', '.join(item.meaning.parts)}.",
            )
        )
    return [pairs[index] for index in rng.permutation(len(pairs))]


def keywords(item: Described, rng: np.random.Generator) -> str:
    """What a cloud tells, as a few words in random order, each missing with probability 0.08."""
    words = [*item.colors[:1], item.shape, *(f"some {color}" for color in item.colors[1:])]
    words += [NOTHING] if item.is_nothing else [item.noun, item.kind]
    words += [_gist(item, rng)] if item.detailed else []
    return ", ".join(words[i] for i in rng.permutation(len(words)) if rng.random() < 0.92)


def _gist(item: Described, rng: np.random.Generator) -> str:
    """Some words of the captions without their order, as far as queries could carry them."""
    words = [word.strip(".,:;") for word in f"{item.brief} {item.detailed}".split()]
    words = [word for word in words if len(word) > 3]
    return " ".join(words[i] for i in rng.permutation(len(words))[: rng.integers(0, MOST_GIST)])


def annotate(item: Described, others: list[Described], rng: np.random.Generator) -> list[dict]:
    """Records in PointLLM's layout: four brief ones, two detailed, eight single rounds and two multi-rounds."""
    color = (_pick(rng, *COLOR_QUESTIONS), f"It is {item.colors[0]}.")
    what = ("What is this?", what_is_this(item))
    facts = facts_questions(item, rng)
    asked = [*item.questions, *meaning_questions(item, rng)[:1]]
    kind = (_pick(rng, *KIND_QUESTIONS), NOT_SURE if item.is_nothing else f"{item.kind.capitalize()}: {item.thing}.")
    records = [
        _record(item, "simple_description", [(_pick(rng, *BRIEF_QUESTIONS), text)])
        for text in (what_is_this(item), brief(item, rng), brief(item, rng), brief(item, rng))
    ]
    for _ in range(2):
        records.append(_record(item, "detailed_description", [(_pick(rng, *DETAILED_QUESTIONS), detailed(item, rng))]))
    # A caption's own yes/no question is one of `asked`; the others are balanced.
    singles = [what, color, kind, *facts[:2], *asked, yes_no(item, others, rng), yes_no(item, others, rng)]
    records += [_record(item, "single_round", [pair]) for pair in singles]
    for rounds in (
        [what, color, _pick(rng, *facts)],
        [(_pick(rng, *BRIEF_QUESTIONS), brief(item, rng)), *asked[:1], yes_no(item, others, rng)],
    ):
        records.append(_record(item, "multi_round", rounds))
    return records


def _record(item: Described, conversation_type: str, rounds: list[tuple[str, str]]) -> dict:
    conversations = []
    for index, (question, answer) in enumerate(rounds):
        mark = "" if index else "<point>\n"
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"object_id": item.object_id, "conversation_type": conversation_type, "conversations": conversations}


def _pick(rng: np.random.Generator, *choices):
    return choices[rng.integers(len(choices))]
