"""train.py with push_to_hub: the finished model is published."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from .conftest import ADDED, CODE, ROOT, SAVED
from .loopback_hub import Repository


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


def test_train_py_publishes_the_finished_model(hub, script, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    train = [str(ROOT / "train.py"), "tiny.yaml"]
    code, _, err = script(*train, "hub_model_id=other/tiny")
    assert code == 1 and "gap-closed-clip train: The token is tester's, who can't write to other" in err
    assert not (tmp_path / "outputs").exists()  # said before training
    monkeypatch.delenv("HF_TOKEN")
    code, printed, err = script(*train, "hub_token=hf_loopback")
    assert code == 0, err
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
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: metrics[name] for name in card.data.metrics}
    assert card.data.license == "apache-2.0"
    assert card.data.widget[0]["src"].startswith(f"{hub.url}/tester/tiny/resolve/")
    assert "24 pairs were trained on" in card.text and "- trained on: CPU" in card.text


def test_a_push_that_fails_after_training_names_the_way_out(hub, script, tmp_path, skip_reload):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    hub.broken = "repos/create"
    code, _, err = script(str(ROOT / "train.py"), "tiny.yaml", "max_steps=1")
    assert code == 1 and (tmp_path / "outputs" / "tiny" / "model.safetensors").is_file()
    remedy = (
        "The trained model is safe in outputs/tiny; to publish it: gap-closed-clip publish outputs/tiny tester/tiny"
    )
    assert err.splitlines()[-1] == remedy


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("hub_revision=dev", "training.hub_revision is 'dev', and a publication goes to main"),
        ("hub_strategy=checkpoint", "training.hub_strategy is 'checkpoint', and checkpoints, .* not sent"),
        (
            "hub_strategy=all_checkpoints",
            "training.hub_strategy is 'all_checkpoints', and checkpoints, .* not sent",
        ),
    ],
)
def test_what_a_publication_does_not_do_is_refused_before_training(hub, script, tmp_path, word, told):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    code, _, err = script(str(ROOT / "train.py"), "tiny.yaml", "max_steps=1", word)
    assert code == 1 and re.search(told, err) and not (tmp_path / "outputs").exists() and not hub.requests


def test_a_public_repository_for_a_private_model_is_refused_before_training(hub, script, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    hub.repositories["tester/tiny"] = Repository(private=False)
    hub.repositories["tester/tiny"].commit("by hand", {"README.md": b"Words of mine."})
    code, _, err = script(str(ROOT / "train.py"), "tiny.yaml", "max_steps=1", "hub_private_repo=true")
    assert code == 1 and "tester/tiny is public, and the model is to be private" in err
    assert not (tmp_path / "outputs").exists()


def test_the_remarks_of_a_publication_are_printed_after_training(hub, script, tmp_path, skip_reload):
    (tmp_path / "tiny.yaml").write_text(TINY_RUN.replace("  card_license: apache-2.0\n", ""))
    hub.repositories["tester/tiny"] = Repository(private=True)
    hub.repositories["tester/tiny"].commit("by hand", {"README.md": b"Words of mine."})
    code, printed, err = script(str(ROOT / "train.py"), "tiny.yaml", "max_steps=1", "hub_private_repo=false")
    assert code == 0, err
    license, card, private, outcome = printed.splitlines()[-4:]
    assert license.startswith("The card names no licence") and card.startswith(
        "The card of tester/tiny, README.md, is"
    )
    assert "private, and stays so" in private and outcome.startswith("Published: ")
