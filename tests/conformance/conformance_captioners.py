"""
The common tests of captioners: ours and, the reference, transformers' own BLIP, a BERT decoder on image patches, too.

Run by `run.py`, as `conformance_models.py` is. The tests of generation (`GenerationTesterMixin`) run with them where
the source distribution has them.
"""

import unittest
from typing import Any

from conftest import IMAGE_SIZE, tiny_config
from dual_encoders import LAYERS, PATCH_SIZE, PATCHES_A_SIDE, DualEncoderTester
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from gap_closed_clip import GapClosedClipConfig, GapClosedClipForConditionalGeneration
from gap_closed_clip.model.decoder_gap_closed_clip import decoder_config_like


class CaptionerTester(DualEncoderTester):
    def __init__(self):
        super().__init__()
        self.hidden_size, self.num_attention_heads = 48, 3


class CaptionerTestsMixin(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True
    # The other side, where a test builds its inputs from the main one.
    additional_model_inputs = ["input_ids", "pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs


class GapClosedClipCaptionerTester(CaptionerTester):
    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def get_config(self) -> GapClosedClipConfig:
        config = tiny_config(**self.options)
        config.vision_config.model_args["depth"] = config.text_config.num_hidden_layers = LAYERS
        config.decoder_config = decoder_config_like(config.text_config)
        config.decoder_config.bos_token_id, config.decoder_config.eos_token_id = 2, 3
        return config


class GapClosedClipCaptionerTest(CaptionerTestsMixin, unittest.TestCase):
    """The defaults: patches and embedding."""

    all_model_classes = (GapClosedClipForConditionalGeneration,)

    def setUp(self):
        self.model_tester = GapClosedClipCaptionerTester()
        self.config_tester = ConfigTester(self, GapClosedClipConfig, has_text_modality=False, projection_dim=24)

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.model_tester.options["caption_objective_weight"] = 0.5
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_training_gradient_checkpointing(self):
        """Adapted: in this test and its two variants our captioner also trains with the objective of the space,
        because a caption alone does not use the text tower, whose layer the test looks at."""
        super().test_training_gradient_checkpointing()

    @unittest.skip(
        "generate goes on from `input_ids`, the main input; forward takes images first, as the encoder does"
    )
    def test_model_main_input_name(self):
        pass

    if hasattr(ModelTesterMixin, "test_multimodal_outputs_are_returned"):  # since transformers 5.24

        @unittest.skip("the output has no `image_outputs`; BLIP's has none either, and fails")
        def test_multimodal_outputs_are_returned(self):
            pass


class GapClosedClipEmbeddingCaptionerTest(GapClosedClipCaptionerTest):
    """A decoder of the embedding alone, with noise; the space's own objective beside the captions."""

    def setUp(self):
        super().setUp()
        self.model_tester = GapClosedClipCaptionerTester(
            decoder_memory="embedding", decoder_embedding_tokens=2, embedding_noise=0.2, caption_objective_weight=0.5
        )


class BlipTester(CaptionerTester):
    encoder_seq_length = PATCHES_A_SIDE**2 + 1  # its attentions and hidden states are the image tower's

    def get_config(self) -> BlipConfig:
        sizes = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 64}
        tokens = {"vocab_size": 200, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
        return BlipConfig(
            text_config={**sizes, **tokens, "pad_token_id": 0, "sep_token_id": 3, "encoder_hidden_size": 48},
            vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
            projection_dim=32,
        )


class BlipCaptionerTest(CaptionerTestsMixin, unittest.TestCase):
    all_model_classes = (BlipForConditionalGeneration,)

    def setUp(self):
        self.model_tester = BlipTester()
        self.config_tester = ConfigTester(self, BlipConfig, has_text_modality=False, projection_dim=24)
