"""A captioner's folder: published, loaded and run where this package is not, and what its card says."""

import json
import re

import pytest
import torch
import transformers
from conftest import noise_image, tiny_config
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.checkpoint import is_captioner
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import publish, reload, write_card
from gap_closed_clip.hub.reload import check_code, check_reload
from gap_closed_clip.training import load_config

from .card.rendering import section
from .conftest import ADDED, CAPTIONER_CODE, CODE, SAVED, WITHOUT_PACKAGE, save_folder


# Pipelines before give one caption for several images with one prompt; that of 5.17 warns of its own configuration.
NOT_BEFORE_5_23 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the pipeline of transformers before 5.23 lacks what this tests",
)


METRICS = {
    "coco_bleu_4": 0.1234,
    "rouge_l": 0.2345,
    "cider_d": 0.8765,
    "clip_score": 0.4321,
    "distinct_captions": 0.5,
    "num_images": 40.0,
}
# The card word for word, and the folder itself; all in one process, which takes seconds to start.
STRANGER = """
import json, pathlib, re
import torch
from importlib.util import find_spec
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

repo_id, folder, out = sys.argv[1:]
card = pathlib.Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
names = {}
for block in re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL):
    if "sentence_transformers" not in block or find_spec("sentence_transformers"):
        exec(block, names)
found = {name: names[name] for name in ("caption", "captions", "by_hand", "scores", "image_vector", "text_vector")}
found["hits"] = [hit["index"] for hit in names["hits"]]
trusted = {"trust_remote_code": True}
captioner = AutoModelForImageTextToText.from_pretrained(folder, **trusted).eval()
local = pipeline("image-text-to-text", model=folder, **trusted)
found["local"] = [local("image.png", text=text)[0]["generated_text"] for text in ("", "Chest")]
models = [names["write"].model, names["captioner"], names["model"], captioner, local.model]
models += [AutoModel.from_pretrained(folder, **trusted)]
found["classes"] = [[type(model).__name__, type(model).__module__.partition(".")[0]] for model in models]
tokens = captioner.generate(names["inputs"]["pixel_values"], num_beams=3)
outputs = names["outputs"]
save_file({"tokens": tokens, "image": outputs.image_embeds, "text": outputs.text_embeds}, f"{out}/found.safetensors")
json.dump(found, open(f"{out}/found.json", "w"))
names["captioner"].save_pretrained(f"{out}/again")
names["processor"].save_pretrained(f"{out}/again")
"""


@pytest.fixture
def captioner(tiny_processor) -> GapClosedClipForConditionalGeneration:
    torch.manual_seed(0)
    clip_model = GapClosedClipModel(tiny_config())
    model = GapClosedClipForConditionalGeneration.from_clip(clip_model, tiny_processor.tokenizer)
    with torch.no_grad():  # weights as they are drawn say the same of every image
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(captioner, tiny_processor, tmp_path):
    return save_folder(tmp_path / "outputs" / "captioner", captioner, tiny_processor)


@NOT_BEFORE_5_23
def test_a_published_captioner_works_where_the_package_is_not(
    online, python, folder, captioner, tiny_processor, tmp_path
):
    image = noise_image(80)
    image.save(tmp_path / "image.png")
    publish(folder, "tester/captioner")
    files = {".gitattributes", *SAVED, "generation_config.json", *CODE, *CAPTIONER_CODE, *ADDED}
    assert set(online.files("tester/captioner")) == files

    words = ["-c", WITHOUT_PACKAGE + STRANGER, "tester/captioner", str(folder), str(tmp_path)]
    check_silence(python(*words, home="stranger").stderr)
    found, tensors = json.loads((tmp_path / "found.json").read_text()), load_file(tmp_path / "found.safetensors")
    caption_model, encoder = (
        [cls.__name__, "transformers_modules"] for cls in (GapClosedClipForConditionalGeneration, GapClosedClipModel)
    )
    assert found["classes"] == [caption_model, caption_model, encoder, caption_model, caption_model, encoder]
    pixel_values = tiny_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(tensors["tokens"], captioner.generate(pixel_values, num_beams=3))
    check_captions(found, captioner, tiny_processor, image)
    check_encoder(found, tensors, captioner.gap_closed_clip, tiny_processor, image)

    # What was loaded from there and saved again is a captioner's folder again.
    check_code(tmp_path / "again")
    saved = {path.name for path in (tmp_path / "again").iterdir()}
    assert saved == {*SAVED, "generation_config.json", *CODE, *CAPTIONER_CODE}
    mine, again = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert mine["auto_map"] == again["auto_map"] and "AutoModelForImageTextToText" in mine["auto_map"]


def check_silence(text: str) -> None:
    """Nothing is said but how far loading is, and that code was fetched, which was asked for."""
    fetched = r".*new version of the following|- \w+\.py|\. Make sure"
    told = rf"\s*$|Loading weights|Writing model shards|[\w.]+:? +[\d(]+%|{fetched}"
    assert [line for line in text.replace("\r", "\n").splitlines() if not re.match(told, line)] == []


def check_captions(found: dict, captioner: GapClosedClipForConditionalGeneration, processor, image) -> None:
    """Those of the card's pipeline and of a pipeline of the folder, against the model by hand."""
    inputs = processor(images=[image], text=["Chest"], return_tensors="pt")

    def decode(tokens) -> str:
        return processor.tokenizer.decode(tokens[0], skip_special_tokens=True)

    pixel_values = inputs["pixel_values"]
    assert found["caption"] == found["local"][0] == decode(captioner.generate(pixel_values))
    assert found["by_hand"] == [decode(captioner.generate(pixel_values, max_new_tokens=20))]
    (caption,) = {entry["generated_text"] for entry in found["captions"]}
    assert len(found["captions"]) == 2
    assert caption.lower() == decode(captioner.generate(**inputs, max_new_tokens=20, num_beams=3))


def check_encoder(found: dict, tensors: dict, encoder: GapClosedClipModel, processor, image) -> None:
    """The encoder and its pipelines on the card, against the model by hand."""
    texts = ["Chest radiograph with pleural effusion.", "Axial MR image of the brain."]
    with torch.no_grad():
        outputs = encoder(**processor(images=[image], text=texts, return_tensors="pt", padding=True))
    # Weights that lie elsewhere in memory are multiplied by other instructions.
    torch.testing.assert_close(tensors["image"], outputs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(tensors["text"], outputs.text_embeds, atol=1e-6, rtol=0)
    assert found["image_vector"] == pytest.approx(outputs.image_embeds[0].tolist(), abs=1e-5)
    assert found["text_vector"] == pytest.approx(outputs.text_embeds[1].tolist(), abs=1e-5)
    assert len(found["scores"]) == 2 and sorted(found["hits"]) == [0, 1]


def test_another_caption_in_the_clean_process_is_noticed(folder, monkeypatch):
    """That the process gives the caption at all is shown above, where it has to be this package's."""
    found, _ = reload._outputs(folder)
    tokens = found.pop("caption_ids")
    message = "caption_ids of a clean process differ from this package's, so it is not published"
    for other in (found, found | {"caption_ids": tokens + 1}):
        monkeypatch.setattr(reload, "_run_clean_process", lambda *args, other=other: other)
        with pytest.raises(ValueError, match=message):
            check_reload(folder)
    monkeypatch.setattr(reload, "_run_clean_process", lambda *args: found | {"caption_ids": tokens})
    check_reload(folder)


def test_captions_of_other_peoples_images_stay_at_home(online, folder, skip_reload):
    for name in ("captions.png", "captions.jsonl"):
        (folder / name).write_bytes(b"of the evaluation")
    for source, goes in (("phantoms", True), ("/data/patients", False)):
        write_metrics(folder / "metrics.json", {"captioner": METRICS}, {"source": source}, "test")
        done = publish(folder, "tester/captioner", license="mit")
        files = online.files("tester/captioner")
        assert {"captions.png", "captions.jsonl"} <= set(files) if goes else not any("captions." in f for f in files)
        assert (b"](captions.png)" in files["README.md"]) is goes and b"12.3%" in files["README.md"]
        assert [remark[:12] for remark in done.remarks] == ([] if goes else ["captions.png", "The card of "])


def render(folder, *overrides: str, **facts) -> str:
    words = ["model.checkpoint=outputs/demo", *overrides]
    load_config([], words).save(folder / "train_config.yaml")
    (folder / "run.json").write_text(json.dumps(facts))
    write_card(folder, repo_id="tester/captioner")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text
    return text


def test_the_card_of_a_captioner(folder):
    write_metrics(folder / "metrics.json", {"captioner": METRICS}, {"source": "phantoms"}, "test")
    text = render(folder, "captioning.train_on=image")
    data = ModelCard.load(folder / "README.md").data
    assert data.pipeline_tag == "image-text-to-text"
    assert {"zero-shot-image-classification", "image-text-retrieval", "feature-extraction"} <= set(data.tags)
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: METRICS[name] for name in ("coco_bleu_4", "rouge_l", "cider_d", "clip_score")
    }
    assert all(result.task_type == "image-text-to-text" for result in data.eval_results)
    evaluation = section(text, "Evaluation")
    assert "On 40 images of" in evaluation and "12.3%" in evaluation and "0.876" in evaluation
    assert "modality gap" not in evaluation and "meteor" not in evaluation.lower()
    assert "trained on images" in section(text, "Captions") and "kept as they were" in section(text, "Captions")
    assert "no report and no diagnosis" in section(text, "Intended use")
    assert "not in the image" in section(text, "Limits and biases")


def test_the_card_says_what_the_decoder_was_trained_on(folder, captioner):
    told = section(render(folder, "captioning.train_on=image", "captioning.encoders=joint"), "Captions")
    assert "trained on images" in told and "trained together" in told and "image's patches" in told
    config = captioner.config
    config.decoder_memory, config.embedding_noise = "embedding", 1.5
    config.save_pretrained(folder)
    text = render(folder, "captioning.train_on=text", "captioning.mean_shift=true")
    told = section(text, "Captions")
    assert "**on text alone**" in told and "It has seen no image" in told and "patches" not in told
    assert "length 1.5" in told and "minus mean image embedding" in told
    assert "shared_embeds" in text  # what only such a decoder can do


def test_the_card_of_an_encoder_has_nothing_of_captions(tiny_model, tiny_processor, tmp_path):
    folder = save_folder(tmp_path / "demo", tiny_model, tiny_processor)
    write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n## Captions" not in text and "ImageTextToText" not in text and "image-text-to-text" not in text


@NOT_BEFORE_5_23
def test_the_pipeline_of_the_card_with_the_package(folder, captioner, tiny_processor, capfd, recwarn):
    write = pipeline("image-text-to-text", model=str(folder))
    assert type(write.model) is GapClosedClipForConditionalGeneration
    images = [noise_image(spread) for spread in (20, 80, 140)]
    decode = tiny_processor.tokenizer.decode
    for text, options in (("", {}), ("Chest", {"max_new_tokens": 6}), ("Chest CT of", {"num_beams": 3})):
        several = write(images, text=text, generate_kwargs=dict(options))
        texts = [f"{text}{'' if number else ' '}" for number in range(3)]  # of different strings, padded together
        mixed = write(images, text=texts, generate_kwargs=dict(options), batch_size=2)
        streamed = write(({"images": image, "text": text} for image in images), generate_kwargs=dict(options))
        alone = [write(image, text=text, generate_kwargs=dict(options))[0] for image in images]
        assert several == alone == [entry for (entry,) in streamed]
        assert [entry["generated_text"].replace(" ", "") for entry in mixed] == [
            entry["generated_text"].replace(" ", "") for entry in alone
        ]
        new = write(images, text=text, generate_kwargs=dict(options), return_full_text=False)
        for image, whole, rest in zip(images, several, new, strict=True):
            prompt = {"text": [text]} if text else {}
            (tokens,) = captioner.generate(**tiny_processor(images=[image], **prompt, return_tensors="pt"), **options)
            assert whole["generated_text"].lower() == decode(tokens, skip_special_tokens=True)
            assert whole["generated_text"] == text + rest["generated_text"]
        assert len({entry["generated_text"] for entry in several}) > 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert lines == [] and recwarn.list == []


def test_another_number_of_prompts_than_of_images(folder):
    write = pipeline("image-text-to-text", model=str(folder))
    image = Image.new("RGB", (40, 36))
    with pytest.raises(ValueError, match="2 prompts and 3 images: give one for each image, or one for all"):
        write([image] * 3, text=["Chest", "Brain"])


def test_the_encoder_of_a_captioner_is_saved_as_an_encoder(folder, captioner, tiny_processor, tmp_path):
    encoder = GapClosedClipModel.from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "encoder")
    captioner.gap_closed_clip.save_pretrained(tmp_path / "part")
    for place in (tmp_path / "encoder", tmp_path / "part"):
        tiny_processor.save_pretrained(place)
        assert not is_captioner(place) and not set(CAPTIONER_CODE) & {path.name for path in place.iterdir()}
    tiny_processor.save_pretrained(tmp_path / "captioner")
    captioner.save_pretrained(tmp_path / "captioner")  # what was saved is still part of one
    assert is_captioner(tmp_path / "captioner") and captioner.gap_closed_clip.config is captioner.config
    again = GapClosedClipForConditionalGeneration.from_pretrained(tmp_path / "captioner").eval()
    pixel_values = torch.ones(1, 3, 28, 28)
    assert torch.equal(again.generate(pixel_values), captioner.generate(pixel_values))


def test_onnx_is_of_the_encoder_and_says_so(folder, command, monkeypatch):
    exported = []
    export = "gap_closed_clip.commands.export_onnx.export_onnx"
    monkeypatch.setattr(export, lambda model, *args, **kwargs: exported.append(model) or [])
    code, out, _ = command("export-onnx", str(folder))
    assert code == 0 and [type(model) for model in exported] == [GapClosedClipModel]
    assert "The decoder is not exported" in out


def test_what_the_pipeline_makes_of_images(folder, tmp_path):
    """As the card says: upright, as the endpoint and retrieval do it; 16-bit gray clipped, which they do not do."""
    write = pipeline("image-text-to-text", model=str(folder), max_new_tokens=8)
    image = noise_image(80)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    image.save(tmp_path / "upright.png")
    pixels = [write.preprocess({"images": str(tmp_path / name), "text": ""})["pixel_values"] for name in
              ("side.png", "upright.png")]  # fmt: skip
    assert torch.equal(*pixels)
    deep = Image.linear_gradient("L").convert("I").point(lambda value: value * 100)
    deep.convert("I;16").save(tmp_path / "deep.png")
    pixels = write.preprocess({"images": str(tmp_path / "deep.png"), "text": ""})["pixel_values"]
    assert (pixels == pixels.amax(dim=(2, 3), keepdim=True)).float().mean() > 0.9
