"""Published adapters: on a base that is on the Hub, loaded by vanilla peft where this package is not installed."""

import json

import pytest
import torch
from conftest import noise_image
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.base_weights import note_base
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.hub import publication, publish, requirements
from gap_closed_clip.training import LoraArguments, build_peft_config, load_config

from .conftest import WITHOUT_PACKAGE
from .loopback_hub import Repository


STRANGER = """
import pathlib, re
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

repo_id, out = sys.argv[1:]
card = pathlib.Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
names = {}
for block in re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL):
    exec(block, names)
outputs = names["outputs"]
assert type(names["model"]).__module__.startswith("transformers_modules.")
save_file({"image": outputs.image_embeds, "text": outputs.text_embeds}, f"{out}/embeds.safetensors")
"""


@pytest.fixture
def adapter_folder(model_folder, tiny_processor):
    """An adapter on the model folder, as training leaves one; every number of it moved."""
    torch.manual_seed(0)
    model = GapClosedClipModel.from_pretrained(model_folder)
    model = get_peft_model(model, build_peft_config(LoraArguments(rank=2, layers="all"), model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    folder = model_folder.parent / "adapter"
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def base_on_the_hub(online, model_folder, monkeypatch) -> str:
    """The commit of the model folder as tester/base, published without what other tests check."""
    with monkeypatch.context() as patch:
        patch.setattr(publication, "check_reload", lambda *args: None)
        publish(model_folder, "tester/base")
    return online.repositories["tester/base"].commits[-1].oid


def test_an_adapter_works_where_the_package_is_not(
    online, python, model_folder, adapter_folder, base_on_the_hub, tmp_path
):
    image = noise_image(80)
    image.save(tmp_path / "image.png")
    publish(adapter_folder, "tester/adapter", base="tester/base")
    python("-c", WITHOUT_PACKAGE + STRANGER, "tester/adapter", str(tmp_path), home="stranger")
    model, processor = load_checkpoint(adapter_folder)
    texts = ["Chest radiograph with pleural effusion.", "Axial MR image of the brain."]
    inputs = processor(images=[image], text=texts, return_tensors="pt", padding=True, truncation=True)
    base = GapClosedClipModel.from_pretrained(model_folder).eval()
    with torch.inference_mode():
        expected, unadapted = model(**inputs), base(**inputs)
    embeds = load_file(tmp_path / "embeds.safetensors")
    assert torch.equal(embeds["image"], expected.image_embeds) and torch.equal(embeds["text"], expected.text_embeds)
    for name, untrained in (("image", unadapted.image_embeds), ("text", unadapted.text_embeds)):
        assert not torch.allclose(embeds[name], untrained, atol=1e-3)


def test_an_adapter_is_published_on_its_base(
    online, model_folder, adapter_folder, base_on_the_hub, skip_reload, tmp_path
):
    # Trained with another objective than its base.
    words = [f"model.checkpoint={model_folder}", "align_weight=0.25", "uniformity_weight=0"]
    load_config([], words).save(adapter_folder / "train_config.yaml")
    note_base(adapter_folder, model_folder)
    publish(adapter_folder, "tester/adapter", base="tester/base", license="mit")
    files = online.files("tester/adapter")
    assert "base_weights.json" not in files  # there a commit tells
    adapter = {"adapter_config.json", "adapter_model.safetensors", "processing_gap_closed_clip.py", "README.md"}
    assert adapter <= set(files)
    assert not {"config.json", "model.safetensors", "handler.py", "requirements.txt"} & set(files)
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tester/base", base_on_the_hub)
    assert b"checkpoint: tester/base" in files["train_config.yaml"]
    assert not any(str(tmp_path).encode() in content for content in files.values())
    at_home = json.loads((adapter_folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert at_home == str(model_folder)

    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["tester/base"] and card.data.base_model_relation == "adapter"
    assert "over true pairs | 0.25 |" in card.text and "of different pairs | 0 |" in card.text
    assert card.data.library_name == "peft" and card.data.pipeline_tag is None and card.data.license == "mit"
    assert all(f'"{requirement}"' in card.text for requirement in requirements.ADAPTER)
    assert "An adapter (LORA, rank 2) for `tester/base`." in card.text
    assert f'from_pretrained("tester/base", revision="{base_on_the_hub}", trust_remote_code=True)' in card.text


def test_an_adapter_of_a_folder_is_not_published_without_its_base(online, model_folder, adapter_folder):
    with pytest.raises(ValueError, match="is an adapter for") as raised:
        publish(adapter_folder, "tester/adapter")
    assert f"publish that first, gap-closed-clip publish {model_folder} owner/name" in str(raised.value)
    assert not online.repositories


def test_an_adapter_on_the_wrong_base_is_not_published(online, model_folder, adapter_folder, tiny_processor):
    """Its base in this folder is another than the one on the Hub."""
    model = GapClosedClipModel.from_pretrained(model_folder)
    model.text_model.embeddings.word_embeddings.weight.data.mul_(-1)
    other = model_folder.parent / "other"
    model.save_pretrained(other)
    tiny_processor.save_pretrained(other)
    online.repositories["tester/other"] = Repository(private=False)
    online.repositories["tester/other"].commit("other", {path.name: path.read_bytes() for path in other.iterdir()})
    with pytest.raises(ValueError, match="text_embeds of a clean process differ .*Its base there is not the"):
        publish(adapter_folder, "tester/adapter", base="tester/other")
    assert "tester/adapter" not in online.repositories


def test_an_adapter_beside_a_whole_model_is_neither(online, model_folder, adapter_folder):
    (model_folder / "adapter_config.json").write_bytes((adapter_folder / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match="holds a whole model and an adapter beside it"):
        publish(model_folder, "tester/demo")
