"""The bundled model quantized and offloaded: the answers on the README's objects are those of float32.

The libraries are optional: a test whose library is missing is skipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.hub import BUNDLED_MODEL
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor


OBJECTS = Path(__file__).parents[2] / "demo" / "objects"
EXPECTED = {
    "drawersCabinet.npy": "This is a brown cabinet.",
    "oakTable.ply": "This is a brown table.",
    "osakaChair.obj": "This is a brown chair.",
}


def load(**options) -> MiniGPT3DForConditionalGeneration:
    return MiniGPT3DForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def processor():
    return MiniGPT3DProcessor.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def inputs(processor):
    conversations = []
    for name in EXPECTED:
        cloud = {"type": "point_cloud", "point_cloud": str(OBJECTS / name)}
        conversations.append([{"role": "user", "content": [cloud, {"type": "text", "text": "What is this?"}]}])
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
    )


@pytest.fixture
def check_answers(processor, inputs):
    def check(model):
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=20, stop_strings=["###"], tokenizer=processor.tokenizer
        )
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [text.split("###")[0].strip() for text in texts] == list(EXPECTED.values())

    return check


# ---- Quantization ----------------------------------------------------------------------------------------------------


def quantize_torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZATIONS = {
    "bitsandbytes 4-bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao", quantize_torchao),
    "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
}


def quantized_names(model) -> set[str]:
    """Linear layers whose weight is no plain tensor of floats."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point())
    }


def needs(library: str):
    try:
        found = importlib.util.find_spec(library)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantized_model_answers_as_float32(name, check_answers):
    library, make_config = QUANTIZATIONS[name]
    needs(library)
    model = load(quantization_config=make_config())
    names = quantized_names(model)
    assert names and all(name.startswith("model.language_model.") for name in names)
    check_answers(model)


def test_every_layer_in_8_bit(check_answers):
    """The encoder calls its layers: named modules alone are left out."""
    needs("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = load(quantization_config=config)
    assert "model.point_encoder.mini_pointnet.point_linear_3" in quantized_names(model)
    check_answers(model)
    assert config.llm_int8_skip_modules == ["lm_head"]


# ---- Placement -------------------------------------------------------------------------------------------------------


def test_cpu_offload(check_answers):
    check_answers(cpu_offload(load(), execution_device=torch.device("cpu")))


def test_disk_offload(check_answers, tmp_path):
    check_answers(disk_offload(load(), tmp_path, execution_device=torch.device("cpu")))


def layer_by_layer(model) -> dict[str, str]:
    """Every module with parameters in turn in memory and on the disk; parameters beside modules in memory."""
    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    leaves = [name for name in leaves if list(model.get_submodule(name).parameters())]
    beside = {"model.point_encoder.cls_token": "cpu", "model.point_encoder.cls_position": "cpu"}
    return {name: ("cpu", "disk")[index % 2] for index, name in enumerate(leaves)} | beside


SPLITS = {
    "all on disk": lambda model: {"": "disk"},
    "layer by layer": layer_by_layer,
    **{
        f"{megabytes} MB in memory": lambda model, megabytes=megabytes: infer_auto_device_map(
            model, {"cpu": megabytes << 20, "disk": 1 << 40}, no_split_module_classes=model._no_split_modules
        )
        for megabytes in (3, 8)
    },
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_model_answers_as_float32(split, check_answers, tmp_path):
    config = MiniGPT3DConfig.from_pretrained(BUNDLED_MODEL)
    with torch.device("meta"):
        meta = MiniGPT3DForConditionalGeneration(config)
    device_map = SPLITS[split](meta)
    assert "disk" in device_map.values()
    check_answers(load(device_map=device_map, offload_folder=tmp_path))
