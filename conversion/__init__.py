"""From the authors' checkpoints to ours. Importing this package is cheap: a name is imported when it is used."""

from importlib import import_module


_MODULES = {
    "authors_name": "minigpt3d.conversion.names",
    "our_name": "minigpt3d.conversion.names",
    "lora_config": "minigpt3d.conversion.lora",
    "convert_state_dict": "minigpt3d.conversion.state_dict",
    "save_pretrained": "minigpt3d.hub",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
