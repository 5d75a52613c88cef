"""From the authors' checkpoints to ours. Importing this package is cheap: a name is imported when it is used."""

from importlib import import_module


_MODULES = {"authors_name": "names", "our_name": "names", "lora_config": "lora", "convert_state_dict": "state_dict"}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
