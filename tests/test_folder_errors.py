"""Files of a model folder that are no longer what was saved: one line that names the file, whatever is in it."""

import json

import pytest

from gap_closed_clip.checkpoint import load_checkpoint


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def spoil(path, field: str, value) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    *outer, last = field.split(".")
    inner = content
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "field", "value", "said"),
    [
        ("config.json", "projection_dim", "x", "config.json can't be used.*projection_dim"),
        ("config.json", "projection_dim", None, "config.json can't be used.*projection_dim"),
        ("config.json", "vision_config", [], r"config.json can't be used \(vision_config is \[\]: it is a mapping"),
        ("config.json", "text_config", None, "do not fit config.json|config.json can't be used"),
        ("config.json", "text_config.num_hidden_layers", 10**6, "text_config.num_hidden_layers is 1000000: use a"),
        ("config.json", "text_config.hidden_size", 10**9, "text_config.hidden_size is 1000000000: no tower"),
        ("config.json", "text_config.hidden_size", "x", "config.json can't be used.*hidden_size"),
        ("config.json", "vision_config.model_args", 3, "vision_config.model_args is 3: it is a mapping"),
        ("config.json", "vision_config.model_args.depth", 10**6, "model_args.depth is 1000000: use a number"),
        ("config.json", "vision_config.model_args.checkpoint_path", "x.pth", "checkpoint_path is 'x.pth': leave it"),
        ("config.json", "modalities", 3, "config.json can't be used.*modalities is 3"),
        ("processor_config.json", "image_processor.size", None, "processor_config.json"),
        ("processor_config.json", "image_processor.size", [1, {}], "processor_config.json"),
        ("processor_config.json", "image_processor.crop_size.height", 10**6, "crop_size.height is 1000000"),
        ("processor_config.json", "image_processor.image_mean", "x", "processor_config.json"),
        ("processor_config.json", "image_processor.image_std", [float("nan")] * 3, "not finite"),
        ("tokenizer_config.json", "model_max_length", "x", "tokenizer_config.json"),
        ("tokenizer_config.json", "pad_token", None, "tokenizer_config.json"),
        ("tokenizer_config.json", "mask_token", 3, "tokenizer_config.json"),
        ("tokenizer.json", "model", [], "tokenizer.json"),
    ],
)
def test_a_field_of_another_kind(file, field, value, said, folder):
    spoil(folder / file, field, value)
    with pytest.raises(ValueError, match=said) as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", "\u00e9".encode("latin-1"), b"[" * 100_000])
def test_a_file_that_holds_something_else(file, content, folder):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load_checkpoint(folder)


def test_a_folder_whose_name_begins_that_of_the_field(folder, monkeypatch):
    spoil(folder / "tokenizer_config.json", "model_max_length", float("-inf"))
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=r"^model is damaged.*tokenizer_config.json.*model_max_length is -inf"):
        load_checkpoint("model")


def test_what_is_whole_is_loaded(folder):
    load_checkpoint(folder)
