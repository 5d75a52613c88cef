"""transformers' own tests of a model, from its source distribution: `make test-common` downloads and runs them.

The distribution lacks transformers' tests of generation and of export. Ours are in tests/unit/test_generation.py and
tests/e2e/test_export.py.
"""

import importlib
import os
import sys
import unittest
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from backbones import BACKBONES
from tiny_model import make_tiny_config, tiny_phi_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, MiniGPT3DModel, MiniGPT3DPhiModel


SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("needs the sources of transformers: run `make test-common`", allow_module_level=True)


def import_common_tests() -> ModuleType:
    """Import tests/test_modeling_common.py, with an empty mixin for each of the two that the distribution lacks."""
    package = "transformers_common"
    names = ("", ".exporters", ".exporters.test_export", ".generation", ".generation.test_utils")
    modules = {package + name: ModuleType(package + name) for name in names}
    modules[package].__path__ = [os.path.join(SOURCE, "tests")]
    modules[f"{package}.exporters.test_export"].ExportTesterMixin = object
    modules[f"{package}.generation.test_utils"].GenerationTesterMixin = type("NotDistributed", (), {})
    sys.modules.update(modules)
    return importlib.import_module(f"{package}.test_modeling_common")


common = import_common_tests()


class CommonTests(common.ModelTesterMixin):
    """What transformers asks of all models.

    transformers tells by the names of its own classes which have a head: ours are added to them during a test.
    """

    test_can_init_all_missing_weights_before_2023 = True  # "models of before 2023" are those without a copyright line

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self  # the object that makes configurations and inputs
        for mapping, model_class in (
            (MODEL_MAPPING_NAMES, self.all_model_classes[0]),
            (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MiniGPT3DForConditionalGeneration),
        ):
            patcher = patch.dict(mapping, {model_class.config_class.model_type: model_class.__name__})
            patcher.start()
            self.addCleanup(patcher.stop)

    batch_size = 7  # the tests of attention add rows, without clouds, to smaller batches
    seq_length = 12
    is_training = True
    num_hidden_layers = 2
    hidden_size = 64
    num_attention_heads = 4

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(5, 280, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class MiniGPT3DModelTest(CommonTests, unittest.TestCase):
    """Each row of text holds one cloud."""

    all_model_classes = (MiniGPT3DModel, MiniGPT3DForConditionalGeneration)
    additional_model_inputs = ["point_clouds"]
    _is_composite = True
    point_token_id = 4  # stays when a test removes the last rows of the embedding

    def get_config(self):
        text_config = tiny_phi_config(num_hidden_layers=self.num_hidden_layers)
        return make_tiny_config(text_config=text_config, point_token_id=self.point_token_id)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 3 : 3 + config.num_query_tokens] = self.point_token_id
        return config, inputs | {"point_clouds": torch.rand(self.batch_size, 64, 6)}

    def test_sdpa_can_dispatch_composite_models(self):
        """As in transformers, which finds the parts by names that ours do not have."""
        for implementation in ("sdpa", "eager"):
            config = self.get_config()
            config._attn_implementation = implementation
            model = MiniGPT3DForConditionalGeneration(config).model
            parts = (model, model.point_encoder, model.qformer, model.language_model)
            self.assertEqual({part.config._attn_implementation for part in parts}, {implementation})

    def test_reverse_loading_mapping(self):
        """Only older checkpoints have other names and are converted; what is saved has today's."""
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    @unittest.skip("transformers' sources have no GenerationTesterMixin: see tests/unit/test_generation.py")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("it loads a file without weights, which is refused: see tests/unit/test_weights.py")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


for name in dir(MiniGPT3DModelTest):
    if name.startswith("test_model_rope"):
        reason = "its text holds placeholders without clouds, which is refused; MiniGPT3DPhiModelTest runs it"
        setattr(MiniGPT3DModelTest, name, unittest.skip(reason)(lambda self: None))


class TiedModelTest(MiniGPT3DModelTest):
    """With another language model, whose head and embedding are one tensor."""

    def get_config(self):
        return make_tiny_config(**BACKBONES["llama-tied"], point_token_id=self.point_token_id)


class MiniGPT3DPhiModelTest(CommonTests, unittest.TestCase):
    """The language model alone."""

    all_model_classes = (MiniGPT3DPhiModel,)

    def get_config(self):
        return tiny_phi_config(num_hidden_layers=self.num_hidden_layers)
