"""The training loop of all stages. What a stage is stands in `stages`; the loop does not know which one it runs.

A run works in `OUTPUT_DIR.unfinished` (history.jsonl and the newest checkpoints) and renames its result to OUTPUT_DIR at
the end: the folder exists if and only if the stage is done.
"""

import json
import math
import platform
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, set_seed
from tqdm import tqdm

from minigpt3d.data.clouds import Grouping
from minigpt3d.data.sources import fingerprint, open_sources, use_groups
from minigpt3d.files import folder_to_disk, full_disk_named, locked, rename_folder
from minigpt3d.hub import ADAPTER_DIR, ModelFiles, find_model, load_processor, public_name
from minigpt3d.model_card.readme import write_card

from .curves import draw_curves
from .diagnosis import diagnose
from .history import HISTORY_FILE, read_history, restore_history
from .launch import make_accelerator, on_main, prepare, share_folder
from .measure import RouterMeter, UpdateMeter, router_entry, total_norm, validate
from .publish import Publisher, check_login
from .run_options import RunOptions
from .run_state import (
    STOPPING,
    Stopped,
    StopSignal,
    add_checkpoint,
    check_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    plain_optimizer,
    restore_optimizer,
)
from .stages import Stage, change_stage, departures, learning_rate, title_of
from .stream import Packing, StageStream, pack_batch, read_ahead, split_micro_batches
from .weights import (
    adapter_names,
    export_model,
    gather_parameters,
    half_precision,
    halve_frozen,
    is_sharded,
    load_stage_model,
    lora_scales,
    named_parameters,
    save_adapter,
    trainable_table,
)


CURVES_FILE = "curves.png"
DRY_STEPS = 6
LOGS_DIR = "logs"


class LossError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


class Reading:
    """Numbers (N,) on their way from a device, which goes on with its work."""

    def __init__(self, values: torch.Tensor):
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def wait(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


def train(stage: Stage, options: RunOptions) -> Path:
    """Run a stage from `options.init` to its result in `options.output_dir`, which is returned (a dry run writes none).

    Raises:
        ValueError: options, data or weights do not fit; found before the first step.
        LossError: the loss is NaN or infinite.
        RuntimeError: a process that loads data was lost.
        Stopped: a signal was received; the last step is kept in a checkpoint.
        OSError: the disk is full; the checkpoint before is kept.
    """
    with ExitStack() as claims:
        training = Training(stage, options, claims)
        if options.dry_run:
            training.measure()
        else:
            _run(training)
    return options.output_dir


def _run(training: "Training"):
    """All steps that are left, and the end."""
    options = training.options
    training.begin()
    stop = StopSignal()
    steps = range(training.first_step, training.num_steps)
    for step, (source, samples) in zip(steps, read_ahead(training.stream, steps, options.num_workers), strict=True):
        stopped = training.take_step(step, source, samples, stop)
        if step + 1 < training.num_steps and (stopped or (step + 1) % options.save_every == 0):
            training.save_checkpoint(step + 1)
        if stopped and step + 1 < training.num_steps:
            training.bar.close()
            raise Stopped(stopped, training.work_dir, step + 1)
    stop.restore()
    training.finish()


class Training:
    """A stage in progress: its set-up, and what a step, a checkpoint and the end do with it.

    Args:
        stage: the row.
        options: how to carry it out.
        claims: gets the lock of the output folder, which keeps other runs out of it.

    Raises:
        ValueError: as `train`.
    """

    def __init__(self, stage: Stage, options: RunOptions, claims: ExitStack):
        options.check()
        self.options, self.work_dir = options, options.work_dir
        self.start = find_start(stage, options)
        names = [source.name for source in stage.mixture]
        sources = open_sources(names, options.data, options.annotations, stage.any_source)
        self.validation_sources = {}
        if options.validation_data:
            self.validation_sources = open_sources(names, options.validation_data, [], any_source=True)
        row = replace(stage, mixture=tuple(source for source in stage.mixture if source.name in sources))
        num_rows = sum(sum(source.rows) for source in sources.values())
        self.stage = stage = change_stage(row, options.settings, num_rows)
        self.departures = departures(stage, row)
        self.num_steps = stage.steps if options.max_steps is None else min(options.max_steps, stage.steps)
        self.accelerator = make_accelerator(log_with=options.report_to or None, project_dir=self.work_dir / LOGS_DIR)
        if not options.dry_run:
            on_main(self.accelerator, self._claim, claims)
        place = self.accelerator.process_index, self.accelerator.num_processes
        self.processor = load_processor(self.start)
        self.stream = StageStream(self.stage, sources, self.processor, options.seed, *place)

        set_seed(options.seed)  # new LoRA factors
        model = load_stage_model(self.accelerator, self.stage, self.start, options)
        self._use_groups(sources, Grouping.of(model.config, self.processor))
        self.accelerator.print(f"{stage.title}: {stage.teaches}.\n{trainable_table(model)}")
        if self.start.stage is None and stage.starts_from not in ("base", "any"):
            self.accelerator.print(
                f"{options.init} has no stage.json, so it may not be the result of stage {stage.starts_from}."
            )
        self.facts = {"stage": stage.name, "recipe": options.recipe, "init": str(options.init), "seed": options.seed}
        self.facts |= {"router_type": model.config.router_type, "departures": self.departures}
        self.facts["data"] = fingerprint(options.data, options.annotations)
        self.adapter_names, self.lora_scales = adapter_names(model, self.start), lora_scales(model)
        # What earlier stages have trained, before it is cast.
        main = self.accelerator.is_main_process  # which writes them
        self.kept = {
            name: parameter.detach().cpu().clone() if main else None
            for name, parameter in named_parameters(model).items()
            if name in self.adapter_names and not parameter.requires_grad
        }
        if (half := half_precision(self.accelerator)) and not is_sharded(self.accelerator):
            halve_frozen(model, half)
        self._restore_and_prepare(model)
        # Without the wrappers of Accelerate and torch.compile.
        self.inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.updates, self.router = UpdateMeter(self.inner), RouterMeter(self.inner)
        self.packing = Packing.of(self.inner)
        self.publisher = Publisher(options.hub_model_id, options.hub_private) if options.push_to_hub else None

    def _claim(self, claims: ExitStack):
        """Keep other runs out of the output folder."""
        claims.enter_context(locked(self.options.output_dir))
        self.options.check()  # another run may just have ended

    def _use_groups(self, sources: dict, grouping: Grouping):
        """Read the groups that are packed with clouds, if they are the model's and clouds stay as they are."""
        other = use_groups(self.validation_sources, grouping)
        if self.stage.augment and any(source.grouping for source in sources.values()):
            self.accelerator.print("This stage changes clouds at random: the groups in `data` are not used.")
        elif not self.stage.augment:
            other = use_groups(sources, grouping) or other
        if other is not None:
            self.accelerator.print(f"The groups in the data are not used: {other}; the model has {grouping}.")

    def _restore_and_prepare(self, model: torch.nn.Module):
        """Weights and optimizer, from the newest checkpoint if the run resumes."""
        accelerator, resume = self.accelerator, self.options.resume == "auto"
        checkpoint = on_main(accelerator, newest_checkpoint, self.work_dir, accelerator.print) if resume else None
        if checkpoint:
            checkpoint = self.work_dir / checkpoint.name
            share_folder(accelerator, checkpoint)
        self.first_step = check_checkpoint(checkpoint, self.facts, self.num_steps) if checkpoint else 0
        self.checkpoint = checkpoint
        state = load_checkpoint(checkpoint, model) if checkpoint else None
        share = math.ceil(max(source.batch for source in self.stage.mixture) / accelerator.num_processes)
        device_batch = min(self.options.device_batch or share, share)
        self.model, self.optimizer = prepare(accelerator, model, make_optimizer(self.stage, model), device_batch)
        if checkpoint:
            restore_optimizer(checkpoint, accelerator, self.model, self.optimizer, state)
            accelerator.print(f"Resuming from {checkpoint} at step {self.first_step}.")

    def begin(self):
        """Start history, trackers and progress bar, and measure the validation loss before the first step."""
        main = self.accelerator.is_main_process
        if main:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            history, kept = self.work_dir / HISTORY_FILE, self.checkpoint and self.checkpoint / HISTORY_FILE
            if not restore_history(history, kept):
                print(f"{history} was missing or damaged; it is restored from {kept}.")
        if self.options.report_to:
            settings = {name: value for name, value in self.facts.items() if name != "departures"}  # no nested values
            settings |= {name: value for name, (_, value) in self.departures.items()}
            self.accelerator.init_trackers(f"minigpt3d-stage-{self.stage.name}", settings)
        self.validation_before = self._validate("validation_before") if self.first_step == 0 else {}
        self.bar = tqdm(total=self.num_steps, initial=self.first_step, unit="step", disable=not main)
        self.pending, self.stopped = None, 0
        self.last_time = time.perf_counter()

    def take_step(self, step: int, source: str, samples: list[dict], stop: StopSignal) -> int:
        """One optimizer step. Its results are read and logged while the device computes the next one, see `read_results`.

        Args:
            stop: what this process was told.

        Returns:
            The signal after which all processes must stop, 0 for none. Processes agree on it one step late.

        Raises:
            LossError: the loss or its gradient was not finite; the weights are those before that step.
        """
        self.updates.remember(step)
        results = dict(zip(("loss", "grad_norm"), self._learn(step, samples), strict=True))
        results |= {f"update_ratio/{name}": ratio for name, ratio in self.updates.ratios().items()}
        shared, received = results["loss"].new_zeros(len(STOPPING)), stop.received()
        if received:
            shared[STOPPING.index(received)] = 1.0
        sums = self.router.read(0 if self.stream.is_idle(step) else len(samples))
        shared = self.accelerator.reduce(shared if sums is None else torch.cat([shared, sums]))
        self.read_results()
        self.pending = {"step": step, "source": source, "lr": learning_rate(self.stage, step)}
        self.results = list(results), Reading(torch.cat([torch.stack(list(results.values())), shared]))
        seconds, self.last_time = time.perf_counter() - self.last_time, time.perf_counter()  # with the wait for data
        self.pending["samples_per_second"] = round(self.stream.batch(step) / seconds, 2)
        self.pending |= self.validation_before if step == 0 else {}
        if step + 1 == self.num_steps:
            self.read_results(self._validate("validation_after"))
        elif self.stage.eval_every is not None and (step + 1) % self.stage.eval_every == 0:
            self.read_results(self._validate("validation"))
        return received if self.accelerator.num_processes == 1 else self.stopped

    def read_results(self, validation: dict[str, float] | None = None):
        """Wait for the step in progress, if there is one, check it, and log its entry of the history (see `history`).

        Args:
            validation: for the entry.

        Raises:
            LossError: see `take_step`.
        """
        if self.pending is None:
            return
        entry, (names, reading), self.pending = self.pending, self.results, None
        values = reading.wait()
        results, flags = dict(zip(names, values, strict=False)), values[len(names) :][: len(STOPPING)]
        sums = values[len(names) + len(STOPPING) :]
        loss, grad_norm = results.pop("loss"), results.pop("grad_norm")
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or may_overflow(self.accelerator))):
            raise LossError(
                f"At step {entry['step']} the loss is {loss} and its gradient norm {grad_norm}; the step is discarded. The "
                f"checkpoints in {self.work_dir} are valid: resume in a wider dtype, or check the samples of this step."
            )
        entry |= {"loss": loss, "grad_norm": grad_norm}
        if results:
            entry["update_ratio"] = {name.partition("/")[2]: ratio for name, ratio in results.items()}
        if sums:
            entry["router"] = router_entry(sums)
        self.stopped = next((number for number, flag in zip(STOPPING, flags, strict=True) if flag), 0)
        self.log(entry | (validation or {}))

    def _learn(self, step: int, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        reseed(self.options.seed, step, self.accelerator.process_index)
        share = math.ceil(self.stream.batch(step) / self.accelerator.num_processes)
        parts = split_micro_batches(samples, self.options.device_batch, share)
        batches = [pack_batch(part, self.packing) for part in parts]
        return train_step(self.accelerator, self.model, self.optimizer, batches, learning_rate(self.stage, step))

    def _validate(self, name: str) -> dict[str, float]:
        if not self.validation_sources:
            return {}
        batch = self.options.device_batch or self.stage.mixture[0].batch
        return {
            name: validate(self.accelerator, self.model, self.stage, self.validation_sources, self.processor, batch)
        }

    def log(self, entry: dict):
        """Add a step to history, progress bar and trackers."""
        if self.accelerator.is_main_process:
            with full_disk_named(self.work_dir), open(self.work_dir / HISTORY_FILE, "a") as file:
                file.write(json.dumps(entry) + "\n")
            speed = f"{entry['samples_per_second']:.1f} samples/s"
            self.bar.set_postfix_str(f"loss {entry['loss']:.3f}, lr {entry['lr']:.2e}, {speed}")
            self.bar.update()
        if self.options.report_to:
            self.accelerator.log(_flatten(entry), step=entry["step"])

    def save_checkpoint(self, step: int):
        """Write a checkpoint; publish it if one is due."""
        self.read_results()
        facts, options = self.facts | {"step": step}, self.options
        add_checkpoint(self.work_dir, self.accelerator, self.model, self.optimizer, facts, options.keep_checkpoints)
        if self.publisher and options.hub_every and step % (options.save_every * options.hub_every) == 0:
            tensors = self._gather_adapter()
            if self.accelerator.is_main_process:
                folder = self.work_dir / f"published-{step}"
                save_adapter(folder, tensors, self.lora_scales, self.start.base, self._public_facts(step))
                self.publisher.push_in_background(folder, f"{self.stage.title}, step {step}")

    def finish(self):
        """Write the result, warn of known failure patterns, publish."""
        self.bar.close()
        tensors = self._gather_adapter()
        if self.options.report_to:
            self.accelerator.end_training()  # and with it the group of processes
        if self.accelerator.is_main_process:
            result = self._save_result(tensors)
            for warning in diagnose(read_history(result / HISTORY_FILE), self.stage):
                print(warning)
            folder_to_disk(result)
            rename_folder(result, self.options.output_dir)
            if self.publisher:
                self.publisher.wait()  # it reads from the folder that is removed next
            shutil.rmtree(self.work_dir)
            print(f"{self.stage.title} is done: {self.options.output_dir}")
            if self.publisher:
                self.publisher.push(self.options.output_dir, self.stage.title, f"stage-{self.stage.name}")
        # The other processes are done: a barrier here would time out while the main one merges and uploads.

    def _gather_adapter(self) -> dict[str, torch.Tensor]:
        """The tensors of `adapter_names`, in float32; every process must call this, the main one gets all."""
        return self.kept | gather_parameters(self.inner, [n for n in self.adapter_names if n not in self.kept])

    def _save_result(self, tensors: dict[str, torch.Tensor]) -> Path:
        """Write the adapter, or a complete model with the adapter in it, and history, curves and card beside it."""
        result, adapter = self.work_dir / "result", self.work_dir / ADAPTER_DIR
        for left_over in (result, adapter):
            shutil.rmtree(left_over, ignore_errors=True)
        exports = self.options.export or self.stage.exports
        facts = self._public_facts(self.num_steps)
        save_adapter(adapter if exports else result, tensors, self.lora_scales, self.start.base, facts)
        if exports:
            export_model(adapter, self.processor, result)
        shutil.copyfile(self.work_dir / HISTORY_FILE, result / HISTORY_FILE)
        draw_curves(read_history(result / HISTORY_FILE), self.stage.title, result / CURVES_FILE)
        write_card(result, model_id=self.options.hub_model_id, name=self.options.output_dir.name)
        if (self.work_dir / LOGS_DIR).exists():
            shutil.copytree(self.work_dir / LOGS_DIR, result / LOGS_DIR)
        return result

    def _public_facts(self, step: int) -> dict:
        """Content of stage.json, without paths of this machine."""
        return self.facts | {
            "init": public_name(self.facts["init"]),
            "data_name": public_name(self.options.data),
            "step": step,
            "row": asdict(self.stage) | {"steps": self.stage.steps},
            "device": torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "CPU",
            "processes": self.accelerator.num_processes,
            "versions": {"Python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        }

    def measure(self):
        """Take a few steps from the middle of the stage; print the memory and the time that the full stage needs."""
        first = max(0, min(self.stage.steps // 2, self.stage.steps - DRY_STEPS))
        steps = range(first, min(first + DRY_STEPS, self.stage.steps))
        seconds, resident = [], 0
        started = time.perf_counter()
        for step, (_, samples) in zip(steps, read_ahead(self.stream, steps, self.options.num_workers), strict=True):
            self._learn(step, samples)[0].item()
            seconds.append(time.perf_counter() - started)
            resident = max(resident, psutil.Process().memory_info().rss)
            started = time.perf_counter()
        if self.accelerator.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the device"
        else:
            memory = f"{resident / 1e9:.2f} GB"
        step_seconds = fmean(seconds[1:] or seconds)  # the first step allocates memory and fills the workers
        num_steps = self.num_steps - self.first_step
        total = num_steps * step_seconds
        duration = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
        self.accelerator.print(
            f"Dry run: a step takes {step_seconds:.2f} s and {memory}; {num_steps:,} steps would take {duration} here. "
            "Nothing was kept."
        )


def _flatten(entry: dict, prefix: str = "") -> dict[str, float]:
    """An entry of the history for trackers: numbers by names with slashes."""
    flat = {}
    for name, value in entry.items():
        if isinstance(value, list):
            value = {f"expert_{index}": number for index, number in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif not isinstance(value, str) and name != "step":
            flat[prefix + name] = value
    return flat


# ---- Before the first step ------------------------------------------------------------------------------------------


def find_start(stage: Stage, options: RunOptions) -> ModelFiles:
    """Locate the model to start from, after the checks that need Accelerate, the model's files or the Hub.

    Raises:
        ValueError: a tracker is missing, the model does not exist or is of another stage, or the result cannot be
            published.
    """
    trackers = [str(tracker.value) for tracker in get_available_trackers()]
    for name in options.report_to:
        if name not in trackers:
            known = [str(tracker) for tracker in LoggerType.list() if tracker != "all"]
            problem = f"not installed: pip install {name}" if name in known else f"expected one of {', '.join(known)}."
            raise ValueError(f"`report_to` {name}: {problem}")
    try:
        start = find_model(options.init)
    except ValueError as error:
        raise ValueError(f"`init`: {error}") from error
    if start.stage and stage.starts_from not in (start.stage["stage"], "any"):
        raise ValueError(
            f"{stage.title} starts from the result of stage {stage.starts_from}, but `init` {options.init} is a "
            f"result of: {title_of(start.stage['stage'])}. Pass another model; to train a finished model on your own objects, "
            "use minigpt3d.training.finetune."
        )
    if options.push_to_hub:
        if (options.hub_every or not (options.export or stage.exports)) and Path(start.base).is_dir():
            raise ValueError(
                f"`push_to_hub`: the result is an adapter on {start.base}, a local folder. Publish that model and pass "
                "its Hub id as `init`, or publish a complete model with `export` and without `hub_every`."
            )
        check_login()
    return start


def make_optimizer(stage: Stage, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on tensors with two or more dimensions only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.warmup_lr, betas=stage.betas, fused=True)


# ---- One step -------------------------------------------------------------------------------------------------------


def reseed(seed: int, step: int, process_index: int):
    """Seed dropout from seed, step and process, so that resuming needs no state of random generators."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0]))


def may_overflow(accelerator: Accelerator) -> bool:
    """Whether a scaler of fp16 looks after gradients that overflow: it skips their step."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.scaler is not None or (deepspeed and accelerator.mixed_precision == "fp16")


def train_step(
    accelerator: Accelerator, model, optimizer, batches: list[dict], lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step, in one or more micro-batches. The device is not waited for.

    The loss is the mean over all answer tokens of the batch, on all processes. It does not depend on how the samples,
    which differ in length, are divided into micro-batches and among processes. A step whose loss or gradient is not
    finite leaves the weights as they are.

    Args:
        batches: of `pack_batch`, on the CPU.

    Returns:
        The loss and the norm of its gradient, on the device.
    """
    device, deepspeed = accelerator.device, accelerator.distributed_type == DistributedType.DEEPSPEED
    for group in optimizer.param_groups:
        group["lr"] = lr
    num_tokens = sum((batch["labels"] != -100).sum() for batch in batches)
    num_tokens = accelerator.reduce(_send({"num_tokens": num_tokens}, device)["num_tokens"])
    batch_loss = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        accelerator.sync_gradients = index == len(batches) - 1  # average gradients over processes once
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            loss = model(**_send(batch, device), use_cache=False, num_items_in_batch=num_tokens).loss
            if deepspeed:  # Accelerate's backward would also take the step, before the loss is checked
                model.set_gradient_accumulation_boundary(accelerator.sync_gradients)
                model.backward(loss * accelerator.num_processes)
            else:
                accelerator.backward(loss * accelerator.num_processes)
        batch_loss += loss.detach()
    batch_loss = accelerator.reduce(batch_loss)
    if deepspeed:
        return batch_loss, _step_deepspeed(model, batch_loss)
    accelerator.unscale_gradients(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = total_norm(gradients)
    if accelerator.scaler is None:  # which does the same
        is_finite = batch_loss.isfinite() & grad_norm.isfinite()
        plain = plain_optimizer(optimizer)
        plain.grad_scale, plain.found_inf = None, 1.0 - is_finite.float()
    optimizer.step()
    optimizer.zero_grad()
    return batch_loss, grad_norm


def _send(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch on the device; from pinned memory, so that the copy waits for nothing."""
    pin = device.type == "cuda"
    return {
        name: (value.pin_memory() if pin else value).to(device, non_blocking=pin) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def _step_deepspeed(engine, loss: torch.Tensor) -> torch.Tensor:
    """The step of DeepSpeed's optimizer, which skips gradients that are not finite; returns the gradient's norm."""
    if not loss.isfinite():
        return torch.full_like(loss, math.nan)
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=loss.dtype, device=loss.device)
