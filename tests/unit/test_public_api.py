"""What `import minigpt3d` gives, what it costs, and that transformers knows the classes whatever is imported first."""

import subprocess
import sys

import pytest

import minigpt3d


PUBLIC_NAMES = [
    "HUB_ID",
    "MiniGPT3DCollator",
    "MiniGPT3DConfig",
    "MiniGPT3DForConditionalGeneration",
    "MiniGPT3DModel",
    "MiniGPT3DPhiConfig",
    "MiniGPT3DPhiModel",
    "MiniGPT3DPointCloudProcessor",
    "MiniGPT3DPointConfig",
    "MiniGPT3DProcessor",
    "PointCloudError",
    "PointCloudToTextPipeline",
    "ReadingLimits",
    "ZeroShotPointCloudClassificationPipeline",
    "load_point_cloud",
    "prepare_tokenizer",
]

CHECK_REGISTRATION = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
import minigpt3d

config = AutoConfig.for_model("minigpt3d")
assert type(config) is minigpt3d.MiniGPT3DConfig
assert type(AutoConfig.for_model("minigpt3d_phi")) is minigpt3d.MiniGPT3DPhiConfig
assert AutoModel._model_mapping[type(config)] is minigpt3d.MiniGPT3DModel
assert AutoModelForImageTextToText._model_mapping[type(config)] is minigpt3d.MiniGPT3DForConditionalGeneration
task, _, _ = PIPELINE_REGISTRY.check_task("point-cloud-to-text")
assert task == "point-cloud-to-text"
folder = sys.argv[1]
assert type(AutoProcessor.from_pretrained(folder)) is minigpt3d.MiniGPT3DProcessor
assert type(AutoFeatureExtractor.from_pretrained(folder)) is minigpt3d.MiniGPT3DPointCloudProcessor
"""


def run_python(code: str, *arguments: str):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_public_names():
    assert sorted(minigpt3d.__all__) == PUBLIC_NAMES
    assert all(getattr(minigpt3d, name) is not None for name in PUBLIC_NAMES)
    assert set(PUBLIC_NAMES) <= set(dir(minigpt3d))
    with pytest.raises(AttributeError, match="MiniGPT4D"):
        _ = minigpt3d.MiniGPT4D


@pytest.mark.parametrize(
    "module",
    [
        "minigpt3d",
        "minigpt3d.arguments",
        "minigpt3d.cli.main",
        "minigpt3d.data.records",
        "minigpt3d.evaluation.suites",
        "minigpt3d.files",
        "minigpt3d.messages",
        "minigpt3d.training.stages",
    ],
)
def test_a_light_module_imports_nothing_heavy(module):
    run_python(f"import sys, {module}; assert not {{'torch', 'transformers'}} & sys.modules.keys()")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import minigpt3d",
        "import transformers",
        "from minigpt3d.modeling_minigpt3d import MiniGPT3DModel",
        "import minigpt3d.hub",
    ],
)
def test_transformers_knows_the_classes_whatever_is_imported_first(first):
    from minigpt3d.hub import BUNDLED_MODEL

    run_python(f"import sys\n{first}\n{CHECK_REGISTRATION}", str(BUNDLED_MODEL))
