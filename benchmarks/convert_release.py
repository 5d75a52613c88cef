"""Time and peak memory of `minigpt3d convert` on files of the released model's sizes.

    python benchmarks/convert_release.py [--dir DIR] [--scale 1.0]

Writes random float16 files in the layout of the authors' release (2.92 G parameters of the model, 6 GB; Phi-2 in its official
layout, as .bin shards, which is the harder one), converts them in a separate process, and prints its time and peak memory
beside the largest shard that it wrote. `--scale 0.1` uses a tenth of the language model's layers.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.conversion.lora import QFORMER_LORA_TARGETS, lora_modules
from minigpt3d.conversion.names import FILES, FUSED_ATTENTION, SPLIT_ATTENTION, matches, our_name
from minigpt3d.conversion.state_dict import authors_state_dict, expected_shapes
from minigpt3d.training.stages import STAGE_3


TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "household"
# Runs the conversion and writes the peak memory of its process into a file, in bytes on macOS, else in kilobytes.
PROGRAM = """
import resource, sys
from pathlib import Path
from minigpt3d.cli.main import main
code = main(sys.argv[1:])
Path("peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.exit(code)
"""
LORA_RANKS = {True: STAGE_3.qformer_lora.rank, False: STAGE_3.language_lora.rank}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="for the files, twice 6 GB (default: a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the language model's 32 layers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        run(Path(folder), args.scale)


def run(folder: Path, scale: float):
    layers = max(1, round(32 * scale))
    config = MiniGPT3DConfig(text_config={"num_hidden_layers": layers})
    config.to_json_file(folder / "config.json")
    # In a separate process, because the memory of this one would count for the processes that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        options, size = pool.submit(write_files, folder, config).result()
    out = folder / "out"
    command = [sys.executable, "-c", PROGRAM, "convert", *options, "--out", out, "--config", folder / "config.json"]
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, cwd=folder)
    seconds = time.perf_counter() - started
    peak = int((folder / "peak").read_text()) * (1 if sys.platform == "darwin" else 1024)
    shards = [path.stat().st_size for path in out.glob("*.safetensors")]
    print(
        f"{size / 1e9:.2f} GB of files, {sum(shards) / 1e9:.2f} GB written in {len(shards)} shards, largest "
        f"{max(shards) / 1e9:.2f} GB\n{seconds:.0f} s, peak memory {peak / 1e9:.2f} GB, "
        f"{(peak - max(shards)) / 1e9:.2f} GB above the largest shard"
    )


def write_files(folder: Path, config: MiniGPT3DConfig) -> tuple[list, int]:
    """Random files of every slot; returns the options of the command, and the bytes written."""
    shapes = dict(expected_shapes(config))
    for module in lora_modules(config, shapes):
        rank = LORA_RANKS[bool(re.fullmatch(QFORMER_LORA_TARGETS, module))]
        width_out, width_in = shapes[f"{module}.weight"]
        shapes |= {f"{module}.lora_A.weight": (rank, width_in), f"{module}.lora_B.weight": (width_out, rank)}
    state = authors_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).half()
    options, size = [], 0
    for file in tqdm(FILES, desc="files", unit="file"):
        tensors = {}
        for key, tensor in state.items():
            if matches(our_name(key), file.gives):
                key = key.removeprefix(file.prefix)
                tensors |= random_tensors(key, tuple(tensor.shape), block, split=file.slot == "phi")
        path = folder / (file.slot if file.slot == "phi" else f"{file.slot}.pth")
        if file.slot == "phi":
            write_phi(path, tensors)
        else:
            torch.save({file.container: tensors}, path)
        files = path.iterdir() if path.is_dir() else [path]
        size += sum(path.stat().st_size for path in files)
        options += ["--" + file.slot.replace("_", "-"), path]
    return options, size


def random_tensors(key: str, shape: tuple[int, ...], block: torch.Tensor, split: bool) -> dict[str, torch.Tensor]:
    """Values from one random block, repeated: their statistics do not matter."""
    if "num_batches_tracked" in key:
        return {key: torch.tensor(0)}
    if split and FUSED_ATTENTION in key:
        part = (shape[0] // 3, *shape[1:])
        return {
            k: t
            for name in SPLIT_ATTENTION
            for k, t in random_tensors(key.replace(FUSED_ATTENTION, name), part, block, False).items()
        }
    count = torch.Size(shape).numel()
    return {key: block.repeat(-(-count // len(block)))[:count].view(shape).clone()}


def write_phi(folder: Path, tensors: dict[str, torch.Tensor]):
    folder.mkdir()
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for filename, keys in shards.items():
        torch.save({key: tensors[key] for key in keys}, folder / filename)
    index = {"weight_map": {key: filename for filename, keys in shards.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


if __name__ == "__main__":
    main()
