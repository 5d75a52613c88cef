"""`minigpt3d new`: put a start for training together from a language model, a 3D encoder and a Q-Former."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import option

from .console import complain, quiet


HELP = "make a start for stage I with any causal language model"
DESCRIPTION = (
    "Put pretrained parts together into a model that stage I starts from. Sizes follow from the parts; projections and "
    "router are new. The language model's chat template is used if it has one, else ours."
)


@dataclass(kw_only=True)
class Options:
    llm: str = option("folder or Hub id of a causal language model", metavar="DIR_OR_ID")
    point_encoder: str = option(
        "3D encoder: a MiniGPT-3D model, or the authors' point_model.pth", metavar="DIR_OR_FILE"
    )
    qformer: str | None = option(
        "Q-Former and query tokens: a folder of BLIP-2, blip2_pretrained_flant5xxl.pth, or a MiniGPT-3D model (default: "
        "random, which the stages train with LoRA only)",
        default=None,
        metavar="DIR_OR_FILE",
    )
    out: Path = option("folder to write", metavar="DIR")
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        "dtype of the weights (default: the language model's)", default=None
    )


def run(options: Options, argv: list[str]) -> int:
    """Write the folder and print where each part comes from; returns the exit code."""
    import torch

    from minigpt3d.conversion.parts import write_start
    from minigpt3d.model_card.readme import write_card

    quiet()
    dtype = options.dtype and getattr(torch, options.dtype)

    def add_card(folder: Path):
        write_card(folder, name=options.out.resolve().name)

    print(write_start(options.llm, options.point_encoder, options.out, options.qformer, dtype, argv, add_card))
    if options.qformer is None:
        complain(
            "warning: the Q-Former is random, and the stages train only LoRA factors and norms in it; pass --qformer"
        )
    print(f"{options.out} is done; start with: accelerate launch training/stage1.py --init {options.out}")
    return 0
