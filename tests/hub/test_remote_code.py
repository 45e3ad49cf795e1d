"""A saved folder works where the package is not installed, and only with the user's trust_remote_code."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from safetensors.torch import load_file, save_file

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.hub.reload import HANDLER

from .conftest import WITHOUT_PACKAGE, load_handler
from .handler.examples import IMAGE, IMAGES, TEXTS, classified, near, save, search


REQUESTS = [
    classified(IMAGE),
    {"inputs": {"images": [IMAGE], "texts": TEXTS}},
    search(TEXTS[0], [TEXTS[1], {"image": IMAGE}]),
    classified("/etc/passwd"),
]
# All in one process, which takes seconds to start.
ELSEWHERE = """
import json
from PIL import Image
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

folder, out = sys.argv[1:]
found = {}
for auto in (AutoConfig, AutoModel, AutoProcessor):
    try:
        auto.from_pretrained(folder)
        found[f"{auto.__name__} untrusted"] = "loaded"
    except ValueError as error:
        found[f"{auto.__name__} untrusted"] = str(error)
trusted = {"trust_remote_code": True}
# The last one loaded is what saving would name if nothing else did.
models = [auto.from_pretrained(folder, **trusted) for auto in (AutoModel, AutoModelForZeroShotImageClassification)]
inputs = load_file(f"{out}/inputs.safetensors")
with torch.no_grad():
    outputs = [model.eval()(**inputs) for model in models]
save_file({f"image {i}": o.image_embeds for i, o in enumerate(outputs)}, f"{out}/embeds.safetensors")
models[0].save_pretrained(f"{out}/again")
AutoProcessor.from_pretrained(folder, **trusted).save_pretrained(f"{out}/again")
image, texts = Image.open(f"{out}/image.png"), json.load(open(f"{out}/texts.json"))
zero_shot = pipeline("zero-shot-image-classification", model=folder, **trusted)
found["zero-shot"] = zero_shot(image, candidate_labels=texts, hypothesis_template="{}")
found["text features"] = len(pipeline("feature-extraction", model=folder, **trusted)(texts[0])[0])
found["image features"] = len(pipeline("image-feature-extraction", model=folder, **trusted)(image)[0])
search = pipeline(model=f"{out}/again", **trusted)
found["retrieval"] = [[hit["index"], hit["score"]] for hit in search(texts[0], gallery=[image, *texts])]
sys.path.insert(0, folder)  # as Inference Endpoints do
from handler import EndpointHandler

endpoint = EndpointHandler(folder)
found["answers"] = [endpoint(request) for request in json.load(open(f"{out}/requests.json"))]
json.dump(found, open(f"{out}/found.json", "w"))
"""


@pytest.fixture(params=[None, "procrustes"])
def tiny_model(request) -> GapClosedClipModel:
    """A model as it was trained, and one with a map behind its embeddings."""
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(embedding_map=request.param))
    for part in (model.visual_map, model.text_map):
        for buffer in part.buffers():
            buffer.normal_()
    return model


def test_a_folder_works_without_the_package(python, tiny_model, tiny_processor, pipe, tmp_path):
    folder, image = tmp_path / "model", IMAGES[0]
    save(folder, tiny_model.eval(), tiny_processor)
    save_file(tiny_inputs(3), tmp_path / "inputs.safetensors")
    image.save(tmp_path / "image.png")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    python("-c", WITHOUT_PACKAGE + ELSEWHERE, str(folder), str(tmp_path), HF_HUB_OFFLINE="1")
    found = json.loads((tmp_path / "found.json").read_text())
    for auto in ("AutoConfig", "AutoModel", "AutoProcessor"):
        assert "trust_remote_code=True" in found[f"{auto} untrusted"]
    with torch.no_grad():
        expected = tiny_model(**tiny_inputs(3)).image_embeds
        inputs = tiny_processor(images=[image], text=TEXTS, return_tensors="pt", padding=True)
        outputs = tiny_model(**inputs)
    for embeds in load_file(tmp_path / "embeds.safetensors").values():
        assert torch.equal(embeds, expected)
    scores = {hit["label"]: hit["score"] for hit in found["zero-shot"]}
    expected_scores = outputs.logits_per_image.softmax(-1)[0].tolist()
    assert [scores[text] for text in TEXTS] == pytest.approx(expected_scores, abs=1e-5)
    assert found["text features"] == found["image features"] == 32
    hits = pipe(TEXTS[0], [image, *TEXTS])
    assert found["retrieval"] == near([[hit["index"], hit["score"]] for hit in hits])
    endpoint = load_handler(folder)[0].EndpointHandler(str(folder))
    assert found["answers"] == near([endpoint(request) for request in REQUESTS])
    check_saved_again(folder, tmp_path / "again")


def check_saved_again(folder: Path, again: Path) -> None:
    """What was loaded from a folder and saved again is a folder like it, but for the endpoint's files."""
    assert (folder / "images_gap_closed_clip.py").is_file()  # the pipeline and the handler import it
    of_endpoint = {*HANDLER, "__pycache__"}  # its files, and what Python makes of them
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()} - of_endpoint
    auto_map = [json.loads((each / "config.json").read_text())["auto_map"] for each in (folder, again)]
    assert auto_map[0] == auto_map[1] and len(auto_map[0]) == 3


def test_saving_forgets_how_the_last_texts_were_cut(tiny_processor, tmp_path):
    tiny_processor(text=TEXTS, truncation=True, max_length=5, padding=True)
    tiny_processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
