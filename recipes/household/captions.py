"""Texts about an object: short and long descriptions, questions and answers.

They follow from the object's name, category, shape and colors. Every answer to "What is this?" contains the word for its
kind, so that it can be scored; wording is drawn at random from a few patterns.
"""

from dataclasses import dataclass

import numpy as np

from minigpt3d.evaluation.vocabulary.articles import with_article
from minigpt3d.evaluation.vocabulary.colors import COLORS, color_shares
from minigpt3d.evaluation.vocabulary.kinds import kind_of, names_kind


USES = {
    "chair": "sitting",
    "table": "putting things on",
    "sofa": "sitting together",
    "bed": "sleeping",
    "lamp": "giving light",
    "cabinet": "storing things",
    "door": "closing a room",
    "window": "letting light in",
    "plant": "decoration",
    "car": "driving",
    "bike": "riding",
    "person": None,
    "animal": None,
    "sink": "washing",
    "toilet": "going to the toilet",
    "appliance": "housework",
}
PLACES = {
    "Living room": "in a living room",
    "Kitchen": "in a kitchen",
    "Bedroom": "in a bedroom",
    "Bathroom": "in a bathroom",
    "Office": "in an office",
    "Exterior": "outside",
    "Vehicles": "on a road",
    "Doors and windows": "in a wall",
    "Staircases": "in a building",
}

BRIEF_QUESTIONS = (
    "What is this?",
    "What is this?",
    "This is an object of ",
    "What kind of object is this?",
    "What does this point cloud show?",
    "Name this object.",
    "Describe this object briefly.",
    "Give a short caption of this 3D object.",
    "Summarize the 3D point cloud object briefly.",
    "What do you see?",
)
DETAILED_QUESTIONS = (
    "Caption this 3D model in detail.",
    "Caption this 3D model in detail.",
    "Describe this object in detail.",
    "Give a detailed description of this point cloud.",
    "What does this object look like?",
    "Tell me all about this object.",
)
COLOR_QUESTIONS = ("What color is it?", "What color is it?", "What is its main color?", "Which color does it have?")


@dataclass(frozen=True)
class Facts:
    """Facts about one cloud, from which its texts are made.

    Args:
        noun: word for its kind in answers; its name if it has no known kind.
        name: name in the catalog, in lower case, without colors and numbers.
        kind: a key of `KINDS`, or None.
        category: category in the catalog.
        colors: its main color, then other colors of at least a sixth of the points.
        extent: (3,) width, height, depth of its bounding box, in any unit.
    """

    noun: str
    name: str
    kind: str | None
    category: str
    colors: tuple[str, ...]
    extent: tuple[float, float, float]


def get_facts(name: str, category: str, cloud: np.ndarray) -> Facts:
    """Facts of an object from its name, category and cloud (N, 6), y up."""
    kind, noun = kind_of(name) or (None, None)
    words = [
        word for word in name.lower().replace(",", " and").split() if word.isalpha() or "'" in word or "-" in word
    ]
    words = [word for word in words if word not in COLORS] or [name.lower()]
    plain = " ".join(words)
    shares = color_shares(cloud[:, 3:])
    order = np.argsort(-shares, kind="stable")
    colors = (COLORS[order[0]], *(COLORS[i] for i in order[1:3] if shares[i] >= 1 / 6))
    extent = tuple(float(side) for side in np.ptp(cloud[:, :3], axis=0))
    return Facts(noun or plain, plain, kind, category, colors, extent)


def brief(facts: Facts, rng: np.random.Generator) -> str:
    """A short description: kind and color."""
    thing = with_article(f"{facts.colors[0]} {facts.noun}")
    return _pick(rng, f"This is {thing}.", f"This is {thing}.", f"{thing[0].upper()}{thing[1:]}.", f"It is {thing}.")


def what_is_this(facts: Facts) -> str:
    """The answer to "What is this?"."""
    return f"This is {with_article(f'{facts.colors[0]} {facts.noun}')}."


def shape_answer(facts: Facts) -> str:
    """Its proportions in words, from the bounding box."""
    width, height, depth = facts.extent
    side = max(width, depth)
    if height > 2 * side:
        return "tall and narrow"
    if height > 1.2 * side:
        return "taller than wide"
    if height < 0.1 * side:
        return "very flat"
    if min(width, depth) < 0.2 * side and height > 0.5 * side:
        return "thin like a board"
    if height < 0.5 * side:
        return "low and wide"
    return "wider than tall" if height < 0.83 * side else "about as tall as wide"


def detailed(facts: Facts, rng: np.random.Generator) -> str:
    """A long description: kind and color, then shape, place and use."""
    thing = with_article(f"{facts.colors[0]} {facts.noun}")
    sentences = [_pick(rng, f"This is {thing}.", f"This is {thing}.", f"The object is {thing}.")]
    sentences.append(_pick(rng, f"It is {shape_answer(facts)}.", f"Its shape is {shape_answer(facts)}."))
    use, place = USES.get(facts.kind), PLACES.get(facts.category)
    if use and place:
        sentences.append(f"It is used for {use} and can be found {place}.")
    elif use:
        sentences.append(f"It is used for {use}.")
    elif place:
        sentences.append(f"It can be found {place}.")
    return " ".join(sentences)


def questions(facts: Facts, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions with answers, in random order, without those about name and color, which every object has."""
    width, height, depth = facts.extent
    is_tall = height >= max(width, depth)
    longest_side = "Its height is the longest side." if is_tall else "It is longer sideways than it is tall."
    pairs = [
        (
            _pick(rng, "What shape is it?", "Describe its proportions.", "How is it proportioned?"),
            f"It is {shape_answer(facts)}.",
        ),
        (_pick(rng, "Which side is the longest?", "Is it taller than it is wide?"), longest_side),
    ]
    if place := PLACES.get(facts.category):
        is_room = facts.category in ("Living room", "Kitchen", "Bedroom", "Bathroom", "Office")
        question = "Which room does it belong in?" if is_room and rng.random() < 0.5 else "Where would you find it?"
        pairs.append((question, f"You would find it {place}."))
    if use := USES.get(facts.kind):
        pairs.append((_pick(rng, "What is it used for?", "What can you do with it?"), f"It is used for {use}."))
    if facts.kind:
        other = _pick(rng, *(kind for kind in USES if not names_kind(facts.noun, kind)))
        asked = facts.kind if rng.random() < 0.5 else other
        verdict = "Yes, it is" if asked == facts.kind else "No, it is"
        pairs.append((f"Is this {with_article(asked)}?", f"{verdict} {with_article(facts.noun)}."))
    return [pairs[index] for index in rng.permutation(len(pairs))]


def keywords(facts: Facts, rng: np.random.Generator) -> list[str]:
    """The facts as a few words in random order; each is missing with probability 0.08."""
    words = [facts.colors[0], facts.noun, shape_answer(facts)]
    words += [f"some {color}" for color in facts.colors[1:]]
    words += [PLACES.get(facts.category) or "", facts.name]
    return [words[i] for i in rng.permutation(len(words)) if words[i] and rng.random() < 0.92]


def annotate(object_id: str, facts: Facts, num_brief: int, rng: np.random.Generator) -> list[dict]:
    """Records in PointLLM's layout: `num_brief` brief ones, two detailed, some single rounds and two multi-rounds."""
    what = ("What is this?", what_is_this(facts))
    # The main color alone: trained to name a second one, so small a model says "mostly white, with some white".
    color = (_pick(rng, *COLOR_QUESTIONS), f"It is {facts.colors[0]}.")
    records = [
        _record(object_id, "simple_description", [(_pick(rng, *BRIEF_QUESTIONS), brief(facts, rng))])
        for _ in range(num_brief)
    ]
    for _ in range(2):
        records.append(
            _record(object_id, "detailed_description", [(_pick(rng, *DETAILED_QUESTIONS), detailed(facts, rng))])
        )
    for pair in (what, color, *questions(facts, rng)[:3]):
        records.append(_record(object_id, "single_round", [pair]))
    records.append(_record(object_id, "multi_round", [what, color, *questions(facts, rng)[:1]]))
    records.append(
        _record(object_id, "multi_round", [("What is this?", brief(facts, rng)), *questions(facts, rng)[:2]])
    )
    return records


def _record(object_id: str, conversation_type: str, rounds: list[tuple[str, str]]) -> dict:
    conversations = []
    for index, (question, answer) in enumerate(rounds):
        mark = "" if index else "<point>\n"
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"object_id": object_id, "conversation_type": conversation_type, "conversations": conversations}


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]
