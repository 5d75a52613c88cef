"""Training in four stages: the table (`stages`), the run (`loop`), its data (`stream`) and its weights (`weights`)."""

import logging
import warnings


# peft imports bitsandbytes, which reports on a CPU what it lacks there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Raised by peft's call of transformers.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
