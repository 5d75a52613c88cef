"""Count the operators of a training step at full depth, and how often the device would be waited for. No GPU is needed.

    python benchmarks/operators.py

The model has the paper's layers with small widths, which changes no count, and computes on a CPU under bfloat16 autocast.
Views are not counted. A wait is an operator whose result the CPU needs: on a GPU it ends when all work before it is done.
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from counting import OperatorCounter
from train import make_samples

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training.loop import make_optimizer, train_step
from minigpt3d.training.measure import UpdateMeter
from minigpt3d.training.stages import RECIPES, Stage
from minigpt3d.training.stream import Packing, pack_batch
from minigpt3d.training.weights import prepare_model


# The paper's numbers of layers.
THIN = {
    "point_config": {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_groups": 16, "group_size": 8},
    "qformer_config": {
        "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "encoder_hidden_size": 24,
    },
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "point_projection_hidden_size": 24,
    "language_projection_hidden_size": 24,
}  # fmt: skip


def count_step(stage: Stage, batch: int = 9) -> OperatorCounter:
    """The operators of the second step of a stage: the first one creates the state of the optimizer."""
    torch.manual_seed(0)
    model = prepare_model(MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none", **THIN)), stage)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, make_optimizer(stage, model))
    meter, packing = UpdateMeter(model), Packing.of(model)
    rng = np.random.default_rng(0)
    for step in (0, 1):
        packed = pack_batch(make_samples(stage, model.config, batch, 64, rng), packing)
        with torch.autocast("cpu", torch.bfloat16), OperatorCounter() as counter:
            meter.remember(step)
            train_step(accelerator, model, optimizer, [packed], stage.peak_lr)
            meter.ratios()
    return counter


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'stage':<8}{'operators':>12}{'waits':>8}")
    for name, stage in RECIPES["paper"].items():
        if name != "own":
            counter = count_step(stage)
            print(f"{name:<8}{counter.operators.total():>12,}{counter.waits.total():>8}")


if __name__ == "__main__":
    main()
