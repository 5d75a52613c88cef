"""From the authors' checkpoints to ours, and from a model to a folder for the Hub."""

from minigpt3d.hub import save_pretrained

from .lora import lora_config
from .state_dict import authors_name, convert_state_dict, our_name


__all__ = ["authors_name", "convert_state_dict", "lora_config", "our_name", "save_pretrained"]
