"""What README.md says of a trained folder, word for word."""

import re

import pytest
import torch
from conftest import captioner_of
from PIL import Image

from gap_closed_clip.checkpoint import load_checkpoint

from .conftest import ROOT, save_folder


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
(FINE_TUNE,) = [block for block in BLOCKS if "get_peft_model" in block]
USE = [block for block in BLOCKS if '"outputs/demo"' in block and block != FINE_TUNE]
(BETWEEN,) = [block for block in BLOCKS if "shared_embeds" in block]
(WRITE,) = [block for block in BLOCKS if '"image-text-to-text"' in block]


@pytest.mark.parametrize("block", USE)
def test_code_of_the_readme(block, tiny_model, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "outputs" / "demo", tiny_model, tiny_processor)
    image = Image.effect_noise((40, 36), 80).convert("RGB")
    (tmp_path / "outputs" / "demo" / "examples").mkdir()
    image.save("outputs/demo/examples/chest_radiograph.png")
    names: dict = {}
    exec(block, names)
    texts = ["Chest radiograph.", "Axial MR image of the brain.", "Normal chest radiograph."]
    inputs = tiny_processor(images=[image], text=texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        outputs = tiny_model(**inputs)
    image_embeds, text_embeds = outputs.image_embeds, outputs.text_embeds
    if "cosines" in names:
        torch.testing.assert_close(names["cosines"], image_embeds @ text_embeds[:2].T, atol=1e-5, rtol=0)
        return
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(torch.tensor(names["image_vector"]), image_embeds[0], **close)
    torch.testing.assert_close(torch.tensor(names["text_vector"]), text_embeds[1], **close)
    torch.testing.assert_close(
        names["gallery"], torch.stack([image_embeds[0], text_embeds[2], text_embeds[1]]), **close
    )
    assert {score["label"] for score in names["scores"]} == {"chest radiograph", "brain MR"}
    assert names["template"] == "Medical image of {}." and len(names["hits"]) == 2


def test_fine_tuning_of_the_readme(tiny_model, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "outputs" / "demo", tiny_model, tiny_processor)
    folder = tmp_path / "my_pairs" / "train" / "radiology"
    (folder / "images").mkdir(parents=True)
    for number in range(16):
        Image.effect_noise((40, 36), 10 + 5 * number).save(folder / "images" / f"{number}.jpg")
    (folder / "captions.txt").write_text("".join(f"{number}\tFinding number {number}.\n" for number in range(16)))
    exec(FINE_TUNE.replace("/data/my_pairs", str(tmp_path / "my_pairs")), {})
    assert not (tmp_path / "outputs" / "mine" / "model.safetensors").exists()
    model, _ = load_checkpoint("outputs/mine")
    before, after = tiny_model.state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = ("qkv", "fc1", "fc2", "proj", "query", "key", "value", "dense", "logit_scale", "_projection")
    assert moved and all(any(part in name for part in adapted) for name in moved)
    assert not any("patch_embed" in name or "embeddings" in name for name in moved)


def test_captions_of_the_readme(tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_captioner = captioner_of(tiny_processor.tokenizer)
    save_folder(tmp_path / "outputs" / "captioner", tiny_captioner, tiny_processor)
    image = Image.effect_noise((40, 36), 80).convert("RGB")
    (tmp_path / "outputs" / "captioner" / "examples").mkdir()
    image.save("outputs/captioner/examples/chest_radiograph.png")
    names: dict = {}
    exec(WRITE, names)
    pixel_values = tiny_processor(images=[image], return_tensors="pt")["pixel_values"]
    prompt = tiny_processor.tokenizer("Chest radiograph", return_tensors="pt")["input_ids"]
    beams = tiny_captioner.generate(pixel_values, num_beams=4)
    by_hand = [
        tiny_captioner.generate(pixel_values),
        tiny_captioner.generate(pixel_values, prompt, max_new_tokens=20),
        beams,
    ]
    expected = [tiny_processor.batch_decode(tokens, skip_special_tokens=True)[0] for tokens in by_hand]
    expected[1] = expected[1].replace("chest", "Chest", 1)  # the pipeline gives the prompt back as it was
    assert names["captions"] == expected and len(set(expected)) > 1


def test_writing_between_embeddings(tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioner = captioner_of(tiny_processor.tokenizer, decoder_memory="embedding")
    save_folder(tmp_path / "outputs" / "captioner_text", captioner, tiny_processor)
    names: dict = {}
    torch.manual_seed(3)
    exec(BETWEEN, names)
    embeds = [
        captioner.gap_closed_clip(**tiny_processor.tokenizer(text, return_tensors="pt")).text_embeds
        for text in ("Chest radiograph.", "Pleural effusion.")
    ]
    mean = (embeds[0] + embeds[1]) / 2
    torch.testing.assert_close(names["middle"], mean / mean.norm(), atol=1e-5, rtol=0)
    assert len(names["between"]) == 3 and all(names["between"])


def test_the_readme_shows_every_pipeline():
    tasks = (
        "zero-shot-image-classification",
        "image-feature-extraction",
        "feature-extraction",
        "image-text-retrieval",
    )
    assert len(USE) == 2 and all(any(f'pipeline("{task}"' in block for block in USE) for task in tasks)
