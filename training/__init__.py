"""Training of MiniGPT-3D in four stages: the table (`stages`), the data (`data`), the weights (`weights`), the loop (`train`)."""

import logging
import warnings


# Where bitsandbytes is installed, peft imports it, which then says what it lacks on a CPU, asked or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft's affair with transformers.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
