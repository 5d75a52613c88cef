"""Options of a training run. What is trained, on what and how fast is a row of the table in `stages`, not an option."""

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import option
from minigpt3d.hub import HUB_ID_RULES, is_hub_id

from .stages import parse_settings


def _boolean(text: str) -> bool:
    """A truth value as transformers' scripts accept it, for argparse."""
    truth = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
    if text.lower() not in truth:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return truth[text.lower()]


def _switch(help: str):
    """A field that is off by default; on the command line `--name`, `--name true` or `--name false`."""
    return option(help, default=False, action="store", nargs="?", const=True, type=_boolean, metavar="true|false")


@dataclass
class RunOptions:
    """How a run is carried out; the fields are the options of the stages' command line."""

    init: str = option(
        "Model or adapter to start from, a folder or a Hub id. Stage I starts from the pretrained parts (see `minigpt3d "
        "convert`), every other stage from the output_dir of the stage before.",
        metavar="MODEL",
    )
    data: str = option(
        "Output of `minigpt3d pack`, a folder or a Hub id. With --annotations: a folder with a point cloud "
        "{object_id}_8192.npy for every annotated object."
    )
    output_dir: Path = option("Folder for the result. It appears when the stage is done; until then see *.unfinished.")
    annotations: list[Path] = option(
        "JSON lists of conversations in PointLLM's format, for data that is not packed. Each stage takes the "
        "conversation types that it trains on.",
        default=[],
        metavar="FILE",
    )
    validation_data: str | None = option(
        "Packed data to measure the loss on, before the first step and at the end.", default=None, metavar="DATA"
    )
    recipe: Literal["paper", "household"] = option(
        "Rows of the stage table: the paper's, or those of the small demo model.", default="paper"
    )
    max_steps: int | None = option(
        "Stop after this many optimizer steps; the learning rate schedule stays that of the full stage.",
        default=None,
        metavar="N",
    )
    device_batch: int | None = option(
        "Maximum number of samples a device processes at once. Gradients are accumulated to the batch of the stage "
        "table. Without this option a device takes its full share.",
        default=None,
        metavar="N",
    )
    gradient_checkpointing: bool = _switch(
        "Recompute activations in the backward pass instead of storing them: less memory, more time."
    )
    load_in_4bit: bool = _switch(
        "Load the frozen weights of the language model in 4 bits (NF4, bitsandbytes); trainable weights stay float32."
    )
    attn_implementation: str | None = option(
        "Attention of the language model, for example flash_attention_2, which computes nothing between packed samples. "
        "Without this option transformers chooses.",
        default=None,
        metavar="NAME",
    )
    compile: bool = _switch(
        "Compile the layers of the encoder, the Q-Former and the language model with torch.compile, in the first steps."
    )
    num_workers: int = option("Processes that load data; 0 loads in the main process.", default=2, metavar="N")
    seed: int = option("Seed of sampling, augmentation, new weights and dropout.", default=42, metavar="N")
    save_every: int = option(
        "Steps between checkpoints. SIGTERM and Ctrl-C also write one, then end the run.", default=1000, metavar="N"
    )
    keep_checkpoints: int = option("Number of checkpoints to keep.", default=2, metavar="N")
    dry_run: bool = _switch("Take six steps, print the memory and time that the full stage needs here, keep nothing.")
    resume: Literal["never", "auto"] = option(
        "auto: resume from the newest valid checkpoint of this output_dir, if there is one.", default="never"
    )
    export: bool = _switch("Merge the result into a complete model, ready for the Hub. Stage IV always does.")
    report_to: list[str] = option(
        "Trackers that log every step: tensorboard, wandb, trackio, … (those of Accelerate).",
        default=[],
        metavar="TRACKER",
    )
    push_to_hub: bool = _switch(
        "Publish the result as a commit and a tag in --hub_model_id. Log in first (hf auth login)."
    )
    hub_model_id: str | None = option("Model repository to publish to.", default=None, metavar="OWNER/NAME")
    hub_private: bool = _switch("Create the repository as private.")
    hub_every: int | None = option("Also publish every N-th checkpoint, in the background.", default=None, metavar="N")

    def __post_init__(self):
        if ".." in self.output_dir.parts:  # names beside it are made of its last part
            self.output_dir = self.output_dir.resolve()

    @property
    def settings(self) -> dict[str, float]:
        """Values other than the row's, by name; only a run on your own objects has any."""
        return {}

    @property
    def work_dir(self) -> Path:
        """Where the run keeps its history and checkpoints until the result is complete."""
        return self.output_dir.with_name(self.output_dir.name + ".unfinished")

    def check(self):
        """Find the mistakes that can be found without torch, a model or a network.

        Raises:
            ValueError: an option is wrong; the message says what to do.
        """
        for name in ("max_steps", "device_batch", "save_every", "keep_checkpoints", "hub_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.annotations and not Path(self.data).is_dir():
            raise ValueError(f"`data` {self.data} is no folder; it must hold the clouds {{object_id}}_8192.npy.")
        for path in self.annotations:
            if not path.is_file():
                raise ValueError(f"`annotations` {path} is no file.")
        if self.output_dir.exists():
            raise ValueError(f"`output_dir` {self.output_dir} exists already. Pass a new folder, or remove it.")
        if self.resume == "never" and self.work_dir.exists() and any(self.work_dir.iterdir()):
            raise ValueError(f"{self.work_dir} holds an unfinished run. Set `resume` to auto, or remove the folder.")
        if self.compile and self.gradient_checkpointing:
            raise ValueError("`compile` and `gradient_checkpointing` do not go together: drop one of them.")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError("`load_in_4bit` needs bitsandbytes: pip install 'minigpt3d[quantization]'")
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("`push_to_hub` and `hub_model_id` belong together: give both, or neither.")
        if self.hub_model_id is not None and not is_hub_id(self.hub_model_id):
            raise ValueError(f"`hub_model_id` {self.hub_model_id}: {HUB_ID_RULES}")
        if self.hub_every is not None and not self.push_to_hub:
            raise ValueError("`hub_every` needs `push_to_hub` and `hub_model_id`.")


@dataclass
class FinetuneOptions(RunOptions):
    """A run on your own objects, which may depart from its row."""

    set: list[str] = option(
        "Another value than the row's: lr, min_lr, warmup_steps, epochs (passes over your data) or steps, batch, "
        "weight_decay, or eval_every (steps between losses on --validation_data); may be repeated. The model card names "
        "what differs.",
        default=[],
        action="append",
        metavar="NAME=VALUE",
    )

    @property
    def settings(self) -> dict[str, float]:
        return parse_settings(self.set)

    def check(self):
        """
        Raises:
            ValueError: an option is wrong; the message says what to do.
        """
        super().check()
        if "eval_every" in self.settings and self.validation_data is None:
            raise ValueError("`set` eval_every needs `validation_data`, the objects to measure the loss on.")
