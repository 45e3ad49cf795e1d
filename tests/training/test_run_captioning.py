"""train() of a captioner from end to end, on a few phantoms: from images, and from text alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from captioners import caption_config, train_encoder, train_pairs
from datasets import Dataset
from safetensors.torch import load_file
from test_run import NO_MORE

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_captioner, load_checkpoint
from gap_closed_clip.data import PairCollator, load_pairs
from gap_closed_clip.evaluation import evaluate_captioner, generate_captions, read_metrics
from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.caption_features import embed_captions_once


RUN = ["predict_with_generate=true", "num_beams=2", "eval_steps=3"]
WORDS = {"image": [*RUN], "text": [*RUN, "train_on=text", "mean_shift=true"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return train_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module", params=list(WORDS))
def finished(request, encoder, tmp_path_factory):
    """Folder, configuration and result of a run."""
    config = caption_config(encoder, tmp_path_factory.mktemp(request.param) / "run", *WORDS[request.param])
    result = train(config)
    return config.training["output_dir"], config, result


@pytest.fixture
def configure(encoder, tmp_path):
    return lambda *words: caption_config(encoder, tmp_path / "run", *words)


def folder_of(config):
    return Path(config.training["output_dir"])


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


# --- the model folder


def test_the_model_folder_is_complete_and_holds_no_pickle(finished):
    folder = folder_of(finished[1])
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"),
        *("captioning_gap_closed_clip.py", "decoder_gap_closed_clip.py", "modeling_gap_closed_clip.py"),
        *("train_config.yaml", "run.json", "metrics.json", "metrics.md", "captions.jsonl", "captions.png"),
        *("checkpoint-2", "checkpoint-4", "checkpoint-6"),
    }
    assert [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")] == []
    assert load_config([folder / "train_config.yaml"]) == finished[1]
    facts = json.loads((folder / "run.json").read_text())
    assert facts == {"num_train_pairs": 24, "device": "CPU", "num_processes": 1}


def test_the_generation_config_is_the_sections(finished):
    written = json.loads((folder_of(finished[1]) / "generation_config.json").read_text())
    _, processor = load_checkpoint(finished[0])
    del written["transformers_version"]
    assert written == {
        "bos_token_id": processor.tokenizer.cls_token_id,
        "eos_token_id": processor.tokenizer.sep_token_id,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "max_new_tokens": 47,
        "num_beams": 2,
    }


def test_the_encoder_is_as_it_was_and_the_decoder_is_not(finished, encoder):
    before, after = weights(encoder), weights(finished[0])
    own = {name for name in after if name.startswith("gap_closed_clip.")}
    assert own == {f"gap_closed_clip.{name}" for name in before}
    assert all(torch.equal(after[f"gap_closed_clip.{name}"], before[name]) for name in before)
    words = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(after[f"decoder.{words}"], before[words.replace("bert", "text_model")])


def test_only_encoders_that_train_along_get_the_limit_of_the_captions(finished, encoder, configure):
    _, before = load_checkpoint(encoder)
    assert before.tokenizer.model_max_length > 48 == finished[1].data.max_caption_tokens
    assert load_captioner(finished[0])[1].tokenizer.model_max_length == before.tokenizer.model_max_length
    config = configure(*NO_MORE, "encoders=joint")
    train(config)
    assert load_captioner(folder_of(config))[1].tokenizer.model_max_length == 48
    longer = [f"checkpoint={folder_of(config)}", f"output_dir={folder_of(config).parent / 'longer'}"]
    train(configure(*NO_MORE, *longer, "max_caption_tokens=60"))
    assert load_captioner(folder_of(config).parent / "longer")[1].tokenizer.model_max_length == 60


def test_the_reloaded_captioner_writes_the_captions_of_the_folder(finished):
    folder, config, result = finished
    pairs = load_pairs(config.data, "test")
    model, processor = load_captioner(folder)
    metrics, captions = evaluate_captioner(model, processor, pairs, batch_size=5, max_length=48)
    assert metrics == pytest.approx(result.metrics, abs=1e-6)
    assert read_metrics(f"{folder}/metrics.json") == {"run": pytest.approx(metrics, abs=1e-6)}
    rows = [json.loads(line) for line in (folder_of(config) / "captions.jsonl").read_text().splitlines()]
    assert [row["captions"] for row in rows] == [{"run": caption} for caption in captions.captions]
    assert [row["image_id"] for row in rows] == list(dict.fromkeys(pairs["image_id"]))
    assert metrics["num_images"] == len(rows) and metrics["clip_score"] > 0


def test_the_validation_pairs_are_evaluated_during_training(finished):
    state = json.loads((folder_of(finished[1]) / "checkpoint-6" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert all({"eval_cider_d", "eval_coco_bleu_4", "eval_caption_words"} <= entry.keys() for entry in evaluations)


# --- resuming


def test_a_killed_run_goes_on_and_ends_where_the_unbroken_one_did(finished, tmp_path, encoder):
    folder, config, result = finished
    for number in (2, 4):
        shutil.copytree(f"{folder}/checkpoint-{number}", tmp_path / "run" / f"checkpoint-{number}")
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text("{")  # it was killed writing this one
    words = WORDS[config.captioning.train_on]
    again = train(caption_config(encoder, tmp_path / "run", *words, "resume_from_checkpoint=true"))
    expected, found = weights(folder), weights(tmp_path / "run")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert again.metrics == result.metrics


# --- from text alone


def test_no_image_is_decoded_in_training_on_text(configure, monkeypatch):
    def decode(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("gap_closed_clip.data.collator.decode_image", decode)
    train(configure(*NO_MORE, "train_on=text"))
    with pytest.raises(AssertionError, match="an image was decoded"):
        train(configure(*NO_MORE, "overwrite_output_dir=true", "data.feature_views=0"))


def test_embeddings_of_the_captions_are_the_encoders_own(encoder, configure):
    pairs = train_pairs(configure())
    model, processor = load_checkpoint(encoder)
    model.double()  # in float32 centering makes the rounding of padded batches larger than what is looked for
    captioner = torch.nn.Module()
    captioner.gap_closed_clip, captioner.device = model, model.device
    embedded = embed_captions_once(pairs, captioner, PairCollator(processor), batch_size=5)
    for caption, embeds in zip(pairs["caption"], embedded["shared_embeds"], strict=True):
        with torch.no_grad():
            expected = model(**processor(text=caption, return_tensors="pt")).text_embeds[0]
        torch.testing.assert_close(torch.tensor(embeds), expected.float(), rtol=0, atol=1e-6)
    assert torch.tensor(embedded["shared_embeds"]).std(dim=0).min() > 0.01
    assert embedded.column_names == [*pairs.column_names, "shared_embeds"]
    assert embedded["image_id"] == pairs["image_id"]


def test_the_mean_shift_is_that_of_the_training_pairs(encoder, configure):
    """Naively, and over pairs: an image or a caption of several pairs counts several times."""
    config = configure(*NO_MORE, "train_on=text", "mean_shift=true")
    train(config)
    model, processor = load_checkpoint(encoder)
    text, image = [], []
    with torch.no_grad():
        for row in train_pairs(config):
            batch = PairCollator(processor, max_length=48)([row])
            batch.pop("group_ids")
            outputs = model(**batch)
            text.append(outputs.text_embeds[0].numpy())
            image.append(outputs.image_embeds[0].numpy())
    expected = np.mean(text, axis=0) - np.mean(image, axis=0)
    assert np.linalg.norm(expected) > 0.05
    np.testing.assert_allclose(weights(folder_of(config))["memory.image_shift"], expected, rtol=0, atol=5e-5)


def test_checkpoints_have_the_mean_shift_and_a_run_that_goes_on_without_it_does_not(configure, tmp_path):
    config = configure("train_on=text", "mean_shift=true", "save_strategy=steps", "save_steps=1", "max_steps=1")
    train(config)
    shift = weights(folder_of(config))["memory.image_shift"]
    assert shift.any() and (weights(folder_of(config) / "checkpoint-1")["memory.image_shift"] == shift).all()
    again = caption_config(folder_of(config), tmp_path / "again", *NO_MORE, "train_on=text", "memory=embedding")
    train(again)
    assert not weights(folder_of(again))["memory.image_shift"].any()


def test_without_it_there_is_no_mean_shift(configure):
    config = configure(*NO_MORE, "train_on=text")
    train(config)
    assert not weights(folder_of(config))["memory.image_shift"].any()
    model, _ = load_captioner(folder_of(config))
    assert (model.config.decoder_memory, model.config.embedding_noise) == ("embedding", 1.0)


# --- encoders that train along


def test_joint_training_changes_the_encoders(configure, encoder):
    config = configure(*NO_MORE, "encoders=joint")
    train(config)
    before, after = weights(encoder), weights(folder_of(config))
    for part in ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale"):
        names = [name for name in before if part in name and before[name].is_floating_point()]
        assert any(not torch.equal(before[name], after[f"gap_closed_clip.{name}"]) for name in names), part


def test_after_joint_training_the_centre_is_that_of_the_training_pairs(configure):
    config = configure(*NO_MORE, "encoders=joint", "center_projections=true")
    train(config)
    model, processor = load_checkpoint(config.training["output_dir"])
    rows = list(train_pairs(config))
    batch = PairCollator(processor, max_length=48)(rows)
    batch.pop("group_ids")
    with torch.no_grad():
        image = model.get_image_features(batch.pop("pixel_values")).pooler_output
        text = model.get_text_features(**batch).pooler_output
    assert image.mean(0).abs().max() < 1e-4 and text.mean(0).abs().max() < 1e-4
    assert image.std(0).mean() > 1e-3


def test_the_objective_is_part_of_the_joint_loss(configure, encoder):
    """What a weight adds to the logged loss is the encoder's own loss of the batch, here of all pairs."""
    losses = {}
    for weight in (0.5, 2.0):
        words = ["encoders=joint", f"objective_weight={weight}", "per_device_train_batch_size=24", "augment=false"]
        config = configure(*NO_MORE, *words, "save_strategy=steps", "save_steps=1", "overwrite_output_dir=true")
        train(config)
        state = json.loads((folder_of(config) / "checkpoint-1" / "trainer_state.json").read_text())
        losses[weight] = state["log_history"][0]["loss"]
    _, processor = load_checkpoint(encoder)
    model = GapClosedClipModel.from_pretrained(encoder).train()  # it centres by the batch's own means
    model.set_training_progress(0.0)
    expected = model(**PairCollator(processor, max_length=48)(list(train_pairs(config)))).loss.item()
    assert (losses[2.0] - losses[0.5]) / 1.5 == pytest.approx(expected, abs=2e-3)
    assert losses[0.5] - 0.5 * expected == pytest.approx(np.log(300), abs=0.5)  # an untrained decoder's


# --- what cannot be trained is said before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train_on=text", "data.streaming=true"],
            "data.streaming and captioning.train_on=text: .*Leave streaming off",
        ),
        (["auto_find_batch_size=true", "encoders=joint"], "auto_find_batch_size is true: "),
        (["per_device_train_batch_size=1", "encoders=joint"], "per_device_train_batch_size is 1: a pair needs other"),
        (["max_new_tokens=96"], "captioning.max_new_tokens is 96, but the decoder takes 96 tokens"),
        (["max_caption_tokens=97"], "max_caption_tokens is 97, but the decoder takes 96 tokens at most"),
        (["captioning.decoder.max_position_embeddings=40", "max_new_tokens=9"], "is 48, but the decoder takes 40"),
        (["checkpoint=null"], "model.vision is not set"),
    ],
)
def test_what_cannot_be_trained_is_said_before(configure, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train(configure(*words))
    assert not (tmp_path / "run").exists()


# --- other ways


def test_one_image_at_a_time(configure):
    """Captions of frozen encoders are not compared with one another."""
    words = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    train(configure(*NO_MORE, *words, "auto_find_batch_size=true"))


def test_a_stream(configure):
    config = configure("data.streaming=true", "max_steps=2", "shuffle_buffer=10", *RUN, "eval_steps=2")
    result = train(config)
    pairs = load_config([folder_of(config) / "train_config.yaml"], ["data.streaming=false"])
    model, processor = load_captioner(folder_of(config))
    expected = generate_captions(model, processor, load_pairs(pairs.data, "test"))
    assert isinstance(load_pairs(pairs.data, "test"), Dataset) and result.num_train_pairs is None
    rows = [json.loads(line) for line in (folder_of(config) / "captions.jsonl").read_text().splitlines()]
    assert [row["captions"]["run"] for row in rows] == expected.captions
    assert not (folder_of(config) / "captions.png").exists()


def test_a_trained_captioner_can_be_gone_on_from(finished, tmp_path):
    words = ["learning_rate=0.0", "label_smoothing=0", "num_beams=1"]
    if finished[1].captioning.train_on == "text":
        words += ["train_on=text", "mean_shift=true"]
    config = caption_config(finished[0], tmp_path / "run", *NO_MORE, *words)
    train(config)
    before, after = weights(finished[0]), weights(folder_of(config))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder_of(config) / "config.json").read_text())["label_smoothing"] == 0
