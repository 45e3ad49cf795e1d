"""
What the common tests need to know of a dual encoder: [`GapClosedClipModel`] and, the reference, `CLIPModel`.

Three of the common tests look for hidden states and attentions in the model's own output. A dual encoder has none of
its own, they are its towers': these tests are adapted here, in the same way for both models.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from conftest import IMAGE_SIZE, tiny_inputs
from transformers import PreTrainedConfig
from transformers.testing_utils import torch_device


LAYERS = 2  # of each tower
PATCH_SIZE = 14
PATCHES_A_SIDE = IMAGE_SIZE // PATCH_SIZE


class DualEncoderTester(ABC):
    """What the common tests ask about the model under test: a tiny configuration, inputs, and sizes."""

    input_names = ("pixel_values", "input_ids", "attention_mask")

    def __init__(self):
        self.batch_size, self.seq_length = tiny_inputs()["input_ids"].shape
        self.image_size = IMAGE_SIZE
        self.num_hidden_layers = LAYERS
        self.is_training = True

    @abstractmethod
    def get_config(self) -> PreTrainedConfig: ...

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        inputs = tiny_inputs()
        return self.get_config(), {name: inputs[name].to(torch_device) for name in self.input_names}


class DualEncoderTestsMixin:
    """Goes before `ModelTesterMixin`. Its tester has `image_states()`, shapes of the image tower's hidden states."""

    _is_composite = True
    # Only models of after 2023 have to pass this test; here both do.
    test_can_init_all_missing_weights_before_2023 = True

    def _run(self, config: PreTrainedConfig, **outputs_requested: bool):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](copy.deepcopy(config)).to(torch_device).eval()
        with torch.no_grad():
            return model(**inputs, **outputs_requested)

    def test_attention_outputs(self):
        """Adapted: the text tower's attentions, by argument and by configuration."""
        config = self.model_tester.get_config()
        config._attn_implementation = "eager"
        by_argument = self._run(config, output_attentions=True)
        config.text_config.output_attentions = True
        by_config = self._run(config)

        length, heads = self.model_tester.seq_length, config.text_config.num_attention_heads
        for outputs in (by_argument, by_config):
            shapes = [tuple(attentions.shape) for attentions in outputs.text_model_output.attentions]
            self.assertEqual(shapes, [(self.model_tester.batch_size, heads, length, length)] * LAYERS)

    def test_hidden_states_output(self):
        """Adapted: both towers' hidden states, by argument and by configuration."""
        config = self.model_tester.get_config()
        by_argument = self._run(config, output_hidden_states=True)
        config.text_config.output_hidden_states = config.vision_config.output_hidden_states = True
        by_config = self._run(config)

        text_state = (self.model_tester.batch_size, self.model_tester.seq_length, config.text_config.hidden_size)
        for outputs in (by_argument, by_config):
            texts = [tuple(states.shape) for states in outputs.text_model_output.hidden_states]
            self.assertEqual(texts, [text_state] * (LAYERS + 1))
            images = [tuple(states.shape) for states in outputs.vision_model_output.hidden_states]
            self.assertEqual(images, self.model_tester.image_states())

    def test_retain_grad_hidden_states_attentions(self):
        """Adapted: the loss's gradient in the text tower's; timm's are copies that the loss does not go through."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0]._from_config(config, attn_implementation="eager").to(torch_device)
        outputs = model(**inputs | {"return_loss": True}, output_attentions=True, output_hidden_states=True)
        retained = [outputs.text_model_output.hidden_states[0], outputs.text_model_output.attentions[0]]
        for states in retained:
            states.retain_grad()
        outputs.loss.backward()
        for states in retained:
            self.assertIsNotNone(states.grad)
