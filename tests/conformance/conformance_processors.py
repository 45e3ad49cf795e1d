"""The common tests of processors: ours and, the reference, `CLIPProcessor`; run as `conformance_models.py` is."""

import string
import unittest

from conftest import CAPTIONS, IMAGE_SIZE
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, PreTrainedTokenizerBase
from transformers_tests.test_processing_common import ProcessorTesterMixin

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.training.encoder import train_tokenizer


def tiny_image_processor() -> CLIPImageProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


class GapClosedClipProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = GapClosedClipProcessor

    @classmethod
    def _setup_image_processor(cls) -> CLIPImageProcessor:
        return tiny_image_processor()

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerBase:
        return train_tokenizer(CAPTIONS, 200)


class CLIPProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CLIPProcessor

    @classmethod
    def _setup_image_processor(cls) -> CLIPImageProcessor:
        return tiny_image_processor()

    @classmethod
    def _setup_tokenizer(cls) -> CLIPTokenizer:
        symbols = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
        symbols += [f"{letter}</w>" for letter in string.ascii_lowercase]
        return CLIPTokenizer(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[])
