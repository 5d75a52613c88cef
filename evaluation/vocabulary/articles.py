"""The indefinite article of a noun phrase."""


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, and nothing before a probable plural: "a chair", "an orange lamp", "scissors"."""
    if phrase.endswith("s") and not phrase.endswith(("ss", "us", "glass")):
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
