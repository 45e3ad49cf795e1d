"""Folders, code, tokens and repositories that are refused, and what is said of them."""

import json

import pytest
import torch
from PIL import Image

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.hub import check_access, publication, publish, reload
from gap_closed_clip.hub.reload import check_code
from gap_closed_clip.training import load_config

from .conftest import ROOT
from .loopback_hub import TOKEN


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("other/demo", r"The token is tester's, who can't write to other/demo, but to: tester, lab\."),
        ("a/b/c", "is no repository id, which is owner/name"),
        ("tester/de mo", "is no repository id"),
    ],
)
def test_where_one_may_not_write(online, model_folder, repo_id, message):
    with pytest.raises((OSError, ValueError), match=message):
        publish(model_folder, repo_id)
    assert not online.repositories


def test_tokens(online, monkeypatch):
    assert check_access("demo") == "tester/demo" and check_access("lab/demo") == "lab/demo"
    with pytest.raises(OSError, match="the Hub refused, .*Log in with `hf auth login`"):
        check_access("tester/demo", token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="no token to publish tester/demo with. Log in with `hf auth login`"):
        check_access("tester/demo")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check_access("tester/demo", token=TOKEN) == "tester/demo"
    online.organisation_role = "read"
    with pytest.raises(OSError, match="who can't write to lab/demo, but to: tester\\."):
        check_access("lab/demo")
    online.role = "read"
    with pytest.raises(OSError, match="The token may only read, so tester/demo can't be published with it"):
        check_access("tester/demo", token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        check_access("tester/demo", token=TOKEN)


def test_code_that_is_not_this_version_runs_only_where_allowed(online, model_folder, monkeypatch):
    marker = model_folder.parent / "it ran"
    path = model_folder / "tower_kinds_gap_closed_clip.py"
    changed = path.read_text().replace("return hidden[:, 0]", "return hidden[:, 1]")
    path.write_text(f"open({str(marker)!r}, 'w')\n{changed}")
    with pytest.raises(ValueError, match=r"tower_kinds_gap_closed_clip.py is not the .* of this version"):
        publish(model_folder, "tester/demo")
    assert not marker.exists()
    with pytest.raises(ValueError, match="text_embeds of a clean process differ from this package's by"):
        publish(model_folder, "tester/demo", trust_remote_code=True)
    assert marker.exists() and not online.repositories
    monkeypatch.setattr(publication, "check_reload", lambda *args: None)
    publish(model_folder, "tester/demo", trust_remote_code=True)
    assert online.files("tester/demo")[path.name] == path.read_bytes()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"auto_map": {"AutoModel": "onnx/evil.M"}}),
        ("config.json", {"auto_map": {"AutoModel": "other/repo--modeling_gap_closed_clip.GapClosedClipModel"}}),
        ("config.json", {"auto_map": {"AutoModel": "evil.M"}}),
        ("config.json", {"text_config": {"model_type": "bert", "auto_map": {"AutoModel": "evil.M"}}}),
        ("config.json", {"custom_pipelines": {"image-text-retrieval": {"impl": "evil.M", "pt": ["AutoModel"]}}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "onnx/evil.M"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.M"]}}),
        ("tokenizer_config.json", {"auto_map": ["evil.M", None]}),
    ],
)
def test_code_elsewhere_is_not_run(model_folder, file, change):
    check_code(model_folder)
    path = model_folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{file} names code that is not this package's: "):
        check_code(model_folder)


def test_what_is_not_the_hub(online, model_folder):
    online.portal = True
    with pytest.raises(OSError, match="what answers is not the Hub .* proxy or a login page"):
        publish(model_folder, "tester/demo")


def test_a_bfloat16_model_is_compared_in_float32(tiny_model, tiny_processor, tmp_path):
    """As the clean process loads it: upcast after loading, it would keep rotary tables rounded to bfloat16."""
    tiny_processor.save_pretrained(tmp_path)
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path)
    model = GapClosedClipModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    late = GapClosedClipModel.from_pretrained(tmp_path).float().eval()
    pixel_values = tiny_processor(images=[Image.linear_gradient("L").convert("RGB")], return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected, rounded = (each(pixel_values=pixel_values).image_embeds for each in (model, late))
    assert torch.equal(reload._outputs(tmp_path)[0]["image_embeds"], expected) and not torch.equal(expected, rounded)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", '{"results": {"accuracy": 0.5}}', "metrics.json is not a metrics file"),
        ("metrics.json", '{"results": {"demo": {"margin": "high"}}}', "metrics.json is not a metrics file"),
        ("metrics.json", "[]", "metrics.json is not a metrics file"),
        (
            "metrics.json",
            '{"results": {"demo": {}}, "data": {"field_of_tomorrow": 1}, "split": "test", "versions": {}}',
            "metrics.json is not a metrics file",
        ),
        ("config.json", "[]", "is damaged: config.json holds no mapping"),
        ("model.safetensors.index.json", "[]", "is damaged: model.safetensors.index.json holds no mapping"),
        ("run.json", '{"num_processes": null}', "run.json is damaged"),
        ("train_config.yaml", "data: {crop_scale: [a, b]}", "train_config.yaml"),
        ("examples/chest.png", "no image", "examples/chest.png is no image, or a damaged one"),
    ],
)
def test_damaged_files_are_named(online, model_folder, skip_reload, file, content, message):
    if file == "run.json":
        words = ["model.vision={architecture: eva02_tiny_patch14_224}"]
        load_config([], words).save(model_folder / "train_config.yaml")
    if file == "model.safetensors.index.json":
        (model_folder / "model.safetensors").unlink()
    (model_folder / file).parent.mkdir(exist_ok=True)
    (model_folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        publish(model_folder, "tester/demo")
    assert str(model_folder) in str(raised.value)


def test_what_does_not_load_in_a_clean_process_is_not_published(online, model_folder, new_clean_processes):
    (model_folder / "tiles_gap_closed_clip.py").unlink()  # this package has its own, a stranger has not
    with pytest.raises(ValueError, match=r"does not load in a clean process(.|\n)*tiles_gap_closed_clip"):
        publish(model_folder, "tester/demo")
    assert not online.repositories
    for path in model_folder.glob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="has no code beside the weights"):
        publish(model_folder, "tester/demo")


def test_a_damaged_folder_is_named(online, model_folder):
    (model_folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        publish(model_folder, "tester/demo")
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        publish(model_folder / "nowhere", "tester/demo")
    assert not online.requests


def test_the_command_says_what_is_wrong_in_one_line(script, model_folder):
    code, out, err = script(str(ROOT / "publish.py"), str(model_folder), "other/demo")
    assert code == 1 and out == ""
    assert (
        err == "gap-closed-clip publish: The token is tester's, who can't write to other/demo, but to: tester, lab.\n"
    )
