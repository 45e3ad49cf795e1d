"""A good folder loads; a bad one gets one line that names it and what is missing."""

import copy
import json

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import check_checkpoint, check_model_name, is_local, load_checkpoint


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    path = tmp_path / "demo"
    tiny_model.save_pretrained(path)
    tiny_processor.save_pretrained(path)
    return path


def test_good_folder(folder, tiny_model):
    model, processor = load_checkpoint(folder)
    expected = tiny_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert processor.tokenizer.model_max_length == 64


def test_sharded_folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="50KB")
    tiny_processor.save_pretrained(tmp_path)
    load_checkpoint(tmp_path)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete: model-00002.* is missing"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "demo is no model folder: config.json is missing"),
        ("model.safetensors", "demo has no weights: model.safetensors is missing, it may be half-written"),
        ("tokenizer.json", "demo has no tokenizer: tokenizer.json is missing"),
        ("processor_config.json", "demo has no processor: processor_config.json is missing"),
    ],
)
def test_missing_file(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="demo is damaged: model.safetensors is truncated"):
        load_checkpoint(folder)


def test_half_written_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="demo is damaged: config.json is half-written"):
        load_checkpoint(folder)


def test_another_kind_of_model(folder):
    config = json.loads((folder / "config.json").read_text())
    bert = {**config["text_config"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(bert))
    with pytest.raises(ValueError, match="demo holds a model of type 'bert', not 'gap_closed_clip'"):
        load_checkpoint(folder)
    # With towers of its own it would be a CLIP to take over, which these weights are not.
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    with pytest.raises(ValueError, match="demo: the weights do not fit config.json"):
        load_checkpoint(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is pickled and not read"):
        load_checkpoint(folder)


def test_weights_that_lack_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="demo lacks 1 weights, the first: visual_projection.weight"):
        load_checkpoint(folder)


def test_weights_of_other_shapes(folder):
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = (
        "demo: the weights do not fit config.json. The first that has another shape: visual_projection.weight. Save"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_a_tokenizer_of_more_tokens_than_the_text_tower_embeds(folder, tiny_processor):
    processor = copy.deepcopy(tiny_processor)
    added = 200 - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"<finding{index}>" for index in range(added)])  # fills what is padded
    processor.save_pretrained(folder)
    model, filled = load_checkpoint(folder)
    model(**filled(text=[f"<finding{added - 1}>"], return_tensors="pt"))
    processor.tokenizer.add_tokens(["<lesion>"])
    processor.save_pretrained(folder)
    message = r"demo: the tokenizer has 201 tokens and the text tower embeds 200: .*make room for added tokens"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    model.resize_token_embeddings(201)
    model.save_pretrained(folder)
    load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["text_projection.weight", "temperature.logit_scale", "text_centering.running_mean"])
def test_weights_that_are_not_finite(folder, name, value, dtype):
    model = GapClosedClipModel(tiny_config(center_projections=True)).to(dtype)
    model.save_pretrained(folder)
    load_checkpoint(folder)
    model.state_dict()[name].view(-1)[-1] = value
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"demo has weights that are NaN or infinite, the first in {name}: take an"):
        load_checkpoint(folder)


def test_an_adapter_beside_a_whole_model(folder, tiny_model):
    """transformers loads the adapter on the base that it names, and the model of the folder not at all."""
    get_peft_model(tiny_model, LoraConfig(target_modules="all-linear")).save_pretrained(folder)
    for load in (load_checkpoint, check_model_name):
        with pytest.raises(
            ValueError, match="demo holds a whole model and an adapter .*: move adapter_config.json and"
        ):
            load(folder)
    (folder / "adapter_config.json").unlink()
    load_checkpoint(folder)


def test_folder_above_the_model(folder):
    with pytest.raises(FileNotFoundError, match="Did you mean .*demo?"):
        load_checkpoint(folder.parent)


def test_weights_of_open_clip_without_their_configuration(tmp_path):
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="open_clip_config.json is missing: take it from where"):
        load_checkpoint(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_slip_in_the_name_of_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    parent = folder.parent.name  # parent/demo is written as a Hub id would be
    (folder.parent / "demoos").touch()  # nearer, but no folder
    for check in (check_model_name, load_checkpoint):
        with pytest.raises(
            FileNotFoundError, match=rf"^There is no folder {parent}/demoo. Did you mean {parent}/demo\?$"
        ):
            check(f"{parent}/demoo")
    with pytest.raises(FileNotFoundError, match=rf"no model folder {parent}/demoo. Did you mean {parent}/demo\?$"):
        check_checkpoint(f"./{parent}/demoo")


def test_a_hub_id_whose_owner_is_a_folder_by_chance(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    for name in (f"{folder.parent.name}/radiology", "nobody/demoo", "demoo"):
        check_model_name(name)
    with pytest.raises(OSError, match="radiology is neither a folder with a model nor a Hub id within reach"):
        load_checkpoint(f"{folder.parent.name}/radiology")


def test_hub_id_out_of_reach():
    with pytest.raises(OSError, match="nobody/nothing is neither a folder with a model nor a Hub id within reach"):
        load_checkpoint("nobody/nothing")


def test_folder_or_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    assert is_local("outputs/demo") and is_local("./other/demo") and is_local("/a/b") and is_local("a/b/c")
    assert not is_local("owner/name") and not is_local("name")
