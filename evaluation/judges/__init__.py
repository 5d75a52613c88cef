"""Judges: language models that are asked about answers, behind an OpenAI-compatible endpoint or in this process.

A judge is a callable, list of prompts -> list of replies. The metrics write the prompts and read the replies. A judge asks as
repeatably as its model allows (temperature 0, a fixed seed) and keeps every reply in a cache, so that a stopped run repeats no
request that was answered.
"""

from .endpoint import EndpointJudge
from .judge import MAX_TOKENS, Judge, JudgeError, make_judge


__all__ = ["MAX_TOKENS", "EndpointJudge", "Judge", "JudgeError", "LocalJudge", "make_judge"]


def __getattr__(name: str):
    if name == "LocalJudge":  # the only one that needs torch and transformers
        from .local import LocalJudge

        return LocalJudge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
