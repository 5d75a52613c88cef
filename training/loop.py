"""The training loop of all stages. What a stage is stands in `stages`; the loop does not know which one it runs.

A run works in `OUTPUT_DIR.unfinished` (history.jsonl and the newest checkpoints) and renames its result to OUTPUT_DIR at
the end: the folder is there if and only if the stage is done.
"""

import json
import math
import platform
import shutil
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, set_seed
from tqdm import tqdm
from transformers import BitsAndBytesConfig, HfArgumentParser
from transformers.utils import is_bitsandbytes_available

from minigpt3d.conversion.release import make_plan, stage_sources
from minigpt3d.conversion.write import write_release
from minigpt3d.data.sources import fingerprint, open_sources
from minigpt3d.hub import ADAPTER_DIR, STAGE_FILE, ModelFiles, find_model, load_processor, load_weights
from minigpt3d.model_card import write_card

from .history import diagnose, draw_report, read_history
from .measure import RouterMeter, UpdateMeter, validate
from .publish import Publisher, check_repository
from .run_state import (
    HISTORY_FILE,
    Stopped,
    StopSignal,
    add_checkpoint,
    check_checkpoint,
    claim,
    cut_history,
    newest_checkpoint,
    restore_optimizer,
)
from .stages import RECIPES, Stage, learning_rate
from .stream import StageStream, pack_batch, read_ahead, split_micro_batches, takes_one_row
from .weights import (
    adapter_names,
    gather_parameters,
    load_checkpoint,
    lora_scales,
    prepare_model,
    save_adapter,
    trainable_table,
)


REPORT_FILE = "report.png"
DRY_STEPS = 6
LOGS_DIR = "logs"
# What stays as it is in a model of 4 bits: all but the language model's layers.
NOT_IN_4_BIT = [
    *(f"model.{part}" for part in ("point_encoder", "point_projection", "query_experts", "router", "qformer")),
    "model.language_projection",
    "lm_head",
]


@dataclass
class RunOptions:
    """How a run is carried out. What is trained, on what, and how fast is in the table of training/stages.py."""

    init: str = field(
        metadata={
            "help": "What to start from: a model or an adapter, a folder or a Hub id. For stage I the parts as the paper "
            "takes them ready-made (minigpt3d convert), for the others the OUTPUT_DIR of the stage before."
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
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "Packed data that the run does not train on: its loss is taken before the first step and at the end."
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
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Compute activations again in the backward pass instead of keeping them: less memory, more time."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the language model's frozen weights in 4 bits (NF4, bitsandbytes); what trains stays float32."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the language model, such as flash_attention_2, which skips what packed samples do not see "
            "of each other; without this option transformers chooses."
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
        metadata={"help": "Take six steps, say what memory and time the whole stage needs here, and keep nothing."},
    )
    resume: Literal["never", "auto"] = field(
        default="never",
        metadata={"help": "auto: go on from the newest whole checkpoint of this OUTPUT_DIR, if there is one."},
    )
    export: bool = field(
        default=False,
        metadata={"help": "Merge the result into a whole model, ready for the Hub. Stage IV always does."},
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Trackers that get every step's numbers too: tensorboard, wandb, trackio, … (of Accelerate)."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Publish the result: a commit and a tag in --hub_model_id. Log in first (hf auth login)."},
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "OWNER/NAME of the model repository to publish in."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make that repository private, if it is new."})
    hub_every: int | None = field(
        default=None, metadata={"help": "Publish every so many checkpoints too, in the background."}
    )


class LossError(RuntimeError):
    """The loss is no longer a number."""


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
    except (ValueError, OSError, LossError) as error:
        raise SystemExit(f"error: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"error: the device is full ({str(error).splitlines()[0]}). Try --device_batch with fewer samples at once, "
            "--gradient_checkpointing or --load_in_4bit; none of them changes what is learned from a step."
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # which torch raises wherever the loop happens to be
            raise
        raise SystemExit(
            f"error: a process that reads clouds ahead was lost ({error}), most likely for want of memory. Go on with "
            "--resume auto and fewer --num_workers; 0 reads in the loop."
        ) from error
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None


def _describe(stage: Stage) -> str:
    sources = ", ".join(f"{source.name} ({source.batch} a step)" for source in stage.mixture)
    begins = {"base": "the parts that the paper takes ready-made", "any": "a finished model"}
    return (
        f"Stage {stage.name} of MiniGPT-3D: {stage.teaches}. It starts from "
        f"{begins.get(stage.starts_from, f'stage {stage.starts_from}')} and takes {stage.steps:,} steps on {sources}, with "
        f"learning rates {stage.warmup_lr:g} → {stage.peak_lr:g} → {stage.min_lr:g}. These are the paper recipe's row of "
        "training/stages.py; the options below say how to run it."
    )


def train(stage: Stage, options: RunOptions) -> Path:
    """Run a stage from `options.init` to its result in `options.output_dir`, which is returned (a dry run writes none).

    Raises:
        ValueError: options, data or weights that do not fit, all found before the first step.
        LossError: the loss is no longer a number.
        RuntimeError: a process that reads clouds was lost.
        Stopped: a signal asked for it; the last step is kept in a checkpoint.
        OSError: the disk is full; the checkpoint before is kept.
    """
    run = Run(stage, options)
    if options.dry_run:
        run.estimate()
        return options.output_dir
    run.begin()
    stop = StopSignal()
    steps = range(run.first_step, run.num_steps)
    for step, (source, samples) in zip(steps, read_ahead(run.stream, steps, options.num_workers), strict=True):
        run.note(run.take_step(step, source, samples))
        stopped = stop.received(run.accelerator)
        if step + 1 < run.num_steps and (stopped or (step + 1) % options.save_every == 0):
            run.keep(step + 1)
        if stopped and step + 1 < run.num_steps:
            run.bar.close()
            raise Stopped(stopped, run.work_dir, step + 1)
    stop.restore()
    run.finish()
    return options.output_dir


class Run:
    """A stage under way: what is set up once, and what a step, a checkpoint and the end do with it.

    Args:
        stage: the row.
        options: how to carry it out.

    Raises:
        ValueError: as `train`.
    """

    def __init__(self, stage: Stage, options: RunOptions):
        self.options = options
        self.work_dir = options.output_dir.with_name(options.output_dir.name + ".unfinished")
        self.start = check_options(stage, options, self.work_dir)
        self.num_steps = stage.steps if options.max_steps is None else min(options.max_steps, stage.steps)
        names = [source.name for source in stage.mixture]
        sources = open_sources(names, options.data, options.annotations, stage.any_source)
        self.held_out = {}
        if options.validation_data:
            self.held_out = open_sources(names, options.validation_data, [], any_source=True)
        self.stage = replace(stage, mixture=tuple(source for source in stage.mixture if source.name in sources))
        self.accelerator = Accelerator(log_with=options.report_to or None, project_dir=self.work_dir / LOGS_DIR)
        place = self.accelerator.process_index, self.accelerator.num_processes
        self.processor = load_processor(self.start)
        self.stream = StageStream(self.stage, sources, self.processor, options.seed, *place)

        set_seed(options.seed)  # new LoRA factors
        model = build_model(self.accelerator, self.stage, self.start, options)
        self.accelerator.print(f"Stage {stage.name}: {stage.teaches}.\n{trainable_table(model)}")
        if self.start.stage is None and stage.starts_from not in ("base", "any"):
            self.accelerator.print(f"Nothing says that {options.init} is the result of stage {stage.starts_from}.")
        self.facts = {"stage": stage.name, "recipe": options.recipe, "init": str(options.init), "seed": options.seed}
        self.facts["router_type"] = model.config.router_type
        self.facts["data"] = fingerprint(options.data, options.annotations)
        self._restore_and_prepare(model)
        # Without what Accelerate and torch.compile put around it.
        self.inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.adapter_names, self.lora_scales = adapter_names(self.inner, self.start), lora_scales(self.inner)
        self.updates, self.router = UpdateMeter(self.inner), RouterMeter(self.inner)
        self.publisher = Publisher(options.hub_model_id, options.hub_private) if options.push_to_hub else None

    def _restore_and_prepare(self, model: torch.nn.Module):
        """Weights and optimizer, from the newest checkpoint if there is one to go on from."""
        accelerator, resume = self.accelerator, self.options.resume == "auto"
        if accelerator.is_main_process and not self.options.dry_run:
            claim(self.work_dir)
        checkpoint = newest_checkpoint(self.work_dir, accelerator.print) if resume else None
        self.first_step = check_checkpoint(checkpoint, self.stage, self.facts) if checkpoint else 0
        state = load_checkpoint(checkpoint, model) if checkpoint else None
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(self.stage, model))
        if checkpoint:
            restore_optimizer(checkpoint, accelerator, self.model, self.optimizer, state)
            accelerator.print(f"Going on from {checkpoint} at step {self.first_step}.")

    def begin(self):
        """History, trackers, progress bar, and the loss on held-out data before the first step."""
        main = self.accelerator.is_main_process
        if main:
            cut_history(self.work_dir / HISTORY_FILE, self.first_step)
        if self.options.report_to:
            self.accelerator.init_trackers(f"minigpt3d-stage-{self.stage.name}", self.facts)
        self.before = self._validate("validation_before") if self.first_step == 0 else {}
        self.bar = tqdm(total=self.num_steps, initial=self.first_step, unit="step", disable=not main)
        self.last_time = time.perf_counter()

    def take_step(self, step: int, source: str, samples: list[dict]) -> dict:
        """One optimizer step; returns its entry in the history (see `report`).

        Raises:
            LossError: the loss is not finite; the weights are those before the step.
        """
        self.updates.remember()
        loss, grad_norm = self._learn(step, samples)
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or self.accelerator.scaler is not None)):
            raise LossError(
                f"At step {step} the loss is {loss} and the norm of its gradient {grad_norm}; nothing of this step is kept. "
                f"What {self.work_dir} holds of the steps before is sound: go on from it in a wider dtype, or look at what "
                "this step trained on."
            )
        entry = {"step": step, "source": source, "loss": loss, "lr": learning_rate(self.stage, step)}
        entry |= {"grad_norm": grad_norm, "update_ratio": self.updates.ratios()}
        if routing := self.router.read(self.accelerator, self.stream.is_idle(step)):
            entry["router"] = routing
        seconds, self.last_time = time.perf_counter() - self.last_time, time.perf_counter()  # with the wait for data
        entry["samples_per_second"] = round(self.stream.batch(step) / seconds, 2)
        entry |= self.before if step == 0 else {}
        return entry | (self._validate("validation_after") if step + 1 == self.num_steps else {})

    def _learn(self, step: int, samples: list[dict]) -> tuple[float, float]:
        reseed(self.options.seed, step, self.accelerator.process_index)
        micro_batches = split_micro_batches(samples, self.options.device_batch)
        lr = learning_rate(self.stage, step)
        return train_step(self.accelerator, self.model, self.optimizer, micro_batches, lr)

    def _validate(self, name: str) -> dict[str, float]:
        if not self.held_out:
            return {}
        batch = self.options.device_batch or self.stage.mixture[0].batch
        return {name: validate(self.accelerator, self.model, self.stage, self.held_out, self.processor, batch)}

    def note(self, entry: dict):
        """Tell a step's numbers to history, progress bar and trackers."""
        if self.accelerator.is_main_process:
            with open(self.work_dir / HISTORY_FILE, "a") as file:
                file.write(json.dumps(entry) + "\n")
            speed = f"{entry['samples_per_second']:.1f} samples/s"
            self.bar.set_postfix_str(f"loss {entry['loss']:.3f}, lr {entry['lr']:.2e}, {speed}")
            self.bar.update()
        if self.options.report_to:
            self.accelerator.log(_flat(entry), step=entry["step"])

    def keep(self, step: int):
        """Write a checkpoint, and publish it if it is time for that."""
        facts, options = self.facts | {"step": step}, self.options
        add_checkpoint(self.work_dir, self.accelerator, self.model, self.optimizer, facts, options.keep_checkpoints)
        if self.publisher and options.hub_every and step % (options.save_every * options.hub_every) == 0:
            tensors = gather_parameters(self.inner, self.adapter_names)
            if self.accelerator.is_main_process:
                folder = self.work_dir / f"published-{step}"
                save_adapter(folder, tensors, self.lora_scales, self.start.base, self._public_facts(step))
                self.publisher.push_in_background(folder, f"Stage {self.stage.name}, step {step}")

    def finish(self):
        """Write the result, say what went wrong in the known ways, publish."""
        self.bar.close()
        if self.options.report_to:
            self.accelerator.end_training()
        tensors = gather_parameters(self.inner, self.adapter_names)
        if self.accelerator.is_main_process:
            result = self._save_result(tensors)
            for sentence in diagnose(read_history(result / HISTORY_FILE), self.stage):
                print(sentence)
            result.rename(self.options.output_dir)
            if self.publisher:
                self.publisher.wait()  # it reads in the folder that goes now
            shutil.rmtree(self.work_dir)
            print(f"Stage {self.stage.name} is done: {self.options.output_dir}")
            if self.publisher:
                self.publisher.push(self.options.output_dir, f"Stage {self.stage.name}", f"stage-{self.stage.name}")
        self.accelerator.wait_for_everyone()

    def _public_facts(self, step: int) -> dict:
        """What others may read, for stage.json: of a path, which says something about a disk here, the last part."""
        names = {"init": self.facts["init"], "data_name": self.options.data}
        public = {key: Path(name).name if Path(name).exists() else name for key, name in names.items()}
        packages = ("torch", "transformers", "peft", "accelerate")
        return (
            self.facts
            | public
            | {
                "step": step,
                "row": asdict(self.stage) | {"steps": self.stage.steps},
                "device": torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "CPU",
                "processes": self.accelerator.num_processes,
                "versions": {"Python": platform.python_version()} | {name: version(name) for name in packages},
            }
        )

    def _save_result(self, tensors: dict[str, torch.Tensor]) -> Path:
        """Write what the stage leaves behind: the adapter, or a whole model with the adapter in it."""
        result = adapter = self.work_dir / "result"
        for left_over in (result, self.work_dir / ADAPTER_DIR):
            shutil.rmtree(left_over, ignore_errors=True)
        if self.options.export or self.stage.exports:
            adapter = self.work_dir / ADAPTER_DIR
        facts = self._public_facts(self.num_steps)
        save_adapter(adapter, tensors, self.lora_scales, self.start.base, facts)
        if adapter is not result:
            sources, config, lora = stage_sources(adapter)
            plan = make_plan(sources, config, self.processor, lora=lora)
            write_release(plan, result, getattr(torch, str(config.dtype or "float32").removeprefix("torch.")))
            shutil.copyfile(adapter / STAGE_FILE, result / STAGE_FILE)
            adapter.rename(result / ADAPTER_DIR)
        history = read_history(self.work_dir / HISTORY_FILE)
        draw_report(history, f"Stage {self.stage.name}", result / REPORT_FILE)
        model_id = self.options.hub_model_id or self.options.output_dir.name
        shutil.copyfile(self.work_dir / HISTORY_FILE, result / HISTORY_FILE)
        write_card(result, model_id=model_id)
        if (self.work_dir / LOGS_DIR).exists():
            shutil.copytree(self.work_dir / LOGS_DIR, result / LOGS_DIR)
        return result

    def estimate(self):
        """Take a few steps from the middle of the stage and print what they mean for the whole."""
        first = max(0, min(self.stage.steps // 2, self.stage.steps - DRY_STEPS))
        steps = range(first, min(first + DRY_STEPS, self.stage.steps))
        seconds, resident = [], 0
        started = time.perf_counter()
        for step, (_, samples) in zip(steps, read_ahead(self.stream, steps, self.options.num_workers), strict=True):
            self._learn(step, samples)
            seconds.append(time.perf_counter() - started)
            resident = max(resident, psutil.Process().memory_info().rss)
            started = time.perf_counter()
        if self.accelerator.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the device"
        else:
            memory = f"{resident / 1e9:.2f} GB"
        step_seconds = fmean(seconds[1:] or seconds)  # the first one fetches memory and fills the workers
        num_steps = self.num_steps - self.first_step
        whole = num_steps * step_seconds
        duration = f"{whole / 3600:.1f} hours" if whole >= 3600 else f"{whole / 60:.1f} minutes"
        self.accelerator.print(
            f"Dry run: a step takes {step_seconds:.2f} s and {memory}; {num_steps:,} steps would take {duration} here. "
            "Nothing was kept."
        )


def _flat(entry: dict, prefix: str = "") -> dict[str, float]:
    """An entry of the history as trackers take it: numbers by names with slashes."""
    flat = {}
    for name, value in entry.items():
        if isinstance(value, list):
            value = {f"expert_{index}": each for index, each in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, str) and name != "step":
            flat[prefix + name] = value
    return flat


def build_model(accelerator: Accelerator, stage: Stage, start: ModelFiles, options: RunOptions) -> torch.nn.Module:
    """The model of `start`, ready for the stage. Under mixed precision its frozen matrices are held in half precision."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    half = half if accelerator.native_amp else None  # there is no float16 on a CPU, for one
    loading = {}
    if options.attn_implementation is not None:
        loading["attn_implementation"] = {"text_config": options.attn_implementation}
    if options.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half or torch.float32,
            llm_int8_skip_modules=NOT_IN_4_BIT,
        )
        loading["device_map"] = {"": accelerator.device}
    model = prepare_model(
        load_weights(start.base, dtype=torch.float32, local_files_only=start.offline, **loading),
        stage,
        start.adapter,
        start.stage,
    )
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)  # they cast themselves
    if half is not None and not sharded:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.data = parameter.data.to(half)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# ---- Before the first step ------------------------------------------------------------------------------------------


def check_options(stage: Stage, options: RunOptions, work_dir: Path) -> ModelFiles:
    """Refuse what cannot work, before anything heavy is loaded; returns what `--init` is.

    Raises:
        ValueError: with what is wrong and what to do.
    """
    for name in ("max_steps", "device_batch", "save_every", "keep_checkpoints", "hub_every"):
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
    if options.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError("--load_in_4bit needs bitsandbytes: pip install 'minigpt3d[quantization]'")
    for tracker in options.report_to:
        if tracker not in [each.value for each in get_available_trackers()]:
            known = [str(each) for each in LoggerType.list() if each != "all"]
            how = (
                f"not installed: pip install {tracker}" if tracker in known else f"expected one of {', '.join(known)}."
            )
            raise ValueError(f"--report_to {tracker}: {how}")
    if options.push_to_hub != (options.hub_model_id is not None):
        raise ValueError("--push_to_hub and --hub_model_id OWNER/NAME belong together: give both, or neither.")
    if options.hub_every is not None and not options.push_to_hub:
        raise ValueError("--hub_every says how often to publish: give --push_to_hub and --hub_model_id too.")
    start = find_model(options.init)
    if start.stage and stage.starts_from not in (start.stage["stage"], "any"):
        raise ValueError(
            f"Stage {stage.name} starts from stage {stage.starts_from}'s result, but --init {options.init} is the "
            f"result of stage {start.stage['stage']}. Pass the right folder; to teach a finished model your own objects, use "
            "training/finetune.py."
        )
    if options.push_to_hub:
        if (options.hub_every or not (options.export or stage.exports)) and Path(start.base).is_dir():
            raise ValueError(
                f"--push_to_hub: the result is an adapter on {start.base}, which others do not have. Publish that and pass "
                "its Hub id as --init, or publish the whole model with --export, and without --hub_every."
            )
        check_repository(options.hub_model_id)
    return start


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


def train_step(
    accelerator: Accelerator, model, optimizer, micro_batches: list[list[dict]], lr: float
) -> tuple[float, float]:
    """One optimizer step on the table's batch, in as many micro-batches as the devices need.

    The loss is the mean over all answer tokens of the batch, so its split over micro-batches and processes, which hold
    unequal numbers of tokens, changes nothing.

    Returns:
        That loss, over all processes, and the norm of its gradient.
    """
    device = accelerator.device
    one_row = takes_one_row(accelerator.unwrap_model(model, keep_torch_compile=False))
    for group in optimizer.param_groups:
        group["lr"] = lr
    num_tokens = sum((sample["labels"][1:] != -100).sum() for batch in micro_batches for sample in batch)
    num_tokens = accelerator.reduce(num_tokens.to(device))
    batch_loss = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        accelerator.sync_gradients = index == len(micro_batches) - 1  # gradients are averaged over processes once
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in pack_batch(batch, one_row).items()}
            loss = model(**batch, use_cache=False, num_items_in_batch=num_tokens).loss
            accelerator.backward(loss * accelerator.num_processes)
        batch_loss += loss.detach()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grad_norm = accelerator.clip_grad_norm_(trainable, math.inf)  # measured; nothing is clipped
    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm or 0.0)
    batch_loss = accelerator.reduce(batch_loss).item()
    # fp16's scaler leaves out by itself the steps whose gradient overflows.
    if math.isfinite(batch_loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None):
        optimizer.step()
    optimizer.zero_grad()
    return batch_loss, grad_norm
