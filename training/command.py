"""The command line of the stages; `stage1.py` to `stage4.py` and `finetune.py` call `main`.

`--help` and mistakes in the options take no second: torch is imported after the options have been checked.
"""

import sys
from collections.abc import Sequence

from minigpt3d.arguments import run_script, with_flags

from .run_options import FinetuneOptions, RunOptions
from .stages import RECIPES, Stage


def main(stage_name: str, argv: Sequence[str] | None = None):
    """Read the options of a stage and run it.

    Args:
        stage_name: "I" to "IV", or "own".
        argv: arguments; `sys.argv[1:]` by default.

    Raises:
        SystemExit: 2 for options that cannot be parsed, 1 with a message for errors that the user can mend, 128 + the
            signal's number after a signal.
    """

    def check_and_run(options: RunOptions):
        options.check()
        _run(RECIPES[options.recipe][stage_name], options)

    options = FinetuneOptions if stage_name == "own" else RunOptions
    run_script(check_and_run, options, argv, _describe(RECIPES["paper"][stage_name]))


def _run(stage: Stage, options: RunOptions):
    import torch

    from .loop import LossError, Stopped, train

    try:
        train(stage, options)
    except LossError as error:
        raise SystemExit(f"error: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"error: the device is out of memory ({str(error).splitlines()[0]}). Try a smaller --device_batch, "
            "--gradient_checkpointing or --load_in_4bit; the first two do not change the result of a step."
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # raised by torch wherever the loop happens to be
            raise
        raise SystemExit(
            f"error: a data loading process was lost ({error}), most likely for lack of memory. Resume with "
            "--resume auto and a smaller --num_workers; 0 loads data in the main process."
        ) from error
    except Stopped as stopped:
        print(with_flags(str(stopped), RunOptions, "_"), file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None


def _describe(stage: Stage) -> str:
    sources = ", ".join(f"{source.name} ({source.batch} a step)" for source in stage.mixture)
    start = {"base": "the pretrained parts", "any": "a finished model"}
    return (
        f"{stage.title} of MiniGPT-3D: {stage.teaches}. It starts from "
        f"{start.get(stage.starts_from, f'stage {stage.starts_from}')} and takes {stage.steps:,} steps on {sources}, with "
        f"learning rates {stage.warmup_lr:g} → {stage.peak_lr:g} → {stage.min_lr:g}. These values are those of the recipe "
        "`paper` in training/stages.py; the options say how to run it."
    )
