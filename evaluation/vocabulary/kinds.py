"""The kind of an object, from its catalog name: a table of head nouns, and a test whether an answer names a kind.

The head noun of a catalog name is its last word in the table, before any "with" or comma: "Double window 3 panes" is a window,
"Glass table" a table, "Sink cabinet" a cabinet. `OTHER_NOUNS` has head nouns of other objects, such as "Flower box" and
"Table fan".
"""

import re


# kind -> noun in an answer -> head nouns (singular) of catalog names for which an answer uses it
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "chair": {"chair": ("chair", "seat"), "armchair": ("armchair",), "stool": ("stool", "barstool")},
    "table": {"table": ("table",), "desk": ("desk",)},
    "sofa": {"sofa": ("sofa", "couch", "settee", "loveseat")},
    "bed": {"bed": ("bed", "crib", "futon", "cot", "mattress")},
    "lamp": {"lamp": ("lamp", "light", "lantern", "lamppost", "chandelier", "spotlight", "flashlight")},
    "cabinet": {
        "cabinet": ("cabinet", "cupboard", "sideboard", "dresser", "locker", "commode", "nightstand"),
        "wardrobe": ("wardrobe", "closet", "armoire"),
        "bookcase": ("bookcase", "bookshelf", "shelf", "shelves", "shelving"),
    },
    "door": {"door": ("door",)},
    "window": {"window": ("window",)},
    "plant": {
        "plant": ("plant", "flower", "cactus", "orchid", "tulip", "lily", "yucca", "spathiphyllum", "fern", "rose",
                  "bonsai", "succulent", "ivy", "bush", "hedge", "shrub"),
        "tree": ("tree", "ficus", "bamboo", "cypress", "pine", "palm", "poplar", "maple", "acacia", "beech", "birch",
                 "willow", "cedar", "fir", "spruce", "oak", "blossom"),
    },
    "car": {
        "car": ("car", "sedan", "suv", "beetle", "ford", "leon", "peugeot", "renault", "chevrolet", "citroen", "fiat",
                "audi", "bmw", "mercedes", "volkswagen", "toyota", "porsche", "ferrari", "jeep", "limousine"),
        "truck": ("truck", "lorry"),
        "bus": ("bus",),
        "van": ("van", "minivan"),
    },
    "bike": {"bicycle": ("bicycle", "bike", "tricycle"), "motorbike": ("motorbike", "motorcycle", "scooter", "yamaha")},
    "person": {"person": ("person", "human", "man", "woman", "male", "female", "boy", "girl", "child", "mannequin")},
    "animal": {"animal": ("animal", "horse", "cat", "dog", "bulldog", "chicken", "rabbit", "deer", "cow", "bird")},
    "sink": {
        "sink": ("sink", "washbasin", "basin", "lavatory", "vanity", "handbasin"),
        "bath": ("bath", "bathtub", "tub", "jacuzzi"),
    },
    "toilet": {"toilet": ("toilet", "urinal", "bidet", "wc")},
    "appliance": {
        "stove": ("stove", "oven", "cooker", "cooktop", "hob", "microwave"),
        "fridge": ("fridge", "refrigerator", "freezer"),
        "washing machine": ("washing", "dryer", "dishwasher"),
    },
}  # fmt: skip

# As the last noun of a name, these mean another object.
OTHER_NOUNS = frozenset(
    "artwork bat bell bench blind board box brush bulb cover cushion curtain dispenser fan frame handle head holder "
    "house hut kettle knob mat mirror ottoman paper phone pot rack remote ring sheet shoe shutter slot stand switch "
    "toy trolley vase".split()
)
# Head nouns of catalog names which in an answer usually mean something else: a color, a wood, a part, an owner.
ONLY_IN_NAMES = frozenset(
    "acacia audi bamboo basin beech beetle birch blossom cedar child citroen cypress female fiat fir ford human leon light "
    "male maple oak palm peugeot pine poplar renault rose seat spruce vanity washing willow yamaha".split()
)
# Names for which the rule is wrong: kind and noun, or None for another object.
EXCEPTIONS: dict[str, tuple[str, str] | None] = {
    "rocking horse": None,
    "clothes horse": None,
    "hot dog": None,
    "roasted chicken": None,
    "toy train": None,
    "dog house": None,
    "child swing": None,
    "child hut": None,
    "wall lamp artwork": ("lamp", "lamp"),
    "wood bank": None,
    "little bank": None,
}


def _singular(word: str) -> str:
    if word in ("glasses", "shelves") or not word.endswith("s") or word.endswith(("ss", "us")):
        return word
    return word[:-2] if word.endswith(("ches", "shes", "xes", "uses")) else word[:-1]


def _head_words(name: str) -> list[str]:
    """The words of a name that may be its head noun, last first, in the singular."""
    head = re.split(r"\bwith\b|,|\bon\b|\s\d", name.lower())[0]
    return [_singular(word) for word in reversed(re.findall(r"[^\W\d_]+", head))]


_BY_NOUN = {noun: (kind, answer) for kind, row in KINDS.items() for answer, nouns in row.items() for noun in nouns}


def kind_of(name: str) -> tuple[str, str] | None:
    """The kind of an object with this name, and the noun that an answer uses for it; None for other objects."""
    name = name.lower().strip()
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    for word in _head_words(name):
        if word in OTHER_NOUNS:
            return None
        if word in _BY_NOUN:
            return _BY_NOUN[word]
    return None


def head_noun(name: str) -> str:
    """The noun of a name that decides its kind; the last word if there is none."""
    words = _head_words(name)
    return next((word for word in words if word in _BY_NOUN or word in OTHER_NOUNS), (words or ["object"])[0])


def answer_nouns(kind: str) -> list[str]:
    """The nouns by which a free answer may name a kind."""
    row = KINDS[kind]
    return [*row, *(noun for nouns in row.values() for noun in nouns if noun not in row and noun not in ONLY_IN_NAMES)]


def names_kind(answer: str, kind: str) -> bool:
    """Whether an answer names a kind: one of its words, singular or plural, is one of the kind's nouns."""
    words = re.findall(r"[^\W\d_]+", answer.lower())
    nouns = {kind, *(noun for noun, (noun_kind, _) in _BY_NOUN.items() if noun_kind == kind)}
    return any(word in nouns or _singular(word) in nouns for word in words)
