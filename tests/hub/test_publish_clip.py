"""CLIPs that were taken over: published, and loaded from the Hub where this package is not."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS
from conversion.clip_models import KINDS, embed_by_transformers, photo, save_source
from safetensors.torch import load_file

from gap_closed_clip import from_clip
from gap_closed_clip.hub import publication, publish

from .conftest import WITHOUT_PACKAGE


# Loads every repository and embeds the image and the captions.
STRANGER = """
import json
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

repositories, captions, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for number, repository in enumerate(repositories):
    model = AutoModel.from_pretrained(repository, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    image = Image.open("photo.png")
    inputs = processor(images=image, text=captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, return_loss=False)
    embeds = {"image": outputs.image_embeds, "text": outputs.text_embeds}
    save_file({name: value.contiguous() for name, value in embeds.items()}, f"{out}/{number}.safetensors")
"""


def differences(sources: dict[str, tuple[Path, tuple]], online, python, tmp_path, monkeypatch) -> dict[str, float]:
    """
    Takes CLIPs over, publishes them and loads them without the package.

    Args:
        sources: by a name, the folder and the library's own embeddings of `photo` and the captions.

    Returns:
        By name, the largest difference of a coordinate.
    """
    # It starts a process for each folder; here one loads all of them.
    monkeypatch.setattr(publication, "check_reload", lambda *_, **__: None)
    photo().save(tmp_path / "photo.png")
    repositories = []
    for number, (folder, _) in enumerate(sources.values()):
        model, processor = from_clip(folder)
        model.save_pretrained(tmp_path / f"taken{number}")
        processor.save_pretrained(tmp_path / f"taken{number}")
        publish(tmp_path / f"taken{number}", f"tester/clip{number}")
        repositories.append(f"tester/clip{number}")
    words = [json.dumps(repositories), json.dumps(CAPTIONS), str(tmp_path)]
    python("-c", WITHOUT_PACKAGE + STRANGER, *words, home="stranger")
    found = {}
    for number, (name, (_, expected)) in enumerate(sources.items()):
        embeds = load_file(tmp_path / f"{number}.safetensors")
        parts = zip(("image", "text"), expected, strict=False)
        found[name] = max((embeds[part] - value).abs().max().item() for part, value in parts)
    return found


def test_published_clips_embed_as_their_sources(online, python, tmp_path, monkeypatch):
    sources = {}
    for number, kind in enumerate(KINDS):
        folder = save_source(kind, tmp_path / f"source{number}")
        sources[kind] = folder, embed_by_transformers(folder, photo(), CAPTIONS)
    found = differences(sources, online, python, tmp_path, monkeypatch)
    assert max(found.values()) <= 1e-5, found


@torch.no_grad()
def test_published_models_of_open_clip_embed_as_their_sources(online, python, tmp_path, monkeypatch):
    open_clip_models = pytest.importorskip("conversion.open_clip_models", reason="open_clip is not installed")
    sources = {}
    for kind in ("ViT-B-32", "BiomedCLIP", "EVA-02", "SigLIP"):
        folder = open_clip_models.save_model(kind, tmp_path / kind)
        source = open_clip_models.load_reference(folder)
        image = source.model.encode_image(source.preprocess(photo())[None], normalize=True)
        sources[kind] = folder, (image, source.model.encode_text(source.tokenizer(CAPTIONS), normalize=True))
    found = differences(sources, online, python, tmp_path, monkeypatch)
    assert max(found.values()) <= 1e-5, found
