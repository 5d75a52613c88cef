"""Options of a conversion."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import option


FILES = "the authors' files (none: download them all)"


def file_option(help: str, metavar: str = "FILE"):
    """An option for one of the authors' files; its name is the slot of `names.FILES`."""
    return option(help, default=None, metavar=metavar, group=FILES)


@dataclass(kw_only=True)
class ConvertOptions:
    """What to convert, from which files, and how to write it."""

    phi: Path | None = file_option("Phi-2: the authors' folder, or the official one", "DIR")
    blip2: Path | None = file_option("blip2_pretrained_flant5xxl.pth")
    point_encoder: Path | None = file_option("point_model.pth")
    tinygpt_v: Path | None = file_option("TinyGPT-V_for_Stage3.pth")
    stage3: Path | None = file_option("MiniGPT_3D_stage_3.pth")
    stage4: Path | None = file_option("MiniGPT_3D_stage_4.pth")
    revision: str | None = option(
        "commit of the authors' repository (default: the newest one)", default=None, group=FILES
    )
    yes: bool = option("download without asking", default=False, group=FILES)
    stage_result: Path | None = option(
        "instead of files: the output folder of a training stage", default=None, metavar="DIR"
    )
    out: Path = option("folder to write", metavar="DIR")
    overwrite: bool = option("replace an existing model", default=False)
    dtype: Literal["float16", "bfloat16", "float32"] = option("dtype of the weights", default="float16")
    lora: Literal["merge", "keep"] | None = option(
        "merge: plain weights. keep: OUT/base and OUT/adapter, a PEFT adapter to train further (default: merge; without "
        "stage 4: keep)",
        default=None,
    )
    router: Literal["sparse", "soft", "constant", "none"] | None = option(
        "mixing of the query experts (default: sparse; before stage IV: none)", default=None
    )
    ignore: list[str] = option(
        "skip keys that do not fit, such as 'visual_encoder.*' or 'stage3:llama_proj.*'; may be repeated, is recorded",
        default=[],
        action="append",
        metavar="PATTERN",
    )
    config: Path | None = option(
        "config.json of a model of other sizes (default: the paper's)", default=None, metavar="FILE"
    )
    verify: bool = option("load the result in a new process, and store what it computes", default=False)

    @property
    def files(self) -> dict[str, Path]:
        """The authors' files that were given, by slot."""
        slots = [field.name for field in fields(self) if field.metadata.get("group") == FILES]
        return {slot: path for slot in slots if isinstance(path := getattr(self, slot), Path)}

    def check(self):
        """
        Raises:
            ValueError: a given file is missing, `out` cannot be written, or options exclude each other.
        """
        from minigpt3d.hub import check_model_dir

        given = self.files | {"stage_result": self.stage_result, "config": self.config}
        for name, path in given.items():
            if path is not None and not path.exists():
                raise ValueError(f"`{name}` {path}: there is no such file or folder. Check the path.")
        out = check_model_dir(self.out, [*self.files.values(), *filter(None, [self.stage_result])])
        if out.exists() and any(out.iterdir()) and not self.overwrite:
            raise ValueError(f"{self.out} holds a model already; pass a new folder, or `overwrite` to replace it")
        if self.stage_result and (self.files or self.config):
            raise ValueError("`stage_result` stands alone: leave out the authors' files and `config`")
