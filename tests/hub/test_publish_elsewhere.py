"""A published model where this package is not installed, and that no code of a repository runs where it is."""

import functools
import json
import sys

import pytest
import torch
from conftest import noise_image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    dynamic_module_utils,
    pipeline,
)

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor, ImageTextRetrievalPipeline
from gap_closed_clip.hub import publication, publish
from gap_closed_clip.hub.reload import check_code

from .conftest import CODE, SAVED, WITHOUT_PACKAGE


# What the card says, word for word, where this package is not installed; and that nothing of it runs without consent.
STRANGER = """
import json, os, pathlib, re
from importlib.util import find_spec
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

repo_id, out, revision = sys.argv[1:]
modules = pathlib.Path(os.environ["HF_HOME"], "modules")
refusals = []
for auto in (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor):
    try:
        auto.from_pretrained(repo_id)
    except ValueError as error:
        refusals.append("trust_remote_code=True" in str(error))
assert refusals == [True] * 4, refusals
assert not list(modules.glob("**/*gap_closed_clip.py")), "code was fetched unasked"

card = pathlib.Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
names = {}
for block in re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL):
    if "sentence_transformers" not in block or find_spec("sentence_transformers"):
        exec(block, names)
found = {name: names[name] for name in ("scores", "image_vector", "text_vector", "template")}
found["hits"] = [[hit["index"], hit["score"]] for hit in names["hits"]]
found["class"] = type(names["model"]).__module__
found["encoded"] = names["vectors"].tolist() if "vectors" in names else None
json.dump(found, open(f"{out}/found.json", "w"))

old = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True).eval()
outputs = names["outputs"]
pinned = old(**names["inputs"]).image_embeds.detach()
save_file({"image": outputs.image_embeds, "text": outputs.text_embeds, "pinned": pinned}, f"{out}/embeds.safetensors")
names["model"].save_pretrained(f"{out}/again")
names["processor"].save_pretrained(f"{out}/again")
"""


def embed(model, processor, image) -> tuple[torch.Tensor, torch.Tensor]:
    texts = ["Chest radiograph with pleural effusion.", "Axial MR image of the brain."]  # those of the card
    with torch.inference_mode():
        outputs = model(**processor(images=[image], text=texts, return_tensors="pt", padding=True, truncation=True))
    return outputs.image_embeds, outputs.text_embeds


def test_a_published_model_works_where_the_package_is_not(
    online, python, new_clean_processes, model_folder, tiny_model, tiny_processor, tmp_path, monkeypatch
):
    image = noise_image(80)
    image.save(tmp_path / "image.png")
    publish(model_folder, "tester/demo")
    first = online.repositories["tester/demo"].commits[-1].oid
    expected_of_first, _ = embed(tiny_model, tiny_processor, image)
    with torch.no_grad():
        tiny_model.visual_projection.weight.mul_(-1.5).add_(0.01)
    tiny_model.save_pretrained(model_folder)
    monkeypatch.setattr(publication, "check_reload", lambda *args: None)  # what follows shows as much
    publish(model_folder, "tester/demo")

    python("-c", WITHOUT_PACKAGE + STRANGER, "tester/demo", str(tmp_path), first, home="stranger")
    found, embeds = json.loads((tmp_path / "found.json").read_text()), load_file(tmp_path / "embeds.safetensors")
    image_embeds, text_embeds = embed(tiny_model, tiny_processor, image)
    assert found["class"].startswith("transformers_modules.")
    assert torch.equal(embeds["image"], image_embeds) and torch.equal(embeds["text"], text_embeds)
    check_encoded(found["encoded"], tiny_model, tiny_processor, image)
    assert torch.equal(embeds["pinned"], expected_of_first) and not torch.equal(expected_of_first, image_embeds)
    check_pipelines(found, tiny_model, tiny_processor, image)

    # What was loaded from there and saved again has its code again, and is published just so.
    again = tmp_path / "again"
    check_code(again)
    assert {path.name for path in again.iterdir()} == {*SAVED, *CODE}


def check_encoded(found: list[list[float]] | None, model, processor, image) -> None:
    """What sentence-transformers gave for the image, the text and both of the card; None where it is not installed."""
    if found is None:
        return
    with torch.inference_mode():
        inputs = processor(images=[image], text=["Pleural effusion."], return_tensors="pt", padding=True)
        outputs = model(**inputs)
    both = torch.nn.functional.normalize(outputs.image_embeds + outputs.text_embeds)
    expected = torch.cat([outputs.image_embeds, outputs.text_embeds, both])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=0)


def check_pipelines(found: dict, model: GapClosedClipModel, processor: GapClosedClipProcessor, image) -> None:
    """What the pipelines of the card gave, against the model by hand."""
    close = functools.partial(pytest.approx, abs=1e-5)
    labels = ["chest radiograph", "brain MR"]
    prompts = [f"Medical image of {label}." for label in labels]
    image_embeds, text_embeds = embed(model, processor, image)
    with torch.inference_mode():
        inputs = processor(images=[image], text=prompts, return_tensors="pt", padding=True)
        probabilities = model(**inputs).logits_per_image.softmax(-1)[0].tolist()
        gallery = model(**processor(text=["Normal chest radiograph."], return_tensors="pt")).text_embeds
    assert found["template"] == "Medical image of {}."
    scores = {score["label"]: score["score"] for score in found["scores"]}
    assert scores == close(dict(zip(labels, probabilities, strict=True)))
    assert found["image_vector"] == close(image_embeds[0].tolist())
    assert found["text_vector"] == close(text_embeds[1].tolist())
    cosines = [(text_embeds[0] @ entry).item() for entry in (image_embeds[0], gallery[0])]
    ranked = sorted(enumerate(cosines), key=lambda hit: -hit[1])
    assert found["hits"] == [[index, close(cosine)] for index, cosine in ranked]


# What the pipeline of the repository is made of.
PIPELINE = {
    "configuration_checks_gap_closed_clip.py",
    "dicom_gap_closed_clip.py",
    "fetch_gap_closed_clip.py",
    "fusion_gap_closed_clip.py",
    "image_processing_gap_closed_clip.py",
    "images_gap_closed_clip.py",
    "items_gap_closed_clip.py",
    "load_images_gap_closed_clip.py",
    "modalities_gap_closed_clip.py",
    "modality_processing_gap_closed_clip.py",
    "pipeline_gap_closed_clip.py",
    "record_fields_gap_closed_clip.py",
    "record_processing_gap_closed_clip.py",
    "record_schema_gap_closed_clip.py",
    "record_tower_gap_closed_clip.py",
    "record_values_gap_closed_clip.py",
}
AUTO_CLASSES = (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor)
TASKS = ("zero-shot-image-classification", "image-feature-extraction", "feature-extraction")


def module_of(loaded) -> str:
    return type(loaded).__module__


def test_with_the_package_no_code_of_the_repository_runs(online, model_folder, skip_reload, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # what other tests have loaded, from another folder
    publish(model_folder, "tester/demo")
    repository, published = online.repositories["tester/demo"], dict(online.files("tester/demo"))
    poison = dict.fromkeys(CODE, b"raise SystemExit('code of the repository was run')\n")
    poisoned = {"revision": repository.commit("poison", published | poison).oid}
    found = [auto.from_pretrained("tester/demo", **poisoned) for auto in AUTO_CLASSES]
    found += [pipeline(task, model="tester/demo", **poisoned).model for task in TASKS]
    pipeline_class = {"pipeline_class": ImageTextRetrievalPipeline}
    search = pipeline("image-text-retrieval", model="tester/demo", **poisoned, **pipeline_class)
    assert all(module_of(each).startswith("gap_closed_clip.") for each in (*found, search, search.model))

    # Where the task is left out, the pipeline is the repository's: it runs, and nothing else does.
    for name in PIPELINE:
        del poison[name]
    but_in_the_pipeline = repository.commit("poison but in the pipeline", published | poison).oid
    search = pipeline(model="tester/demo", revision=but_in_the_pipeline, trust_remote_code=True)
    assert module_of(search).startswith("transformers_modules.")
    assert type(search).__name__ == "ImageTextRetrievalPipeline" and type(search.model) is GapClosedClipModel
