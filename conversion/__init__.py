"""From the authors' checkpoints to ours, and from a model to a folder for the Hub."""

from minigpt3d.conversion.hub_folder import save_pretrained
from minigpt3d.conversion.state_dict import authors_name, convert_state_dict, lora_config, our_name


__all__ = ["authors_name", "convert_state_dict", "lora_config", "our_name", "save_pretrained"]
