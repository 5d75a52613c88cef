"""Check that a model computes here what it computed where it was made (`minigpt3d verify`).

The model is loaded as users load it: in a fresh process in which this package cannot be imported. A fixed cloud and prompt
go through it, and the outputs are summarized in a few numbers, the digest, which `verification.json` stores.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minigpt3d.files import read_json, write_json
from minigpt3d.hub import find_model
from minigpt3d.messages import one_line


VERIFICATION_FILE = "verification.json"
DIGEST_LENGTH = 8
# Differences that rounding can explain, relative to the digest's scale (its root mean square). Everything before the
# language model is computed in float32, the language model in its own dtype. On the household model, eager attention
# instead of sdpa moves the features by 3e-7, and the logits by 3e-7, 3e-4 and 3e-3 in float32, float16 and bfloat16;
# deeper models round more.
FEATURE_TOLERANCE = 1e-4
LOGIT_TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}

# argv: folder or Hub id, and an adapter's folder or "". Prints the digest as its last line.
_PROGRAM = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("minigpt3d",):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model, loading = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype="auto", output_loading_info=True
)
problems = {key: sorted(map(str, value))[:3] for key, value in loading.items() if value}
if problems:
    raise SystemExit(f"weights and configuration do not agree: {problems}")
if sys.argv[2]:
    model.load_adapter(sys.argv[2])
model.eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)

# A torus knot, colored along its length: the same cloud everywhere, without random numbers.
t = np.linspace(0, 2 * np.pi, processor.feature_extractor.num_points, endpoint=False)
radius = 2 + np.cos(3 * t)
coord = np.stack([radius * np.cos(2 * t), np.sin(3 * t), radius * np.sin(2 * t)], axis=1)
cloud = np.concatenate([coord, 0.5 + 0.5 * np.stack([np.cos(t), np.sin(t), np.cos(2 * t)], axis=1)], axis=1)

def digest(values):
    # Root mean square, and seven projections on fixed waves.
    values = values.detach().double().flatten()
    index = torch.arange(1, len(values) + 1, dtype=torch.double)
    waves = [(values * torch.cos(0.7310585 * k * index)).sum() / len(values) ** 0.5 for k in range(1, 8)]
    return [round(x.item(), 7) for x in (values.square().mean().sqrt(), *waves)]

prompt = "What is this?"
content = [{"type": "point_cloud", "point_cloud": cloud.astype(np.float32)}, {"type": "text", "text": prompt}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
)
def to_vectors(dtype):
    for name, part in model.model.named_children():
        if name != "language_model":
            part.to(dtype)

dtype = model.lm_head.weight.dtype
with torch.no_grad():
    to_vectors(torch.float32)
    features = model.get_point_features(inputs["point_clouds"]).pooler_output
    to_vectors(dtype)
    logits = model(**inputs).logits[0, -1]
    output = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=24, stop_strings=["###"], tokenizer=processor.tokenizer
    )
text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({
    "cloud": "torus knot (2, 3)",
    "prompt": prompt,
    "dtype": str(dtype).removeprefix("torch."),
    "parameters": sum(p.numel() for p in model.parameters()),
    "features": digest(features),
    "logits": digest(logits),
    "text": text.split("###")[0].strip(),
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
}))
"""


class KilledError(ValueError):
    """The process that computed the digest was killed, most likely for lack of memory; the model may be correct."""


def compute(model: str | Path) -> dict:
    """The digest of a model, computed here without this package.

    Args:
        model: folder or Hub id of a model or an adapter. Its code is run.

    Raises:
        KilledError: the process was killed.
        ValueError: it cannot be loaded or run.
    """
    files = find_model(model)
    base = str(Path(files.base).resolve()) if Path(files.base).is_dir() else files.base
    adapter = str(files.adapter.resolve()) if files.adapter else ""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        # A folder that is being written has a temporary name; its code must not stay in the cache under it.
        environment["HF_MODULES_CACHE"] = folder
        command = [sys.executable, "-c", _PROGRAM, base, adapter]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        raise KilledError(f"{model}: loading was killed (signal {-done.returncode}), most likely for lack of memory")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{model}: cannot be loaded without the package: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def differences(computed: dict, stored: dict) -> list[str]:
    """What differs by more than rounding, one line each."""
    lines = []
    if computed["parameters"] != stored["parameters"]:
        lines.append(f"parameters: {computed['parameters']:,} here, {stored['parameters']:,} stored")
    for part, tolerance in (("features", FEATURE_TOLERANCE), ("logits", LOGIT_TOLERANCES[stored["dtype"]])):
        scale = stored[part][0]
        error = max(abs(here - there) for here, there in zip(computed[part], stored[part], strict=True))
        if not error <= tolerance * scale:
            lines.append(
                f"{part}: off by {error:.2g} on a scale of {scale:.2g}, rounding explains {tolerance * scale:.2g}"
            )
    return lines


def to_text(computed: dict) -> str:
    """The digest as a few lines."""
    parts = [f"{part:<10}" + " ".join(f"{value:.5f}" for value in computed[part]) for part in ("features", "logits")]
    first = f"{computed['parameters']:,} parameters, {computed['dtype']}"
    return "\n".join([first, *parts, f"text      {computed['text']!r}"])


def read_stored(model: str | Path) -> dict | None:
    """`verification.json` of a folder or Hub id; None if it has none.

    Raises:
        ValueError: the file was not written by `store`.
    """
    from transformers.utils import cached_file

    path = cached_file(str(model), VERIFICATION_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        stored = read_json(path)
        differences(stored, stored)
        if not all(len(stored[part]) == DIGEST_LENGTH for part in ("features", "logits")):
            raise ValueError("a digest of another length")
        stored["text"], stored["versions"].items()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: not a stored verification ({one_line(error)}). Remove it.") from error
    return stored


def store(model_dir: Path, computed: dict):
    """Write `verification.json`."""
    write_json(model_dir / VERIFICATION_FILE, computed)
