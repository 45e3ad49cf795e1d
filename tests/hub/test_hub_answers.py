"""What is said of answers of the Hub that are no success."""

import shutil

import huggingface_hub
import pytest

from gap_closed_clip.hub import publication, publish

from .loopback_hub import Repository


pytestmark = pytest.mark.usefixtures("skip_reload")


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """The client tries again and again, longer and longer."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize(
    ("call", "status", "words", "remedy"),
    [
        ("commit/main", 400, "README.md: invalid base_model", "publish again when that is put right"),
        ("preupload", 403, "Private repository storage limit reached", "Make room there"),
        ("commit/main", 403, "You are banned", "The token may not write there"),
        ("lfs/", 413, "Payload is too large", "publish again when that is put right"),
        ("commit/main", 429, "Slow down", "publish again in a while"),
        ("tree", 503, "We are down for maintenance", "publish again"),
    ],
)
def test_the_words_of_the_hub_are_told(online, model_folder, call, status, words, remedy):
    publish(model_folder, "tester/demo")
    before = dict(online.files("tester/demo"))
    (model_folder / "projection.png").write_bytes(b"image")
    online.refused[call] = (status, words, "")
    with pytest.raises(OSError, match="^tester/demo: the Hub refused, ") as raised:
        publish(model_folder, "tester/demo")
    told = str(raised.value)
    assert ("Bad request" if status == 400 else str(status)) in told
    assert words in told and f" {remedy}" in told and "None" not in told and "\n" not in told
    assert online.files("tester/demo") == before


def test_a_repository_that_the_token_may_not_see(online, model_folder):
    online.repositories["lab/hidden"] = Repository(private=True)
    online.refused["models/lab/hidden"] = (404, "Repository not found", "RepoNotFound")
    with pytest.raises(OSError, match="409.*You already created this.* a token that may read it") as raised:
        publish(model_folder, "lab/hidden")
    assert "Nothing in the repository has changed: publish again." not in str(raised.value)


def test_a_file_that_cannot_be_fetched_names_the_repository(online, model_folder):
    publish(model_folder, "tester/demo")
    online.refused["resolve"] = (503, "down", "")
    with pytest.raises(OSError, match="^tester/demo: the Hub refused, .*503.* publish again"):
        publish(model_folder, "tester/demo")


def test_weights_that_hf_xet_cannot_send_name_the_repository(online, model_folder, monkeypatch):
    """As on the Hub itself, where hf_xet sends large files; other tests are without it."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(
        OSError, match="^tester/demo: the Hub can't be reached .* Nothing in the .* has changed: publish"
    ):
        publish(model_folder, "tester/demo")
    assert len(online.repositories["tester/demo"].commits) == 1  # the empty one of every new repository


def test_of_two_publications_at_a_time_the_later_one_is_not_said_to_have_arrived(online, model_folder, monkeypatch):
    """Both are by the same message."""
    publish(model_folder, "tester/demo")
    theirs = shutil.copytree(model_folder, model_folder.parent / "theirs")
    (theirs / "cosines.png").write_bytes(b"image")
    (model_folder / "projection.png").write_bytes(b"image")
    remote_files = publication._remote_files

    def then_a_colleague_publishes(*args, **kwargs):
        found = remote_files(*args, **kwargs)
        monkeypatch.setattr(publication, "_remote_files", remote_files)
        publish(theirs, "tester/demo")
        return found

    monkeypatch.setattr(publication, "_remote_files", then_a_colleague_publishes)
    with pytest.raises(OSError, match="Somebody else has pushed in the meantime") as raised:
        publish(model_folder, "tester/demo")
    assert "has arrived" not in str(raised.value)
    files = online.files("tester/demo")
    assert "cosines.png" in files and "projection.png" not in files


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        ({}, "404 Client Error: Repository not found. Correct the name; or use a token"),
        ({"resolve": (403, "Access is restricted", "GatedRepo")}, "Ask for access on its page"),
        (
            {"api/models/lab/base": (404, "Invalid rev id", "RevisionNotFound")},
            "Name a revision that is there",
        ),
    ],
)
def test_a_base_that_is_not_there_or_not_open(online, model_folder, refused, told):
    if refused:
        online.repositories["lab/base"] = Repository(private=False)
        online.repositories["lab/base"].commit("base", {"config.json": b"{}"})
        online.refused.update(refused)
    (model_folder / "config.json").unlink()
    (model_folder / "model.safetensors").rename(model_folder / "adapter_model.safetensors")
    (model_folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(OSError, match=f"^lab/base: the Hub refused, .*{told}"):
        publish(model_folder, "tester/adapter", base="lab/base")
