"""A model folder as it is published, and its handler, loaded as Hugging Face's toolkit loads it."""

import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForZeroShotImageClassification, ZeroShotImageClassificationPipeline

from gap_closed_clip import GapClosedClipModel

from ..conftest import load_handler
from .examples import IMAGES, TEXTS, save


@pytest.fixture(scope="package")
def model() -> GapClosedClipModel:
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(center_projections=True)).eval()
    # Weights as they are drawn give embeddings so alike that a mistake would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.0)
    return model


@pytest.fixture(scope="package")
def folder(model, tiny_processor, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"), model, tiny_processor)


@pytest.fixture(scope="package")
def modules(folder) -> tuple[types.ModuleType, types.ModuleType]:
    return load_handler(folder)


@pytest.fixture(scope="package")
def handler(modules) -> types.ModuleType:
    return modules[0]


@pytest.fixture(scope="package")
def handler_images(modules) -> types.ModuleType:
    return modules[1]


@pytest.fixture(scope="package")
def endpoint(handler, folder):
    return handler.EndpointHandler(str(folder))


@pytest.fixture(scope="package")
def embeds(model, tiny_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of IMAGES and TEXTS, by hand: (3, D) and (2, D)."""
    inputs = tiny_processor(images=IMAGES, text=TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


@pytest.fixture(scope="package")
def classify(folder, tiny_processor) -> ZeroShotImageClassificationPipeline:
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
    parts = {"image_processor": tiny_processor.image_processor, "tokenizer": tiny_processor.tokenizer}
    return ZeroShotImageClassificationPipeline(model=model.eval(), device="cpu", **parts)
