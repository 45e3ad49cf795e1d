"""Publications: what of a folder goes, and one commit that is made whole or not at all."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.base_weights import digest_of_weights
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import publication, publish, requirements, staging
from gap_closed_clip.training import load_config

from .conftest import ADDED, CODE, SAVED


pytestmark = pytest.mark.usefixtures("skip_reload")


def test_all_that_belongs_to_a_model_goes_in_one_commit(online, model_folder):
    done = publish(model_folder, "demo")
    repository = online.repositories["tester/demo"]
    assert repository.private and len(repository.commits) == 2  # the empty one of every new repository, and ours
    commit = repository.commits[-1]
    assert set(commit.files) == {".gitattributes", *SAVED, *CODE, *ADDED}
    assert commit.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert commit.files["requirements.txt"].decode().splitlines() == list(requirements.ENDPOINT)
    assert commit.message == "Publish the model"
    assert done.outcome == f"Published: {online.url}/tester/demo/commit/{commit.oid}"
    assert done.changes == dict.fromkeys([*SAVED, *CODE, *ADDED], "new")
    assert {"checkpoint-3/", "notes.txt", "training_args.bin"} <= set(done.left_out)
    assert not (model_folder / "README.md").exists()  # the folder at home is as it was


def test_a_second_publication_sends_only_what_changed(online, model_folder, tiny_model):
    publish(model_folder, "tester/demo")
    repository = online.repositories["tester/demo"]
    tiny_model.visual_projection.weight.data.neg_()
    tiny_model.save_pretrained(model_folder)
    sent = len(online.requests)
    done = publish(model_folder, "tester/demo")
    first, second = repository.commits[-2:]
    assert len(repository.commits) == 3 and second.message == "Update the model"
    assert {name for name in second.files if second.files[name] != first.files[name]} == {"model.safetensors"}
    assert [path.startswith("lfs/") for method, path in online.requests[sent:] if method == "PUT"] == [True]
    assert second.sent == ["model.safetensors"]
    assert set(done.changes.values()) == {"present"} and done.outcome.endswith(second.oid)


def test_nothing_changed_is_no_commit(online, model_folder):
    first = publish(model_folder, "demo")
    again = publish(model_folder, "tester/demo")
    assert first.url and again.url is None and set(again.changes.values()) == {"present"}
    assert again.outcome == "tester/demo holds just this already."
    assert len(online.repositories["tester/demo"].commits) == 2


def test_what_is_gone_at_home_is_deleted_and_what_is_not_ours_stays(online, model_folder):
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
def test_an_interrupted_push_leaves_the_repository_as_it_was(online, model_folder, monkeypatch, broken):
    publish(model_folder, "tester/demo")
    before = dict(online.files("tester/demo"))
    model = GapClosedClipModel.from_pretrained(model_folder)
    model.visual_projection.weight.data.zero_()
    model.save_pretrained(model_folder)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again, longer and longer
    online.broken = broken
    message = "tester/demo: the Hub can't be reached .* Nothing in the .* has changed: publish"
    with pytest.raises(OSError, match=message):
        publish(model_folder, "tester/demo")
    assert online.files("tester/demo") == before and len(online.repositories["tester/demo"].commits) == 2
    online.broken = None
    publish(model_folder, "tester/demo")
    assert online.files("tester/demo")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


def test_a_commit_in_between_is_not_undone(online, model_folder, monkeypatch):
    publish(model_folder, "tester/demo")
    (model_folder / "metrics.json").unlink(missing_ok=True)
    (model_folder / "projection.png").write_bytes(b"image")
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
    monkeypatch.setattr(publication, "_remote_files", remote_files)
    publish(model_folder, "tester/demo")
    assert {"projection.png", "theirs.txt"} <= set(online.files("tester/demo"))


def test_a_licence_is_kept_and_a_card_that_is_replaced_is_told(online, model_folder):
    assert publish(model_folder, "tester/demo", license="mit").remarks == []
    again = publish(model_folder, "tester/demo")
    assert again.remarks == [] and again.url is None  # the very same card
    files = dict(online.files("tester/demo"))
    files["README.md"] += b"\nWords of mine.\n"
    online.repositories["tester/demo"].commit("by hand", files)
    done = publish(model_folder, "tester/demo", dry_run=True)
    (remark,) = done.remarks
    assert remark.startswith("The card of tester/demo, README.md, is replaced") and "--keep-card" in str(done)
    (model_folder / "README.md").write_bytes(files["README.md"])
    assert publish(model_folder, "tester/demo", keep_card=True).remarks == []
    load_config([], ["training.card_license=apache-2.0"]).save(model_folder / "train_config.yaml")
    remark, _ = publish(model_folder, "tester/demo").remarks
    assert (
        remark.startswith("The card keeps the licence that it has on the Hub, mit, ") and "--license apache" in remark
    )
    assert b"license: mit" in online.files("tester/demo")["README.md"]
    publish(model_folder, "tester/demo", license="apache-2.0")
    assert b"license: apache-2.0" in online.files("tester/demo")["README.md"]


def test_the_terms_of_another_licence_are_kept_with_it(online, model_folder):
    publish(model_folder, "tester/demo", license="other")
    files = dict(online.files("tester/demo"))
    terms = b"license: other\nlicense_name: our-terms\nlicense_link: https://example.org/terms\n"
    files["README.md"] = files["README.md"].replace(b"license: other\n", terms)
    online.repositories["tester/demo"].commit("by hand", files)
    for asked in (None, "other"):
        publish(model_folder, "tester/demo", license=asked)
        data = ModelCard(online.files("tester/demo")["README.md"].decode()).data
        assert (data.license, data.license_name) == ("other", "our-terms")
        assert data.license_link == "https://example.org/terms"
    publish(model_folder, "tester/demo", license="mit")
    assert b"license_" not in online.files("tester/demo")["README.md"]


def test_a_private_repository_stays_private_and_that_is_told(online, model_folder):
    assert publish(model_folder, "tester/demo", license="mit").remarks == []
    (remark,) = publish(model_folder, "tester/demo", private=False).remarks
    assert remark.startswith("tester/demo is there already and private, and stays so")
    assert online.repositories["tester/demo"].private
    assert publish(model_folder, "tester/open", private=False, license="mit").remarks == []


def test_a_public_repository_stays_public_and_that_is_told(online, model_folder):
    """It was not, and `private=True` was not heard."""
    assert publish(model_folder, "tester/open", private=False, license="mit").remarks == []
    (remark,) = publish(model_folder, "tester/open", dry_run=True).remarks
    assert remark.startswith("tester/open is there already and public, and stays so: everybody can read")
    before = dict(online.files("tester/open"))
    (model_folder / "projection.png").write_bytes(b"image")
    with pytest.raises(ValueError, match="tester/open is public, and the model is to be private: make"):
        publish(model_folder, "tester/open", private=True)
    assert online.files("tester/open") == before and not online.repositories["tester/open"].private
    assert publish(model_folder, "tester/open", private=False).remarks == []


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n", b"no front matter", b"\xff", b"---\n- a\n---\n"])
def test_a_card_there_that_is_broken_is_replaced(online, model_folder, card):
    publish(model_folder, "tester/demo", license="mit")
    online.repositories["tester/demo"].commit("broken", {**online.files("tester/demo"), "README.md": card})
    assert publication.NO_LICENSE in publish(model_folder, "tester/demo", dry_run=True).remarks
    assert publish(model_folder, "tester/demo", license="mit").url
    assert b"license: mit" in online.files("tester/demo")["README.md"]


def test_dry_run(online, model_folder, monkeypatch):
    done = publish(model_folder, "tester/demo", dry_run=True, license="mit")
    assert done.remarks == [] and done.url is None and not online.repositories
    assert done.changes == dict.fromkeys([*SAVED, *CODE, *ADDED], "new")
    text = str(done)
    assert re.search(r"^ +new  model.safetensors +[\d.]+ kB$", text, flags=re.MULTILINE) and "left out: " in text
    monkeypatch.delenv("HF_TOKEN")
    done = publish(model_folder, "tester/demo", dry_run=True)
    assert "There is no token to publish tester/demo with. Log in" in str(done)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert set(publish(model_folder, "tester/demo", dry_run=True).changes.values()) == {"?"}
    assert not any(method in ("POST", "PUT") for method, _ in online.requests)


def test_a_commit_whose_answer_was_lost_is_found(online, model_folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.lost = "commit/main"
    with pytest.raises(OSError, match="the answer was lost .* but the commit has arrived"):
        publish(model_folder, "tester/demo")
    online.lost = None
    assert publish(model_folder, "tester/demo").url is None


def test_paths_of_the_machine_are_pointed_out(online, model_folder, tmp_path):
    words = [f"model.vision={tmp_path}/tower", "model.text=google-bert/bert-base-uncased", "data.source=$DATA/pairs"]
    load_config([], words).save(model_folder / "train_config.yaml")
    (remark,) = publish(model_folder, "tester/demo", dry_run=True, license="mit").remarks
    assert remark == (
        f"Everybody will read the path {tmp_path}/tower: it is model.vision in train_config.yaml and on the card."
    )


@pytest.mark.parametrize("several", [False, True])
def test_every_path_in_the_published_configuration_is_pointed_out(online, model_folder, tmp_path, several):
    source = f"source: {tmp_path}/pairs.csv, image_root: {tmp_path}/images"
    words = [f"data.source={tmp_path}/pairs.csv", f"data.image_root={tmp_path}/images"]
    if several:
        words = [f"data.source=[{{name: ours, {source}}}, {{name: theirs, source: owner/pairs}}]"]
    words += ["model.vision=a/b", "model.text=c/d", "data.modalities={sound: wave}"]
    words += [f"model.modalities={{sound: {{tower: {tmp_path}/tower}}}}"]
    load_config([], words).save(model_folder / "train_config.yaml")
    done = publish(model_folder, "tester/demo", dry_run=True, license="mit", output=tmp_path / "out")
    written = set(re.findall(rf"{tmp_path}[\w./]*", (tmp_path / "out" / "train_config.yaml").read_text()))
    told = {re.search("Everybody will read the path ([^ ]*): it is", remark)[1] for remark in done.remarks}
    assert told == written == {f"{tmp_path}/{name}" for name in ("pairs.csv", "images", "tower")}
    assert any(f"it is data.image_root{' of ' * several}{several * repr('ours')} in" in text for text in done.remarks)


def test_paths_of_each_source_are_pointed_out(online, model_folder, tmp_path):
    sources = f"data.source=[{{name: ours, source: {tmp_path}/pairs}}, owner/pairs, $DATA/other]"
    load_config([], ["model.vision=a/b", "model.text=c/d", sources]).save(model_folder / "train_config.yaml")
    (remark,) = publish(model_folder, "tester/demo", dry_run=True, license="mit").remarks
    assert remark.startswith(f"Everybody will read the path {tmp_path}/pairs: it is data.source of 'ours' in train_c")


def test_the_card_of_the_folder_is_kept_where_asked(online, model_folder):
    with pytest.raises(FileNotFoundError, match="has no README.md to keep"):
        publish(model_folder, "tester/demo", keep_card=True)
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    publish(model_folder, "tester/demo", keep_card=True)
    assert online.files("tester/demo")["README.md"].endswith(b"mine\n")
    publish(model_folder, "tester/demo", license="cc-by-4.0")
    assert b"license: cc-by-4.0" in online.files("tester/demo")["README.md"]
    assert (model_folder / "README.md").read_text().endswith("mine\n")


def test_only_what_an_export_writes_goes_from_onnx(online, model_folder):
    (model_folder / "onnx").mkdir()
    weights = {"weights": digest_of_weights(model_folder)}
    for name in ("vision_model.onnx", "evil.py", "stolen.pkl", ".env"):
        (model_folder / "onnx" / name).write_text("content")
    (model_folder / "onnx" / "preprocessing.json").write_text(json.dumps(weights))
    done = publish(model_folder, "tester/demo", license="mit")
    sent = {name for name in online.files("tester/demo") if name.startswith("onnx/")}
    assert sent == {"onnx/vision_model.onnx", "onnx/preprocessing.json"} and done.remarks == []
    assert {"onnx/evil.py", "onnx/stolen.pkl", "onnx/.env"} <= set(done.left_out)


def test_figures_and_exports_of_other_weights_stay_at_home(online, model_folder):
    result = {"modality_gap": 0.5, "debiased_modality_gap": 0.4, "true_pair_cosine": 0.3, "margin": 0.2}
    write_metrics(model_folder / "metrics.json", {"demo": result}, {}, "test", {"demo": model_folder})
    (model_folder / "projection.png").write_bytes(b"image")
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
    assert [remark.split(" ")[0] for remark in done.remarks] == ["metrics.json", "onnx/", "The"]  # the card is another
    assert made <= {path.relative_to(model_folder).as_posix() for path in model_folder.rglob("*")}


def test_a_copy_of_what_goes(online, model_folder, tmp_path):
    done = publish(model_folder, "tester/demo", dry_run=True, output=tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(done.changes)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert done.remarks == ["The card names no licence, so nobody may reuse the weights: --license, e.g. apache-2.0."]
    with pytest.raises(FileExistsError, match="copy exists already"):
        publish(model_folder, "tester/demo", dry_run=True, output=tmp_path / "copy")


def test_what_a_killed_publication_left_is_removed_by_the_next(online, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f"{staging._OWN}{process}-abc" for process in (gone.pid, os.getppid(), "no number")]
    for path in left:
        (path / "demo").mkdir(parents=True)
        (path / "demo" / "config.json").write_text("{}")
    publish(model_folder, "demo", dry_run=True)
    assert [path.exists() for path in left] == [False, True, True]
    assert sorted(tmp_path.glob(f"{staging._OWN}*")) == sorted(left[1:])
