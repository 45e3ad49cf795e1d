"""Published folders: what goes, how it loads where this package is not, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import digest_of_weights
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import check_access, publication, publish, reload
from gap_closed_clip.hub.reload import HUB, MODEL, check_code, check_reload
from gap_closed_clip.training import load_config

from .conftest import HANDLER, ROOT, WITHOUT_PACKAGE
from .loopback_hub import TOKEN


PUBLISH = str(ROOT / "publish.py")
CAPTIONER = ["captioning_gap_closed_clip.py", "decoder_gap_closed_clip.py"]  # an encoder needs no such code
CODE = [path.name for path in MODEL.glob("*_gap_closed_clip.py") if path.name not in CAPTIONER]
SAVED = ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
ADDED = ["README.md", *HANDLER, "requirements.txt"]

# What the card says, word for word, where this package is not installed; and that nothing of it runs without consent.
STRANGER = """
import json, os, pathlib, re
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
    exec(block, names)
found = {name: names[name] for name in ("scores", "image_vector", "text_vector", "template")}
found["hits"] = [[hit["index"], hit["score"]] for hit in names["hits"]]
found["class"] = type(names["model"]).__module__
json.dump(found, open(f"{out}/found.json", "w"))

old = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True).eval()
outputs = names["outputs"]
pinned = old(**names["inputs"]).image_embeds.detach()
save_file({"image": outputs.image_embeds, "text": outputs.text_embeds, "pinned": pinned}, f"{out}/embeds.safetensors")
names["model"].save_pretrained(f"{out}/again")
names["processor"].save_pretrained(f"{out}/again")
"""


@pytest.fixture
def skip_reload(monkeypatch):
    """For what does not depend on it: a clean process takes seconds to start."""
    monkeypatch.setattr("gap_closed_clip.hub.publication.check_reload", lambda *args: None)


def embed(model, processor, image) -> tuple[torch.Tensor, torch.Tensor]:
    texts = ["Chest radiograph with pleural effusion.", "Axial MR image of the brain."]  # those of the card
    with torch.inference_mode():
        outputs = model(**processor(images=[image], text=texts, return_tensors="pt", padding=True, truncation=True))
    return outputs.image_embeds, outputs.text_embeds


def test_a_published_model_works_where_the_package_is_not(
    online, python, model_folder, tiny_model, tiny_processor, tmp_path, monkeypatch
):
    hub = online
    image = Image.effect_noise((40, 36), 80).convert("RGB")
    image.save(tmp_path / "image.png")
    printed = python(PUBLISH, str(model_folder), "demo").stdout
    repository = hub.repositories["tester/demo"]
    assert repository.private and len(repository.commits) == 2  # the empty one of every new repository, and ours
    first = repository.commits[-1]
    assert set(first.files) == {".gitattributes", *SAVED, *CODE, *ADDED}
    assert first.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert f"/tester/demo/commit/{first.oid}" in printed
    assert re.search(r"left out: .*checkpoint-3/, notes.txt, training_args.bin", printed)
    assert (model_folder / "README.md").exists() is False  # the folder at home is as it was

    expected_pinned, _ = embed(tiny_model, tiny_processor, image)
    with torch.no_grad():
        tiny_model.visual_projection.weight.mul_(-1.5).add_(0.01)
    tiny_model.save_pretrained(model_folder)
    sent = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setattr(publication, "check_reload", lambda *args: None)  # what follows shows as much
        publish(model_folder, "tester/demo")
    second = repository.commits[-1]
    changed = {name for name in second.files if second.files[name] != first.files[name]}
    assert len(repository.commits) == 3 and changed == {"model.safetensors"}
    assert [path.startswith("lfs/") for method, path in hub.requests[sent:] if method == "PUT"] == [True]

    python("-c", WITHOUT_PACKAGE + STRANGER, "tester/demo", str(tmp_path), first.oid, home="stranger")
    found, embeds = json.loads((tmp_path / "found.json").read_text()), load_file(tmp_path / "embeds.safetensors")
    image_embeds, text_embeds = embed(tiny_model, tiny_processor, image)
    assert found["class"].startswith("transformers_modules.")
    assert torch.equal(embeds["image"], image_embeds) and torch.equal(embeds["text"], text_embeds)
    assert torch.equal(embeds["pinned"], expected_pinned) and not torch.equal(expected_pinned, image_embeds)

    # The pipelines against the model by hand.
    model, close = tiny_model, lambda values: pytest.approx(values, abs=1e-5)
    labels = ["chest radiograph", "brain MR"]
    inputs = tiny_processor(images=[image], text=[f"Medical image of {label}." for label in labels],
                            return_tensors="pt", padding=True)  # fmt: skip
    with torch.inference_mode():
        probabilities = model(**inputs).logits_per_image.softmax(-1)[0].tolist()
        gallery = model(**tiny_processor(text=["Normal chest radiograph."], return_tensors="pt")).text_embeds
    assert found["template"] == "Medical image of {}."
    assert {score["label"]: score["score"] for score in found["scores"]} == close(
        dict(zip(labels, probabilities, strict=True))
    )
    assert found["image_vector"] == close(image_embeds[0].tolist())
    assert found["text_vector"] == close(text_embeds[1].tolist())
    cosines = {0: (text_embeds[0] @ image_embeds[0]).item(), 1: (text_embeds[0] @ gallery[0]).item()}
    assert dict(found["hits"]) == close(cosines) and found["hits"][0][1] == max(cosines.values())

    # What was loaded from there and saved again has its code again, and is published just so.
    again = tmp_path / "again"
    check_code(again)
    assert {path.name for path in again.iterdir()} == {*SAVED, *CODE}


WITH_PACKAGE = """
import json, os, pathlib, sys
import gap_closed_clip
from gap_closed_clip import ImageTextRetrievalPipeline
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

repo_id, out, poison, but_in_the_pipeline = sys.argv[1:]
autos = (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor)
found = [type(auto.from_pretrained(repo_id, revision=poison)).__module__ for auto in autos]
tasks = ("zero-shot-image-classification", "image-feature-extraction", "feature-extraction")
found += [type(pipeline(task, model=repo_id, revision=poison).model).__module__ for task in tasks]
search = pipeline(
    "image-text-retrieval", model=repo_id, revision=poison, pipeline_class=ImageTextRetrievalPipeline
)
found += [type(search).__module__, type(search.model).__module__]
# Where the task is left out, the pipeline is the repository's: it runs, and nothing else does.
search = pipeline(model=repo_id, revision=but_in_the_pipeline, trust_remote_code=True)
asked_for = [type(search).__module__, type(search).__name__, type(search.model).__module__]
json.dump([found, asked_for], open(f"{out}/found.json", "w"))
"""
# What the pipeline of the repository is made of.
PIPELINE = {"pipeline_gap_closed_clip.py", "images_gap_closed_clip.py"}


def test_with_the_package_no_code_of_the_repository_runs(online, python, model_folder, skip_reload, tmp_path):
    publish(model_folder, "tester/demo")
    repository, own = online.repositories["tester/demo"], dict(online.files("tester/demo"))
    poison = dict.fromkeys(CODE, b"raise SystemExit('code of the repository was run')\n")
    all_of_it = repository.commit("poison", own | poison).oid
    poison = {name: content for name, content in poison.items() if name not in PIPELINE}
    but_in_the_pipeline = repository.commit("poison but in the pipeline", own | poison).oid
    python("-c", WITH_PACKAGE, "tester/demo", str(tmp_path), all_of_it, but_in_the_pipeline)
    modules, asked_for = json.loads((tmp_path / "found.json").read_text())
    assert len(modules) == 9 and all(module.startswith("gap_closed_clip.") for module in modules)
    assert asked_for[0].startswith("transformers_modules.")
    assert asked_for[1:] == ["ImageTextRetrievalPipeline", "gap_closed_clip.model.modeling_gap_closed_clip"]


def test_nothing_changed_is_no_commit(online, model_folder, skip_reload):
    first = publish(model_folder, "demo")
    again = publish(model_folder, "tester/demo")
    assert first.url and again.url is None and set(again.changes.values()) == {"unchanged"}
    assert len(online.repositories["tester/demo"].commits) == 2


def test_what_is_gone_at_home_is_deleted_and_what_is_not_ours_stays(online, model_folder, skip_reload):
    for name in ("examples/chest_CT.png", "examples/ultrasound.png"):
        (model_folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(model_folder / name)
    publish(model_folder, "tester/demo", private=False)
    assert not online.repositories["tester/demo"].private
    ours = {"model-00001-of-00002.safetensors", "onnx/vision_model.onnx", "cosines.png", "dropped_gap_closed_clip.py"}
    ours |= {"adapter_config.json"}  # of an adapter that was published there before
    theirs = {"onnx/mine.onnx", "onnx/small/vision_model.onnx", "examples/mine/x.png"}
    theirs |= {"tools/x_gap_closed_clip.py", ".eval_results/community.yaml", "LICENSE", "cosines/cosines.png"}
    online.files("tester/demo").update(dict.fromkeys(ours | theirs, b"old"))
    (model_folder / "examples" / "chest_CT.png").unlink()
    done = publish(model_folder, "tester/demo")
    gone = {name for name, change in done.changes.items() if change == "deleted"}
    assert gone == {"examples/chest_CT.png", *ours}
    files = online.files("tester/demo")
    assert not gone & set(files) and theirs | {"examples/ultrasound.png"} <= set(files)


@pytest.mark.parametrize("broken", ["commit/main", "lfs/", "preupload", "info/lfs"])
def test_an_interrupted_push_leaves_the_repository_as_it_was(online, model_folder, skip_reload, monkeypatch, broken):
    publish(model_folder, "tester/demo")
    before = dict(online.files("tester/demo"))
    model = GapClosedClipModel.from_pretrained(model_folder)
    model.visual_projection.weight.data.zero_()
    model.save_pretrained(model_folder)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again, longer and longer
    online.broken = broken
    with pytest.raises(
        OSError, match="tester/demo: the Hub can't be reached .* Nothing in the .* has changed: publish"
    ):
        publish(model_folder, "tester/demo")
    assert online.files("tester/demo") == before and len(online.repositories["tester/demo"].commits) == 2
    online.broken = None
    publish(model_folder, "tester/demo")
    assert online.files("tester/demo")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


def test_a_commit_in_between_is_not_undone(online, model_folder, skip_reload, monkeypatch):
    publish(model_folder, "tester/demo")
    (model_folder / "metrics.json").unlink(missing_ok=True)
    (model_folder / "projection.png").write_bytes(b"picture")
    repository = online.repositories["tester/demo"]
    remote_files = publication._remote_files

    def then_somebody_pushes(*args, **kwargs):
        found = remote_files(*args, **kwargs)
        repository.commit("theirs", {**repository.commits[-1].files, "theirs.txt": b"theirs"})
        return found

    monkeypatch.setattr(publication, "_remote_files", then_somebody_pushes)
    with pytest.raises(OSError, match="Somebody else has pushed in the meantime"):
        publish(model_folder, "tester/demo")
    assert repository.commits[-1].message == "theirs"


def test_dry_run(online, model_folder, skip_reload, monkeypatch):
    done = publish(model_folder, "tester/demo", dry_run=True, license="mit")
    assert (
        done.remarks == [] and set(done.changes) == {*SAVED, *CODE, *ADDED} and set(done.changes.values()) == {"new"}
    )
    assert not online.repositories
    text = str(done)
    assert re.search(r"^ +new  model.safetensors +[\d.]+ kB$", text, flags=re.MULTILINE) and "left out: " in text
    monkeypatch.delenv("HF_TOKEN")
    done = publish(model_folder, "tester/demo", dry_run=True)
    assert "There is no token to publish tester/demo with. Log in" in str(done)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert set(publish(model_folder, "tester/demo", dry_run=True).changes.values()) == {"?"}
    assert not any(method in ("POST", "PUT") for method, _ in online.requests)


def test_paths_of_the_machine_are_pointed_out(online, model_folder, skip_reload, tmp_path):
    words = [f"model.vision={tmp_path}/tower", "model.text=google-bert/bert-base-uncased", "data.source=$DATA/pairs"]
    load_config([], words).save(model_folder / "train_config.yaml")
    (remark,) = publish(model_folder, "tester/demo", dry_run=True, license="mit").remarks
    assert remark == (
        f"Everybody will read the path {tmp_path}/tower: it is model.vision in train_config.yaml and on the card."
    )


def test_the_card_of_the_folder_is_kept_where_asked(online, model_folder, skip_reload):
    with pytest.raises(FileNotFoundError, match="has no README.md to keep"):
        publish(model_folder, "tester/demo", keep_card=True)
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    publish(model_folder, "tester/demo", keep_card=True)
    assert online.files("tester/demo")["README.md"].endswith(b"mine\n")
    publish(model_folder, "tester/demo", license="cc-by-4.0")
    assert b"license: cc-by-4.0" in online.files("tester/demo")["README.md"]
    assert (model_folder / "README.md").read_text().endswith("mine\n")


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


def test_code_that_is_not_this_version_is_not_run(online, model_folder):
    marker = model_folder.parent / "it ran"
    path = model_folder / "modeling_gap_closed_clip.py"
    path.write_text(f"open({str(marker)!r}, 'w')\n" + path.read_text())
    with pytest.raises(ValueError, match=r"modeling_gap_closed_clip.py is not the .* of this version"):
        publish(model_folder, "tester/demo")
    assert not marker.exists() and not online.repositories
    publish(model_folder, "tester/demo", trust_remote_code=True)
    assert marker.exists() and online.files("tester/demo")[path.name] == path.read_bytes()


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


def test_only_what_an_export_writes_goes_from_onnx(online, model_folder, skip_reload):
    (model_folder / "onnx").mkdir()
    weights = {"weights": digest_of_weights(model_folder)}
    for name in ("vision_model.onnx", "evil.py", "stolen.pkl", ".env"):
        (model_folder / "onnx" / name).write_text("content")
    (model_folder / "onnx" / "preprocessing.json").write_text(json.dumps(weights))
    done = publish(model_folder, "tester/demo", license="mit")
    sent = {name for name in online.files("tester/demo") if name.startswith("onnx/")}
    assert sent == {"onnx/vision_model.onnx", "onnx/preprocessing.json"} and done.remarks == []
    assert {"onnx/evil.py", "onnx/stolen.pkl", "onnx/.env"} <= set(done.left_out)


def test_figures_and_exports_of_other_weights_stay_at_home(online, model_folder, skip_reload):
    result = {"modality_gap": 0.5, "debiased_modality_gap": 0.4, "true_pair_cosine": 0.3, "margin": 0.2}
    write_metrics(model_folder / "metrics.json", {"demo": result}, {}, "test", {"demo": model_folder})
    (model_folder / "projection.png").write_bytes(b"picture")
    (model_folder / "onnx").mkdir()
    (model_folder / "onnx" / "preprocessing.json").write_text(json.dumps({"weights": digest_of_weights(model_folder)}))
    publish(model_folder, "tester/demo")
    made = {"metrics.json", "projection.png", "onnx/preprocessing.json"}
    assert made <= set(online.files("tester/demo")) and b"0.500" in online.files("tester/demo")["README.md"]
    model = GapClosedClipModel.from_pretrained(model_folder)
    model.visual_projection.weight.data.neg_()
    model.save_pretrained(model_folder)
    done = publish(model_folder, "tester/demo", license="mit")
    assert not made & set(online.files("tester/demo")) and b"0.500" not in online.files("tester/demo")["README.md"]
    assert [remark.split(" ")[0] for remark in done.remarks] == ["metrics.json", "onnx/"]
    assert made <= {path.relative_to(model_folder).as_posix() for path in model_folder.rglob("*")}


def test_a_copy_of_what_goes(online, model_folder, skip_reload, tmp_path):
    done = publish(model_folder, "tester/demo", dry_run=True, output=tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(done.changes)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert done.remarks == ["The card names no licence, so nobody may reuse the weights: --license, e.g. apache-2.0."]
    with pytest.raises(FileExistsError, match="copy exists already"):
        publish(model_folder, "tester/demo", dry_run=True, output=tmp_path / "copy")


def test_a_commit_whose_answer_was_lost_is_found(online, model_folder, skip_reload, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.lost = "commit/main"
    with pytest.raises(OSError, match="the answer was lost .* but the commit has arrived"):
        publish(model_folder, "tester/demo")
    online.lost = None
    assert publish(model_folder, "tester/demo").url is None


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
    assert torch.equal(reload._outputs(tmp_path)["image_embeds"], expected) and not torch.equal(expected, rounded)


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
        ("examples/chest.png", "no picture", "examples/chest.png is no picture, or a damaged one"),
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


def test_what_does_not_load_in_a_clean_process_is_not_published(online, model_folder):
    (model_folder / "tiles_gap_closed_clip.py").unlink()  # this package has its own, a stranger has not
    with pytest.raises(ValueError, match=r"does not load in a clean process(.|\n)*tiles_gap_closed_clip"):
        publish(model_folder, "tester/demo")
    assert not online.repositories
    for path in model_folder.glob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="has no code beside the weights"):
        publish(model_folder, "tester/demo")


def test_other_embeddings_in_the_clean_process_are_noticed(model_folder, monkeypatch):
    for name in HANDLER:
        shutil.copy(HUB / name, model_folder)
    path = model_folder / "towers_gap_closed_clip.py"
    path.write_text(path.read_text().replace("return hidden[:, 0]", "return hidden[:, 1]"))
    with pytest.raises(ValueError, match="text_embeds of a clean process differ from this package's by"):
        check_reload(model_folder)


def test_a_damaged_folder_is_named(online, model_folder):
    (model_folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        publish(model_folder, "tester/demo")
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        publish(model_folder / "nowhere", "tester/demo")
    assert not online.requests


def test_the_command_says_what_is_wrong_in_one_line(script, model_folder):
    code, out, err = script(PUBLISH, str(model_folder), "other/demo")
    assert code == 1 and out == ""
    assert err == "publish.py: The token is tester's, who can't write to other/demo, but to: tester, lab.\n"


TINY_RUN = """
model:
  vision: {architecture: eva02_tiny_patch14_224, model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300}
  projection_dim: 16
data: {phantom_train_pairs: 24, phantom_test_pairs: 24, phantom_size: 32}
training:
  output_dir: outputs/tiny
  max_steps: 2
  per_device_train_batch_size: 8
  save_steps: 1
  final_split: test
  use_cpu: true
  report_to: none
  push_to_hub: true
  card_license: apache-2.0
"""


def test_train_py_publishes_the_finished_model(hub, python, script, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    train = [str(ROOT / "train.py"), "tiny.yaml"]
    code, _, err = script(*train, "hub_model_id=other/tiny")
    assert code == 1 and "train.py: The token is tester's, who can't write to other" in err
    assert not (tmp_path / "outputs").exists()  # said before training
    printed = python(*train, "hub_token=hf_loopback", HF_TOKEN="").stdout
    repository = hub.repositories["tester/tiny"]
    assert repository.private and len(repository.commits) == 2 and "Published: http" in printed
    files = hub.files("tester/tiny")
    added = {"train_config.yaml", "run.json", "metrics.json", "projection.png", "cosines.png"}
    examples = {name for name in files if name.startswith("examples/")}
    assert set(files) == {".gitattributes", *SAVED, *CODE, *ADDED, *added, *examples} and len(examples) >= 2
    assert (tmp_path / "outputs" / "tiny" / "checkpoint-2").is_dir()
    assert not any(b"hf_loopback" in content or str(tmp_path).encode() in content for content in files.values())
    assert b"output_dir" not in files["train_config.yaml"] and b"max_steps: 2" in files["train_config.yaml"]
    card = ModelCard(files["README.md"].decode())
    metrics = json.loads(files["metrics.json"])["results"]["tiny"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        m: metrics[m] for m in card.data.metrics
    }
    assert card.data.license == "apache-2.0" and card.data.widget[0]["src"].startswith(
        f"{hub.url}/tester/tiny/resolve/"
    )
    assert "24 pairs were trained on" in card.text and "- trained on: CPU" in card.text


def test_a_push_that_fails_after_training_names_the_way_out(hub, script, tmp_path, skip_reload):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    hub.broken = "repos/create"
    code, _, err = script(str(ROOT / "train.py"), "tiny.yaml", "max_steps=1")
    assert code == 1 and (tmp_path / "outputs" / "tiny" / "model.safetensors").is_file()
    last = err.splitlines()[-1]
    assert (
        last == "The trained model is safe in outputs/tiny; to publish it: python publish.py outputs/tiny tester/tiny"
    )
