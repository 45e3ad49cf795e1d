"""
The common tests of models and configurations: ours and, the reference, transformers' own CLIP.

Run by `run.py`, which makes `transformers_tests` importable; the name keeps pytest from collecting it by itself.
"""

import unittest
from typing import Any

from conftest import IMAGE_SIZE, tiny_config
from dual_encoders import LAYERS, PATCH_SIZE, PATCHES_A_SIDE, DualEncoderTester, DualEncoderTestsMixin
from modalities import modalities_config, modalities_inputs
from transformers import CLIPConfig, CLIPModel
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel


CONFIG_FIELDS = ["projection_dim", "logit_scale_init_value"]


class GapClosedClipTester(DualEncoderTester):
    input_names = (*DualEncoderTester.input_names, "token_type_ids")

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def get_config(self) -> GapClosedClipConfig:
        config = tiny_config(**self.options)
        config.vision_config.model_args["depth"] = config.text_config.num_hidden_layers = LAYERS
        return config

    def image_states(self) -> list[tuple[int, ...]]:
        # timm gives feature maps, those after its blocks
        width = self.get_config().vision_config.model_args["embed_dim"]
        return [(self.batch_size, width, PATCHES_A_SIDE, PATCHES_A_SIDE)] * LAYERS


class GapClosedClipModelTest(DualEncoderTestsMixin, ModelTesterMixin, unittest.TestCase):
    """The defaults: projections centered, strong alignment."""

    all_model_classes = (GapClosedClipModel,)
    # The other side, where a test builds its inputs from the main one, the images.
    additional_model_inputs = ["input_ids"]

    def setUp(self):
        self.model_tester = GapClosedClipTester(align_weight=3.0, uniformity_weight=0.0, center_projections=True)
        self.config_tester = ConfigTester(
            self, GapClosedClipConfig, has_text_modality=False, common_properties=CONFIG_FIELDS, projection_dim=24
        )

    def test_config(self):
        """transformers' tests of a configuration, which is one method there."""
        self.config_tester.run_common_tests()

    def test_get_image_features_hidden_states(self):
        """Adapted: for ours, one state less; timm gives those after its blocks, not the one before the first."""
        super().test_get_image_features_hidden_states()

    def _image_features_get_expected_num_hidden_states(self, model_tester=None) -> int:
        return LAYERS

    @unittest.skip("timm towers have no attentions to give: TimmWrapperModel raises ValueError when asked for them")
    def test_get_image_features_attentions(self):
        pass


class GapClosedClipOtherOptionsTest(GapClosedClipModelTest):
    """The papers' terms, one scheduled; not centered; projections with a hidden layer, mean pooling, fixed scale."""

    def setUp(self):
        super().setUp()
        self.model_tester = GapClosedClipTester(
            align_weight=1.0,
            uniformity_weight=[[0.2, 1.0], [0.7, 0.0]],
            center_projections=False,
            projection_hidden_dim=40,
            text_pooling="mean",
            learnable_temperature=False,
        )


class ClipTowersTester(GapClosedClipTester):
    """The towers of transformers' own CLIP, or of another of its models, inside ours."""

    input_names = DualEncoderTester.input_names

    def get_config(self) -> GapClosedClipConfig:
        sizes = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 64}
        tokens = {"vocab_size": 200, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
        images = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
        kinds = {"vision": "clip_vision_model", "text": "clip_text_model", **self.options}
        return tiny_config(
            vision_config={"model_type": kinds["vision"], **sizes, **images},
            text_config={"model_type": kinds["text"], **sizes, **tokens, "pad_token_id": 0},
            text_pooling="pooler" if kinds["text"].startswith(("clip", "siglip")) else "mean",
            projection_bias=False,
        )

    def image_states(self) -> list[tuple[int, ...]]:
        tokens = PATCHES_A_SIDE**2 + (not self.get_config().vision_config.model_type.startswith("siglip"))
        return [(self.batch_size, tokens, 48)] * (LAYERS + 1)


class GapClosedClipOfClipTowersTest(DualEncoderTestsMixin, ModelTesterMixin, unittest.TestCase):
    """CLIP's two halves."""

    all_model_classes = (GapClosedClipModel,)
    additional_model_inputs = ["input_ids"]
    towers: dict[str, str] = {}

    def setUp(self):
        self.model_tester = ClipTowersTester(**self.towers)


class GapClosedClipOfDinov2AndModernBertTest(GapClosedClipOfClipTowersTest):
    towers = {"vision": "dinov2", "text": "modernbert"}


class FourModalitiesTester(GapClosedClipTester):
    """With a record and sounds beside the images and texts."""

    input_names = tuple(modalities_inputs())

    def get_config(self) -> GapClosedClipConfig:
        config = modalities_config(**self.options)
        config.vision_config.model_args["depth"] = config.text_config.num_hidden_layers = LAYERS
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[GapClosedClipConfig, dict[str, Any]]:
        inputs = modalities_inputs()
        return self.get_config(), {name: inputs[name].to(torch_device) for name in self.input_names}


class GapClosedClipOfFourModalitiesTest(GapClosedClipModelTest):
    """Further modalities under the one mechanism."""

    def setUp(self):
        super().setUp()
        self.model_tester = FourModalitiesTester(center_projections=True)


class CLIPTester(DualEncoderTester):
    def get_config(self) -> CLIPConfig:
        sizes = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 64}
        tokens = {"vocab_size": 200, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
        return CLIPConfig(
            text_config={**sizes, **tokens},
            vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
            projection_dim=32,
        )

    def image_states(self) -> list[tuple[int, ...]]:
        return [(self.batch_size, PATCHES_A_SIDE**2 + 1, 48)] * (LAYERS + 1)

    def prepare_config_and_inputs_for_common(self) -> tuple[CLIPConfig, dict[str, Any]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {"return_loss": True}


class CLIPModelTest(DualEncoderTestsMixin, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CLIPModel,)
    additional_model_inputs = ["pixel_values"]

    def setUp(self):
        self.model_tester = CLIPTester()
        self.config_tester = ConfigTester(
            self, CLIPConfig, has_text_modality=False, common_properties=CONFIG_FIELDS, projection_dim=24
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("CLIPModel has no input embeddings of its own")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("CLIPModel has no input embeddings of its own")
    def test_resize_tokens_embeddings(self):
        pass
