"""Stopping and resuming: signals that end a run, and its checkpoints."""

import os
import re
import shutil
import signal
import threading
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from minigpt3d.files import read_json, sha256, write_json, written_whole
from minigpt3d.hub import STAGE_FILE

from .history import HISTORY_FILE
from .weights import copy_tensors, gather_parameters, named_parameters


TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
_FILES = (TRAINED_FILE, OPTIMIZER_FILE, HISTORY_FILE)
_FACTS = ("stage", "recipe", "init", "seed", "departures", "data", "step", "sha256")
_NAME = re.compile(r"checkpoint-([0-9]+)")
# The optimizer by parameter names, complete and on the CPU, however it is sharded.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---- Signals --------------------------------------------------------------------------------------------------------


STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal ended the run; its last step is kept in a checkpoint."""

    def __init__(self, number: int, work_dir: Path, step: int):
        self.signal = number
        super().__init__(
            f"Stopped at step {step} ({signal.Signals(number).name}). The checkpoint is in {work_dir}; resume with "
            "`resume` auto."
        )


class StopSignal:
    """SIGTERM and SIGINT, held back until the step is done; a second one stops at once.

    `accelerate launch` does not forward signals to its processes: the end of the launcher counts as SIGTERM.
    """

    def __init__(self):
        self.number, self.handlers = 0, {}
        parent = psutil.Process().parent()
        launched = parent is not None and any("accelerate" in word for word in parent.cmdline())
        self.launcher = parent.pid if launched else None
        if threading.current_thread() is threading.main_thread():
            self.handlers = {n: signal.signal(n, self._hold) for n in STOPPING}

    def _hold(self, number: int, frame):
        self.restore()
        self.number = number

    def restore(self):
        """Put the signal handlers back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def received(self) -> int:
        """The signal that this process has received, 0 for none."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.number = self.number or signal.SIGTERM
        return self.number


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Checkpoints, newest first. Other names are not listed, such as those of incomplete checkpoints and of copies."""
    found = [path for path in work_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        facts = read_json(checkpoint / STAGE_FILE)
        if missing := [name for name in _FACTS if name not in facts]:
            return f"{STAGE_FILE} has no {missing[0]!r}"
        if facts["step"] != _step_of(checkpoint):
            return f"{STAGE_FILE} is of step {facts['step']!r}"
        changed = [name for name in _FILES if sha256(checkpoint / name) != facts["sha256"][name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{changed[0]} has changed" if changed else None


def newest_checkpoint(work_dir: Path, warn) -> Path | None:
    """The newest valid checkpoint, or None if there are no checkpoints.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    checkpoints = list_checkpoints(work_dir)
    for checkpoint in checkpoints:
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"{checkpoint} is damaged ({problem}); trying the one before.")
    if checkpoints:
        raise ValueError(f"`resume`: all checkpoints in {work_dir} are damaged. Remove the folder to start again.")
    return None


def check_checkpoint(checkpoint: Path, run: dict, num_steps: int) -> int:
    """The step to resume at.

    Args:
        run: settings of this run.
        num_steps: at which it ends.

    Raises:
        ValueError: the checkpoint is of a run with other settings, or of a step after the end.
    """
    earlier = read_json(checkpoint / STAGE_FILE)
    for name in ("stage", "recipe", "init", "seed"):
        if earlier[name] != run[name]:
            raise ValueError(
                f"`resume`: {checkpoint} is of a run with {name} {earlier[name]!r}, but now it is {run[name]!r}."
            )
    if earlier["departures"] != run["departures"]:
        raise ValueError(f"`resume`: {checkpoint} is of a run with other values. Pass the same `set`.")
    if earlier["data"] != run["data"]:
        raise ValueError(
            f"`resume`: {checkpoint} is of a run on other data. Pass the same `data`, or a new `output_dir`."
        )
    if earlier["step"] > num_steps:
        raise ValueError(
            f"`max_steps` {num_steps}: {checkpoint} has taken {earlier['step']} steps already. Pass a larger number, or "
            f"remove the checkpoints of later steps."
        )
    return earlier["step"]


def _write_checkpoint(folder: Path, trained: dict[str, torch.Tensor], optimizer_state: dict, history: Path, run: dict):
    """Write what a killed run resumes from: the trainable tensors, the optimizer, the history up to this step, and `run`
    (its step and settings)."""
    shutil.rmtree(folder, ignore_errors=True)  # it is damaged, else the run would have resumed from it
    with written_whole(folder) as temporary:
        save_file(trained, temporary / TRAINED_FILE)
        with open(temporary / OPTIMIZER_FILE, "wb") as file:  # of a path, torch does not say that the disk is full
            torch.save(optimizer_state, file)
        shutil.copyfile(history, temporary / HISTORY_FILE)
        hashes = {name: sha256(temporary / name) for name in _FILES}
        write_json(temporary / STAGE_FILE, run | {"sha256": hashes})


def add_checkpoint(work_dir: Path, accelerator: Accelerator, model, optimizer, run: dict, keep: int):
    """Write the checkpoint of a step and remove all but the newest `keep`. Every process must call this."""
    inner, step = accelerator.unwrap_model(model, keep_torch_compile=False), run["step"]
    names = [name for name, parameter in named_parameters(inner).items() if parameter.requires_grad]
    trained, state = gather_parameters(inner, names), {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its files come first: ours mark the end
        model.save_checkpoint(work_dir, tag=f"deepspeed-{step}")
    else:
        state["optimizer"] = get_optimizer_state_dict(inner, plain_optimizer(optimizer), options=FULL_STATE)
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        _write_checkpoint(work_dir / f"checkpoint-{step}", trained, state, work_dir / HISTORY_FILE, run)
        for path in list_checkpoints(work_dir)[keep:]:
            shutil.rmtree(path)
            shutil.rmtree(work_dir / path.name.replace("checkpoint", "deepspeed"), ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(folder: Path, model: torch.nn.Module) -> dict:
    """Load the tensors of a checkpoint into the model; returns the state of the optimizer."""
    trainable = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    tensors = load_file(folder / TRAINED_FILE)
    copy_tensors(trainable, tensors, folder / TRAINED_FILE)
    return torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)


def restore_optimizer(checkpoint: Path, accelerator: Accelerator, model, optimizer, state: dict):
    """Load the state from `load_checkpoint` into the optimizer, sharded or not."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.load_checkpoint(checkpoint.parent, tag=checkpoint.name.replace("checkpoint", "deepspeed"))
    else:
        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        set_optimizer_state_dict(inner, plain_optimizer(optimizer), state["optimizer"], options=FULL_STATE)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])


def plain_optimizer(optimizer) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
