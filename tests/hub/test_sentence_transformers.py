"""A model folder in sentence-transformers: its embeddings, what is refused, and the library's own evaluator."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import captioner_of, dicom_file, noise_image
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from gap_closed_clip.checkpoint import check_checkpoint
from gap_closed_clip.data import DataArguments, decode_image, load_pairs, normalize_caption
from gap_closed_clip.evaluation import embed_pairs, load_metric
from gap_closed_clip.hub import publish
from gap_closed_clip.hub.reload import check_code
from gap_closed_clip.model.configuration_gap_closed_clip import EMBEDDER
from gap_closed_clip.model.images_gap_closed_clip import to_rgb

from .conftest import WITHOUT_PACKAGE, save_folder
from .modality_models import RECORDS, WEIGHTS, model_of_four, processor_of_four, spectrogram
from .modality_models import embeds_of as embeds_of_four


sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
TEXTS = ["Chest radiograph.", "Axial MR image of the brain with a lesion in the left temporal lobe.", "Normal. " * 100]
# From the Hub, where the package is not installed: lists of one kind, of both, and items of both; one item by itself.
STRANGER = """
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

name, out, *texts = sys.argv[1:]
try:
    SentenceTransformer(name, device="cpu")
    raise SystemExit("code ran unasked")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
model = SentenceTransformer(name, trust_remote_code=True, device="cpu")
paths = ["0.png", "1.png", "gray16.png"]
both = {"image": "0.png", "text": texts[1]}
lists = {
    "images": [Image.open(path) for path in paths],
    "paths": paths,
    "Paths": [Path(path) for path in paths],
    "texts": texts,
    "mixed": [texts[0], Path("1.png"), both, "gray16.png", texts[2], {"text": "0.png"}],
}
found = {kind: model.encode(items, batch_size=2, convert_to_tensor=True) for kind, items in lists.items()}
found["one"] = torch.stack([model.encode(item, convert_to_tensor=True) for item in (texts[0], "1.png", both)])
found["prompt"] = model.encode([*paths, "brain."], prompt="Axial MR image of the ", convert_to_tensor=True)
model.save_pretrained(f"{out}/again")
again = SentenceTransformer(f"{out}/again", trust_remote_code=True, device="cpu")
found["again"] = again.encode(lists["mixed"], convert_to_tensor=True)
save_file(found, f"{out}/found.safetensors")
"""


@pytest.fixture
def images(tmp_path) -> list[Image.Image]:
    """Two images in colour and one of 16 bits, also as files."""
    gray = noise_image(90, (50, 44)).convert("L")
    images = [noise_image(80), Image.merge("RGB", [gray, gray.rotate(90), gray])]
    images.append(Image.fromarray((np.asarray(gray).astype(np.uint16)) * 9))
    for name, image in zip(("0", "1", "gray16"), images, strict=True):
        image.save(tmp_path / f"{name}.png")
    return images


@torch.inference_mode()
def embeds_of(model, processor, images: list, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """This package's own embeddings of images and of texts."""
    images = [to_rgb(image) for image in images]
    outputs = model(**processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True))
    return outputs.image_embeds, outputs.text_embeds


def test_embeddings_are_those_of_the_model(online, python, model_folder, tiny_model, tiny_processor, images, tmp_path):
    publish(model_folder, "tester/demo")
    assert "modules.json" in online.files("tester/demo")
    python("-c", WITHOUT_PACKAGE + STRANGER, "tester/demo", str(tmp_path), *TEXTS)
    found = load_file(tmp_path / "found.safetensors")
    image, text = embeds_of(tiny_model, tiny_processor, images, TEXTS)
    name, brain = embeds_of(tiny_model, tiny_processor, images, ["0.png", "Axial MR image of the brain."])[1]
    both = normalize(image[0] + text[1], dim=0)
    expected = {"images": image, "paths": image, "Paths": image, "texts": text}
    expected["mixed"] = expected["again"] = torch.stack([text[0], image[1], both, image[2], text[2], name])
    expected["one"] = torch.stack([text[0], image[1], both])
    expected["prompt"] = torch.cat([image, brain[None]])
    assert set(found) == set(expected)
    for kind in found:
        torch.testing.assert_close(found[kind], expected[kind], atol=1e-6, rtol=0, msg=lambda text, k=kind: k + text)
    # Saved by the library, it is a model folder as before.
    check_code(tmp_path / "again")
    check_checkpoint(tmp_path / "again")


def test_a_captioner_encodes_as_the_encoder_in_it(tiny_processor, images, tmp_path):
    captioner = captioner_of(tiny_processor.tokenizer)
    folder = save_folder(tmp_path / "captioner", captioner, tiny_processor)
    model = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    image, text = embeds_of(captioner.gap_closed_clip, tiny_processor, images, TEXTS)
    found = model.encode([*images, *TEXTS], convert_to_tensor=True)
    torch.testing.assert_close(found, torch.cat([image, text]), atol=1e-6, rtol=0)


def test_a_tokenizer_without_a_limit_gets_the_text_towers(model_folder, tiny_model, tiny_processor, images):
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("model_max_length") == tiny_model.max_text_length
    path.write_text(json.dumps(settings))
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    _, text = embeds_of(tiny_model, tiny_processor, images, TEXTS)
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), text, atol=1e-6, rtol=0)


def test_training_reaches_both_towers(model_folder, images):
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu").train()
    features = model.preprocess([images[0], TEXTS[0], {"image": images[1], "text": TEXTS[1]}])
    model(features)["sentence_embedding"][:, 0].sum().backward()
    gradients = {name.split(".")[2]: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradients[part].abs().sum() > 0 for part in ("visual_projection", "text_projection"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3.5, r"inputs\[1\]: 3.5 is neither image nor text: give a str"),
        (("a", "b"), r"inputs\[1\]: \('a', 'b'\) is neither image nor text"),
        ({}, r"inputs\[1\]: {} is neither image nor text"),
        ({"image": 3.5, "text": "a"}, r"inputs\[1\]: {'image': 3.5} is neither"),
        ([{"role": "user", "content": "a"}], r"inputs\[1\]: \[{'role': .* is neither image nor text"),
        ({"role": "user", "content": "a"}, r"inputs\[1\] has the entries role, content: an item has image, text, or"),
        (Path("missing.png"), r"There is no file missing.png \(inputs\[1\]\)"),
        (Path("damaged.png"), r"inputs\[1\], damaged.png, can't be read as an image"),
    ],
)
def test_what_is_neither_image_nor_text(model_folder, tmp_path, monkeypatch, item, message):
    monkeypatch.chdir(tmp_path)
    Path("damaged.png").write_bytes(b"no image")
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match=message):
        model.encode(["a text", item])


def test_a_path_of_a_dicom_file_is_an_image(model_folder, tmp_path):
    content = dicom_file(np.arange(40 * 36, dtype=np.uint16).reshape(40, 36))
    for name in ("scan.dcm", "IM0001"):
        (tmp_path / name).write_bytes(content)
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    expected = model.encode(tmp_path / "scan.dcm")  # a Path is always an image
    for name in ("scan.dcm", "IM0001"):
        np.testing.assert_array_equal(model.encode(str(tmp_path / name)), expected)
    with pytest.raises(FileNotFoundError, match="There is no file .*lost.dcm"):
        model.encode(str(tmp_path / "lost.dcm"))
    text = "see scan.dcm"
    np.testing.assert_array_equal(model.encode(text), model.encode({"text": text}))


@pytest.mark.parametrize(("name", "format"), [("a.tif", "TIFF"), ("a.PGM", "PPM"), ("a.jfif", "JPEG"), ("a", "PNG")])
def test_a_path_of_an_image_is_one_whatever_its_ending(model_folder, tmp_path, name, format):
    Image.linear_gradient("L").save(tmp_path / name, format=format)
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    expected = model.encode({"image": str(tmp_path / name)})
    np.testing.assert_array_equal(model.encode(str(tmp_path / name)), expected)


def test_a_path_of_no_image(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("Chest radiograph.")
    model = sentence_transformers.SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    for name in ("lost.png", "lost.tif", "LOST.JPG"):
        with pytest.raises(FileNotFoundError, match=f"There is no file {name}"):
            model.encode(["a text", name])
    for text in ("notes", "see lost.png"):
        np.testing.assert_array_equal(model.encode(text), model.encode({"text": text}))


# What a folder holds and what publishing makes of it.


def test_saving_and_pushing_write_it_for_models_and_not_for_adapters(online, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="tester/pushed")
    (module,) = json.loads(online.files("tester/pushed")["modules.json"])
    name, _, class_name = module["type"].partition(".")
    assert f"class {class_name}(" in online.files("tester/pushed")[f"{name}.py"].decode()
    tiny_model.config.save_pretrained(tmp_path / "config")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "model" / "modules.json").is_file() and not (tmp_path / "adapter" / "modules.json").exists()


def test_a_folder_without_it_is_published_as_it_is(online, model_folder):
    (model_folder / "modules.json").unlink()
    publish(model_folder, "tester/demo")
    card = online.files("tester/demo")["README.md"].decode()
    assert "modules.json" not in online.files("tester/demo") and "sentence" not in card


@pytest.mark.parametrize("name", ["evil.Module", f"other/repo--{EMBEDDER}"])
def test_modules_of_others_are_not_run(model_folder, name):
    modules = json.loads((model_folder / "modules.json").read_text())
    own = {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.base.modules.Normalize"}
    (model_folder / "modules.json").write_text(json.dumps([*modules, own]))
    check_code(model_folder)
    (model_folder / "modules.json").write_text(json.dumps([*modules, {**own, "type": name}]))
    with pytest.raises(ValueError, match="modules.json names code that is not this package's: "):
        check_code(model_folder)


def test_other_embeddings_are_not_published(online, model_folder):
    path = model_folder / "sentence_transformers_gap_closed_clip.py"
    code = path.read_text()
    path.write_text(code.replace("found = together(", "found = -together("))
    assert path.read_text() != code
    with pytest.raises(ValueError, match="encoded of a clean process differ from this package's by"):
        publish(model_folder, "tester/demo", trust_remote_code=True)
    assert not online.repositories


# The library's evaluator.


def recall_of_the_library(model, pairs) -> dict[str, float]:
    """accuracy@k of sentence-transformers, whose queries count as found with any of their relevant items, as ours."""
    images, captions, of_image, of_caption = {}, {}, {}, {}  # the distinct ones, and what belongs to each
    for row in pairs:
        image, caption = row["image_id"], normalize_caption(row["caption"])
        images.setdefault(image, row["image"])
        captions.setdefault(caption, row["caption"])
        of_image.setdefault(image, set()).add(caption)
        of_caption.setdefault(caption, set()).add(image)
    images = {name: decode_image(image) for name, image in images.items()}
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    directions = {"text_to_image": (captions, images, of_caption), "image_to_text": (images, captions, of_image)}
    found = {}
    for name, sides in directions.items():
        scores = model.evaluate(
            InformationRetrievalEvaluator(*sides, name=name, accuracy_at_k=[1, 5, 10], write_csv=False)
        )
        found |= {f"{name}_recall@{k}": scores[f"{name}_cosine_accuracy@{k}"] for k in (1, 5, 10)}
    return found


def check_recall(folder: Path, model, processor, pairs) -> dict[str, float]:
    found = recall_of_the_library(
        sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"), pairs
    )
    embeds = embed_pairs(model, processor, pairs)
    ours = load_metric("cross_modal_retrieval").compute(
        image_embeds=embeds.image_embeds,
        text_embeds=embeds.text_embeds,
        image_ids=embeds.image_ids,
        caption_ids=embeds.caption_ids,
    )
    assert found == pytest.approx({name: ours[name] for name in found})
    return found


def spread(model, processor, pairs) -> None:
    """Makes a random model's cosines differ by more than rounding: new projections, of what its towers tell apart."""
    model.eval()
    with torch.no_grad():
        for projection in (model.visual_projection, model.text_projection):
            projection.weight.normal_(std=1.0)
    embeds = embed_pairs(model, processor, pairs)
    assert np.linalg.matrix_rank(embeds.image_embeds) > 8


def test_its_evaluator_gives_our_recall(tiny_model, tiny_processor, tmp_path):
    pairs = load_pairs(DataArguments(phantom_test_pairs=48, phantom_size=48), "test")
    repeated = pairs.select([*range(48), *range(20)]).map(  # images with two captions, and captions of two images
        lambda row, index: row if index < 48 else {**row, "caption": pairs[index - 28]["caption"].upper()},
        with_indices=True,
    )
    spread(tiny_model, tiny_processor, repeated)
    folder = save_folder(tmp_path / "model", tiny_model, tiny_processor)
    found = check_recall(folder, tiny_model, tiny_processor, repeated)
    assert 0 < found["text_to_image_recall@10"] < 1


@pytest.mark.skipif("RADIOLOGY_DATA" not in os.environ, reason="RADIOLOGY_DATA names no folder of radiology pairs")
def test_its_evaluator_gives_our_recall_on_real_pairs(tiny_model, tiny_processor, tmp_path):
    source = Path(os.environ["RADIOLOGY_DATA"], "vqamed2019")
    if not source.is_dir():
        pytest.skip(f"there is no {source}")
    pairs = load_pairs(DataArguments(source=str(source)), "validation")
    spread(tiny_model, tiny_processor, pairs)
    folder = save_folder(tmp_path / "model", tiny_model, tiny_processor)
    check_recall(folder, tiny_model, tiny_processor, pairs)


# Further modalities.


def test_records_and_items_with_them(tiny_processor, images, tmp_path):
    processor, model = processor_of_four(tiny_processor), model_of_four(fusion_weights=WEIGHTS)
    folder = save_folder(tmp_path / "four", model, processor)
    encoder = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    rgb = [to_rgb(image) for image in images]
    sounds = [spectrogram(0)]
    single = embeds_of_four(model, processor, image=rgb, text=TEXTS[:1], record=RECORDS, audio=sounds)
    items = [{"record": RECORDS[1]}, images[0], {"image": images[1], "record": RECORDS[0]}, {"audio": sounds[0]}]
    both = WEIGHTS["image"] * single["image"][1] + WEIGHTS["record"] * single["record"][0]
    expected = [single["record"][1], single["image"][0], normalize(both, dim=0), single["audio"][0], single["text"][0]]
    found = encoder.encode([*items, TEXTS[0]], batch_size=3, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    alone = encoder.encode({"record": RECORDS[0]}, convert_to_tensor=True)
    torch.testing.assert_close(alone, single["record"][0], atol=1e-5, rtol=0)
    # As after a training whose data had no sounds: what an item is does not hang on those that it is encoded with.
    encoder[0].model.config.fusion_weights = {name: WEIGHTS[name] for name in ("image", "text", "record")}
    found = encoder.encode([*items, TEXTS[0]], batch_size=5, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    for item, message in (
        ({"record": {"age": "old"}}, r"inputs\[0\], record: field 'age': 'old' is no number"),
        ({"record": RECORDS[0], "video": 3}, "has the entries record, video: an item has image, text, record, audio"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode([item])


def test_an_item_is_the_same_in_every_list(tiny_processor, images, tmp_path):
    """Also where a modality of another item has no weight."""
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "audio"}
    model = model_of_four(fusion_weights=weights)
    folder = save_folder(tmp_path / "four", model, processor_of_four(tiny_processor))
    encoder = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    item = {"image": images[0], "record": RECORDS[0]}
    alone = encoder.encode([item])[0]
    assert encoder.encode([item, {"audio": spectrogram(0)}])[0] == pytest.approx(alone, abs=1e-6)
