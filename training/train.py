"""The training loop of all four stages. What a stage is stands in `stages`; the loop does not know which one it runs.

A run works in `OUTPUT_DIR.unfinished` (history.jsonl and the newest checkpoint) and renames its result to OUTPUT_DIR at
the end: the folder is there if and only if the stage is done.
"""

import json
import math
import shutil
import signal
import sys
import threading
import time
from argparse import ArgumentDefaultsHelpFormatter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import HfArgumentParser

from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

from .data import open_sources
from .stages import RECIPES, Stage, learning_rate
from .stream import StageStream, pack_batch, read_ahead, split_micro_batches
from .weights import (
    STAGE_FILE,
    find_damage,
    load_checkpoint,
    load_model,
    prepare_model,
    read_stage,
    save_checkpoint,
    save_result,
    trainable_table,
)


HISTORY_FILE = "history.jsonl"


@dataclass
class RunOptions:
    """How a run is carried out. What is trained, on what, and how fast is in the table of training/stages.py."""

    init: str = field(
        metadata={
            "help": "The model to start from: a folder or a Hub id. For stage I the parts as the paper takes them "
            "ready-made, for the others the OUTPUT_DIR of the stage before."
        }
    )
    data: str = field(
        metadata={
            "help": "What `minigpt3d pack` wrote, a folder or the Hub id of one; or, with --annotations, a folder with a "
            "cloud {object_id}_8192.npy for every annotated object."
        }
    )
    output_dir: Path = field(
        metadata={"help": "Folder for the result. It appears when the stage is done; until then see *.unfinished."}
    )
    annotations: list[Path] = field(
        default_factory=list,
        metadata={
            "help": "JSON lists of conversations in PointLLM's layout, for data that is not packed; each stage picks the "
            "kinds that it trains on."
        },
    )
    recipe: Literal["paper", "household"] = field(
        default="paper", metadata={"help": "Rows of the stage table: the paper's, or those of the small demo model."}
    )
    max_steps: int | None = field(
        default=None,
        metadata={"help": "Stop after so many optimizer steps; the learning rates stay those of the whole stage."},
    )
    device_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most samples that a device takes at once. The table's batch is kept by accumulating gradients; "
            "without this option a device takes its whole share."
        },
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read clouds ahead; 0 reads in the loop."})
    seed: int = field(default=42, metadata={"help": "Of sampling, augmentation, new weights and dropout."})
    save_every: int = field(
        default=1000,
        metadata={"help": "Steps between checkpoints. SIGTERM and Ctrl-C write one too, and end the run."},
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "Newest checkpoints to keep."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Take three steps, say what memory and time the whole stage needs here, and keep nothing."},
    )
    resume: Literal["never", "auto"] = field(
        default="never",
        metadata={"help": "auto: go on from the newest whole checkpoint of this OUTPUT_DIR, if there is one."},
    )


class ArgumentDefaultsShown(ArgumentDefaultsHelpFormatter):
    """Help with defaults, for the options that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def main(stage_name: str, argv: list[str] | None = None):
    """The command line of a stage: read the options, run, and turn mistakes of the user into one line."""
    parser = HfArgumentParser(
        RunOptions, description=_describe(RECIPES["paper"][stage_name]), formatter_class=ArgumentDefaultsShown
    )
    (options,) = parser.parse_args_into_dataclasses(argv)
    try:
        train(RECIPES[options.recipe][stage_name], options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None


def _describe(stage: Stage) -> str:
    sources = ", ".join(f"{source.name} ({source.batch} a step)" for source in stage.mixture)
    return (
        f"Stage {stage.name} of MiniGPT-3D: {stage.teaches}. The paper's run starts from "
        f"{'the ready-made parts' if stage.starts_from == 'base' else 'stage ' + stage.starts_from} and takes "
        f"{stage.steps:,} steps on {sources}, with learning rates {stage.warmup_lr:g} → {stage.peak_lr:g} → "
        f"{stage.min_lr:g}. These are in training/stages.py; the options below say how to run it."
    )


def train(stage: Stage, options: RunOptions) -> Path:
    """Run a stage from `options.init` to its result in `options.output_dir`, which is returned (a dry run writes none).

    Raises:
        ValueError: options, data or weights that do not fit, all found before the first step.
        RuntimeError: the loss is no longer a number.
        Stopped: a signal asked for it; the last step is kept in a checkpoint.
        OSError: the disk is full; the checkpoint before is kept.
    """
    work_dir = options.output_dir.with_name(options.output_dir.name + ".unfinished")
    num_steps = stage.steps if options.max_steps is None else min(options.max_steps, stage.steps)
    check_options(stage, options, work_dir)
    sources = open_sources([source.name for source in stage.mixture], options.data, options.annotations)
    accelerator = Accelerator()
    processor = MiniGPT3DProcessor.from_pretrained(options.init)
    stream = StageStream(stage, sources, processor, options.seed, accelerator.process_index, accelerator.num_processes)

    set_seed(options.seed)  # new LoRA factors
    model = prepare_model(load_model(options.init), stage, options.init)
    accelerator.print(f"Stage {stage.name}: {stage.teaches}.\n{trainable_table(model)}")
    checkpoint = newest_checkpoint(work_dir, accelerator.print) if options.resume == "auto" else None
    first_step = check_checkpoint(checkpoint, stage, options) if checkpoint else 0
    optimizer_state = load_checkpoint(checkpoint, model) if checkpoint else None
    model, optimizer = accelerator.prepare(model, make_optimizer(stage, model))
    if checkpoint:
        restore_optimizer(accelerator, optimizer, optimizer_state)
        accelerator.print(f"Going on from {checkpoint} at step {first_step}.")

    if options.dry_run:
        estimate(accelerator, model, optimizer, stage, stream, options, num_steps - first_step)
        return options.output_dir
    run = {"stage": stage.name, "recipe": options.recipe, "init": str(options.init), "seed": options.seed}
    if accelerator.is_main_process:
        work_dir.mkdir(parents=True, exist_ok=True)
        cut_history(work_dir / HISTORY_FILE, first_step)
    steps = read_ahead(stream, range(first_step, num_steps), options.num_workers)
    bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    start = time.perf_counter()
    stop = StopSignal()
    for step, (source, samples) in enumerate(steps, start=first_step):
        reseed(options.seed, step, accelerator.process_index)
        lr = learning_rate(stage, step)
        micro_batches = split_micro_batches(samples, options.device_batch)
        loss = train_step(accelerator, model, optimizer, micro_batches, lr)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"The loss is {loss} at step {step}; nothing of this step is kept. The newest checkpoint in {work_dir} "
                "is sound: resume from it with a lower learning rate or in a wider dtype."
            )
        if accelerator.is_main_process:
            seconds, start = time.perf_counter() - start, time.perf_counter()  # with the wait for data
            num_samples = stream.source(step).batch
            entry = {"step": step, "source": source, "loss": loss, "lr": lr}
            entry["samples_per_second"] = round(num_samples / seconds, 2)
            with open(work_dir / HISTORY_FILE, "a") as file:
                file.write(json.dumps(entry) + "\n")
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2e}, {entry['samples_per_second']:.1f} samples/s")
            bar.update()
        stopped = stop.received(accelerator)
        if step + 1 < num_steps and (stopped or (step + 1) % options.save_every == 0):
            if accelerator.is_main_process:
                state = run | {"step": step + 1}
                add_checkpoint(work_dir, accelerator, model, optimizer, state, options.keep_checkpoints)
            if stopped:
                bar.close()
                raise Stopped(stopped, work_dir, step + 1)
    bar.close()
    stop.restore()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(work_dir / "result", accelerator.unwrap_model(model), processor, run | {"step": num_steps})
        (work_dir / HISTORY_FILE).rename(work_dir / "result" / HISTORY_FILE)
        (work_dir / "result").rename(options.output_dir)
        shutil.rmtree(work_dir)
    accelerator.wait_for_everyone()
    accelerator.print(f"Stage {stage.name} is done: {options.output_dir}")
    return options.output_dir


# ---- Before a long run ----------------------------------------------------------------------------------------------


def estimate(accelerator: Accelerator, model, optimizer, stage: Stage, stream, options: RunOptions, num_steps: int):
    """Take three steps from the middle of the stage and print what they mean for the whole."""
    first = max(0, min(stage.steps // 2, stage.steps - 3))
    steps = range(first, min(first + 3, stage.steps))
    seconds = []
    started = time.perf_counter()
    for step, (_, samples) in zip(steps, read_ahead(stream, steps, options.num_workers), strict=True):
        reseed(options.seed, step, accelerator.process_index)
        train_step(
            accelerator,
            model,
            optimizer,
            split_micro_batches(samples, options.device_batch),
            learning_rate(stage, step),
        )
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    if accelerator.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the device"
    else:
        memory = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
    step_seconds = min(seconds[1:] or seconds)  # the first one fetches memory and fills the workers
    whole = num_steps * step_seconds
    duration = f"{whole / 3600:.1f} hours" if whole >= 3600 else f"{whole / 60:.1f} minutes"
    accelerator.print(
        f"Dry run: a step takes {step_seconds:.2f} s and {memory}; {num_steps:,} steps would take {duration} here. "
        "Nothing was kept."
    )


# ---- Stopping -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal ended the run behind a step that is kept."""

    def __init__(self, number: int, work_dir: Path, step: int):
        self.signal = number
        super().__init__(
            f"Stopped at step {step} ({signal.Signals(number).name}), kept in {work_dir}: go on with --resume auto."
        )


class StopSignal:
    """SIGTERM and SIGINT, noted until the step is done; a second one stops at once."""

    def __init__(self):
        self.number, self.before = 0, {}
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
        number = torch.tensor([self.number], device=accelerator.device)
        return int(accelerator.gather(number).max()) if accelerator.num_processes > 1 else self.number


# ---- Before the first step ------------------------------------------------------------------------------------------


def check_options(stage: Stage, options: RunOptions, work_dir: Path):
    """Refuse what cannot work, before anything heavy is loaded.

    Raises:
        ValueError: with what is wrong and what to do.
    """
    for name in ("max_steps", "device_batch", "save_every", "keep_checkpoints"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if options.annotations and not Path(options.data).is_dir():
        raise ValueError(f"--data {options.data} is no folder; it must hold the clouds {{object_id}}_8192.npy.")
    for path in options.annotations:
        if not path.is_file():
            raise ValueError(f"--annotations {path} is no file.")
    if options.output_dir.exists():
        raise ValueError(f"--output_dir {options.output_dir} exists already. Pass a new one, or remove it.")
    if work_dir.exists() and any(work_dir.iterdir()) and options.resume == "never":
        raise ValueError(f"{work_dir} holds an unfinished run. Go on with --resume auto, or remove it.")
    made_by = read_stage(options.init)
    if made_by and made_by["stage"] != stage.starts_from:
        raise ValueError(
            f"Stage {stage.name} starts from stage {stage.starts_from}'s result, but --init {options.init} is the "
            f"result of stage {made_by['stage']}. Pass the right folder, or, to train a finished model further, a copy "
            "without its training_state/."
        )


def make_optimizer(stage: Stage, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on tensors with two or more dimensions only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.warmup_lr, betas=stage.betas)


# ---- One step -------------------------------------------------------------------------------------------------------


def reseed(seed: int, step: int, process_index: int):
    """Dropout as a function of seed, step and process: a resumed run needs no state of random generators."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0]))


def train_step(accelerator: Accelerator, model, optimizer, micro_batches: list[list[dict]], lr: float) -> float:
    """One optimizer step on the table's batch, in as many micro-batches as the devices need.

    The loss is the mean over all answer tokens of the batch, so its split over micro-batches and processes, which hold
    unequal numbers of tokens, changes nothing.

    Returns:
        That loss, over all processes.
    """
    device = accelerator.device
    attention = accelerator.unwrap_model(model).config.text_config._attn_implementation
    one_row = (attention or "").startswith("flash")
    num_tokens = sum((sample["labels"][1:] != -100).sum() for batch in micro_batches for sample in batch)
    num_tokens = accelerator.reduce(num_tokens.to(device))
    batch_loss = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):  # gradients are averaged over processes once
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in pack_batch(batch, one_row).items()}
            loss = model(**batch, use_cache=False, num_items_in_batch=num_tokens).loss
            accelerator.backward(loss * accelerator.num_processes)
        batch_loss += loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch_loss = accelerator.reduce(batch_loss).item()
    if math.isfinite(batch_loss):
        optimizer.step()
    optimizer.zero_grad()
    return batch_loss


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


def add_checkpoint(work_dir: Path, accelerator: Accelerator, model, optimizer, run: dict, keep: int):
    """Write the checkpoint of a step, then remove what is older than the newest `keep`."""
    state = {"optimizer": optimizer.state_dict()}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    save_checkpoint(work_dir / f"checkpoint-{run['step']}", accelerator.unwrap_model(model), state, run)
    for path in list_checkpoints(work_dir)[keep:]:
        shutil.rmtree(path)


def check_checkpoint(checkpoint: Path, stage: Stage, options: RunOptions) -> int:
    """The step to go on with.

    Raises:
        ValueError: the checkpoint is of a run with other settings.
    """
    run = json.loads((checkpoint / STAGE_FILE).read_text())
    ours = {"stage": stage.name, "recipe": options.recipe, "init": str(options.init), "seed": options.seed}
    for name, value in ours.items():
        if run[name] != value:
            raise ValueError(f"--resume: {checkpoint} is of a run with {name} {run[name]!r}, but now it is {value!r}.")
    return run["step"]


def restore_optimizer(accelerator: Accelerator, optimizer, state: dict):
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])


def cut_history(path: Path, first_step: int):
    """Keep the history up to the step that comes next: steps behind the checkpoint are done again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:first_step]))
