"""What survives a stop: signals that end a run, its checkpoints, and its history.

A run works in `OUTPUT_DIR.unfinished`, which holds history.jsonl and the newest checkpoints.
"""

import json
import os
import platform
import shutil
import signal
import threading
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from minigpt3d.hub import STAGE_FILE

from .stages import Stage
from .weights import find_damage, gather_parameters, named_parameters, save_checkpoint


HISTORY_FILE = "history.jsonl"
RUNNING_FILE = "running.json"


# ---- Signals --------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal ended the run behind a step that is kept."""

    def __init__(self, number: int, work_dir: Path, step: int):
        self.signal = number
        super().__init__(
            f"Stopped at step {step} ({signal.Signals(number).name}), kept in {work_dir}: go on with --resume auto."
        )


class StopSignal:
    """SIGTERM and SIGINT, noted until the step is done; a second one stops at once.

    `accelerate launch` passes neither on when it is told alone: the end of a launcher counts as SIGTERM.
    """

    def __init__(self):
        self.number, self.before = 0, {}
        parent = psutil.Process().parent()
        launched = parent is not None and any("accelerate" in word for word in parent.cmdline())
        self.launcher = parent.pid if launched else None
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame):
        self.restore()
        self.number = number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def received(self, accelerator: Accelerator) -> int:
        """The signal that any process received, 0 for none: all must stop behind the same step."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.number = self.number or signal.SIGTERM
        number = torch.tensor([self.number], device=accelerator.device)
        return int(accelerator.gather(number).max()) if accelerator.num_processes > 1 else self.number


# ---- One run in a folder --------------------------------------------------------------------------------------------


def claim(work_dir: Path):
    """Note that this process works in the folder, which is made if need be.

    Raises:
        ValueError: another one does.
    """
    path, us = work_dir / RUNNING_FILE, psutil.Process()
    if path.exists():
        try:
            other = json.loads(path.read_text())
            there = psutil.Process(other["pid"])
            alive = other["host"] == platform.node() and there.create_time() == other["started"] and there != us
        except (ValueError, KeyError, psutil.Error):  # it has ended, whatever it has left
            alive = False
        if alive and there.status() != psutil.STATUS_ZOMBIE:
            raise ValueError(f"{work_dir} is being worked in by process {there.pid}. Wait for it, or end it first.")
    work_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": platform.node(), "pid": us.pid, "started": us.create_time()}))


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Checkpoints, the newest first; unfinished ones have a name that begins with a dot."""
    return sorted(work_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def newest_checkpoint(work_dir: Path, warn) -> Path | None:
    """The newest checkpoint whose files are whole, or None where there are no checkpoints.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    found = list_checkpoints(work_dir)
    for checkpoint in found:
        if problem := find_damage(checkpoint):
            warn(f"{checkpoint} is damaged ({problem}); trying the one before.")
        else:
            return checkpoint
    if found:
        raise ValueError(f"--resume auto: all checkpoints in {work_dir} are damaged. Remove it to start anew.")
    return None


def check_checkpoint(checkpoint: Path, stage: Stage, run: dict) -> int:
    """The step to go on with.

    Raises:
        ValueError: the checkpoint is of a run with other settings.
    """
    theirs = json.loads((checkpoint / STAGE_FILE).read_text())
    for name in ("stage", "recipe", "init", "seed"):
        if theirs[name] != run[name]:
            raise ValueError(
                f"--resume: {checkpoint} is of a run with {name} {theirs[name]!r}, but now it is {run[name]!r}."
            )
    if theirs["data"] != run["data"]:
        raise ValueError(
            f"--resume: {checkpoint} is of a run on other data. Give it the --data it had, or a new OUTPUT_DIR."
        )
    return theirs["step"]


def add_checkpoint(work_dir: Path, accelerator: Accelerator, model, optimizer, run: dict, keep: int):
    """Write the checkpoint of a step, then remove what is older than the newest `keep`. Every process calls this."""
    inner, step = accelerator.unwrap_model(model, keep_torch_compile=False), run["step"]
    names = [name for name, parameter in named_parameters(inner).items() if parameter.requires_grad]
    trained, state = gather_parameters(inner, names), {}
    if (
        accelerator.distributed_type == DistributedType.DEEPSPEED
    ):  # it writes its own, before ours says that it is there
        model.save_checkpoint(work_dir, tag=f"deepspeed-{step}")
    else:
        state["optimizer"] = get_optimizer_state_dict(inner, _plain(optimizer), options=_WHOLE)
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        save_checkpoint(work_dir / f"checkpoint-{step}", trained, state, run)
        for path in list_checkpoints(work_dir)[keep:]:
            shutil.rmtree(path)
            shutil.rmtree(work_dir / path.name.replace("checkpoint", "deepspeed"), ignore_errors=True)
    accelerator.wait_for_everyone()


def restore_optimizer(checkpoint: Path, accelerator: Accelerator, model, optimizer, state: dict):
    """Give the optimizer, sharded or not, the state that `load_checkpoint` has read."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.load_checkpoint(checkpoint.parent, tag=checkpoint.name.replace("checkpoint", "deepspeed"))
    else:
        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        set_optimizer_state_dict(inner, _plain(optimizer), state["optimizer"], options=_WHOLE)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])


# By parameter names, whole and on the CPU, however it is sharded.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _plain(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


# ---- History --------------------------------------------------------------------------------------------------------


def cut_history(path: Path, first_step: int):
    """Keep the history up to the step that comes next: steps behind the checkpoint are done again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        whole = path.with_name(path.name + ".tmp")
        whole.write_text("".join(lines[:first_step]))
        whole.replace(path)
