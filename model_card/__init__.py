"""The model card: JSON in, README.md out, with a source for every number.

Importing this package is cheap: a name is imported when it is used.
"""

from importlib import import_module


_MODULES = {
    "SOURCES_FILE": "card",
    "write_card": "card",
    "Given": "emissions",
    "read_given": "emissions",
    "CardError": "evaluations",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
