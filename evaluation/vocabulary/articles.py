"""The indefinite article of a noun phrase, and whether it is plural."""

# Nouns that are not counted.
MASS_NOUNS = frozenset(
    "armor bamboo bread broccoli butter cereal cheese corn debris food grass ham lettuce parchment rubble soup sushi water "
    "wheat".split()
)


def is_plural(phrase: str) -> bool:
    """Whether a phrase is probably a plural, by its ending."""
    return phrase.endswith("s") and not phrase.endswith(("ss", "us", "glass", "debris", "tops"))


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, and nothing before a plural or what is not counted: "a chair", "scissors", "bread"."""
    if is_plural(phrase) or phrase.split()[-1] in MASS_NOUNS:
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
