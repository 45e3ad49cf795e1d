"""train() from end to end, on a few phantoms."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import NO_MORE, TINY, configure, finished, tiny  # noqa: F401

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import load_pairs
from gap_closed_clip.evaluation import evaluate_model, read_metrics
from gap_closed_clip.training import GapClosedTrainingArguments, load_config, train
from gap_closed_clip.training.preflight import load_training_pairs


def test_the_model_folder_is_complete_and_holds_no_pickle(finished):
    folder, _, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "train_config.yaml"),
        *(
            "metrics.json",
            "metrics.md",
            "projection.png",
            "cosines.png",
            "checkpoint-2",
            "checkpoint-4",
            "checkpoint-6",
        ),
    }
    assert [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")] == []
    assert list(folder.rglob("events.out.tfevents*")) != []


def test_the_run_can_be_repeated_from_its_own_config(finished):
    folder, config, _ = finished
    assert load_config([folder / "train_config.yaml"]) == config


def test_the_reloaded_model_gives_the_metrics_of_the_folder(finished):
    folder, config, result = finished
    written = read_metrics(folder / "metrics.json")["run"]
    assert written == pytest.approx(result.metrics, nan_ok=True) and written["num_pairs"] == 12
    model, processor = load_checkpoint(folder)
    again = evaluate_model(model, processor, load_pairs(config.data, "test"), batch_size=8)
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    assert json.loads((folder / "metrics.json").read_text())["split"] == "test"
    assert result.num_train_pairs == 24 and result.num_processes == 1


def test_the_validation_pairs_are_evaluated_during_training(finished):
    history = json.loads((finished[0] / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert all(entry["eval_num_pairs"] == 10 and "eval_margin" in entry for entry in evaluations)
    assert [round(entry["align_weight"], 2) for entry in history if "loss" in entry] == [
        1.0,
        1.0,
        1.44,
        2.0,
        2.56,
        3.0,
    ]


# --- pairs and batches that can't be trained on


def test_several_gpus_in_one_process_are_refused(configure, monkeypatch):
    """torch.nn.DataParallel would compare no pair with those of another GPU."""
    monkeypatch.setattr(GapClosedTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs .* `accelerate launch -m gap_closed_clip_cli train"):
        train(configure())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["per_device_train_batch_size=1"], "per_device_train_batch_size is 1: a pair needs other pairs"),
        (
            ["per_device_train_batch_size=32"],
            r"phantoms' has 24 training pairs, fewer than one batch of 32 \(one device\): lower training.per_",
        ),
        (
            ["per_device_train_batch_size=8", "contrastive_batch_size=32"],
            "phantoms' has 24 training pairs, fewer than one batch of 32 .*: lower training.contrastive_batch_size",
        ),
        (
            ["per_device_train_batch_size=8", "contrastive_batch_size=20"],
            "contrastive_batch_size is 20: it has to be a multiple of the 8 pairs",
        ),
        (["auto_find_batch_size=true", "source=nowhere"], r"auto_find_batch_size is true: .* compared \(e.g. 8\)"),
        (["eval_do_concat_batches=false", "source=nowhere"], "eval_do_concat_batches is false: the evaluations rank"),
        (["batch_eval_metrics=true", "source=nowhere"], "batch_eval_metrics is true: the evaluations rank all"),
        (["data.streaming=true", "max_steps=-1"], "data.streaming has no known length: set training.max_steps"),
        (
            ["data.source=[{name: a, source: phantoms}, {name: b, source: phantoms, phantom_train_pairs: 7}]"]
            + ["per_device_train_batch_size=8", "mix_sources=false"],
            "The source 'b' has 7 training pairs, fewer than one batch of 8, and training.mix_sources=false",
        ),
        (
            ["data.source=[{name: a, source: phantoms}, {name: b, source: phantoms}]", "data.streaming=true"]
            + ["mix_sources=false", "max_steps=2"],
            "mix_sources is false and data.streaming is true",
        ),
        (
            ["data.source=[{name: a, source: phantoms}, {name: b, source: phantoms}]", "data.validation_split=null"],
            r"None of the sources 'a', 'b' has a validation split.*needed because of training",
        ),
        (["max_caption_tokens=97"], "max_caption_tokens is 97, but the text tower takes 96 tokens at most"),
        (
            ["vision=null", "source=nowhere"],
            "model.vision is not set: .* without towers goes after",
        ),
        (["eval_strategy=sometimes"], "sometimes.* is not a valid IntervalStrategy"),
    ],
)
def test_what_cannot_be_trained_is_said_before(configure, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train(configure(*words))
    assert not (tmp_path / "run").exists()


def test_captions_that_lose_their_end_are_counted(configure, caplog):
    config = configure(*NO_MORE, "max_caption_tokens=20")
    train(config)
    _, processor = load_checkpoint(config.training["output_dir"])
    lengths = [
        len(processor.tokenizer(caption)["input_ids"]) for caption in load_pairs(config.data, "train")["caption"]
    ]
    long = sum(length > 20 for length in lengths)
    assert 0 < long < 24
    assert f"{long} of 24 training captions are longer than 20 tokens and lose their end." in caplog.text


def test_a_model_cuts_texts_where_its_training_did(finished, configure, tmp_path):
    """... and a later training may take longer ones, as far as the tower goes."""
    train(configure(*NO_MORE, "max_caption_tokens=20"))
    _, processor = load_checkpoint(tmp_path / "run")
    assert len(processor(text="nodule " * 90, truncation=True)["input_ids"]) == 20
    words = [f"checkpoint={tmp_path / 'run'}", "vision=null", "text=null", f"output_dir={tmp_path / 'longer'}"]
    with pytest.raises(ValueError, match="max_caption_tokens is 97, but the text tower takes 96 tokens at most"):
        train(configure(*NO_MORE, *words, "max_caption_tokens=97"))
    train(configure(*NO_MORE, *words, "max_caption_tokens=90"))
    assert load_checkpoint(tmp_path / "longer")[1].tokenizer.model_max_length == 90
    assert load_checkpoint(finished[0])[1].tokenizer.model_max_length == 96  # nothing was asked for


def test_a_folder_that_cannot_be_written_is_found_before_the_data_are_read(configure, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"training.output_dir {folder} can't be written .*: name a folder that can"):
            train(configure(f"output_dir={folder}", "source=nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(configure("source=nowhere"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_stream(configure, tmp_path):
    result = train(configure("data.streaming=true", "max_steps=3", "shuffle_buffer=10"))
    assert result.metrics["num_pairs"] == 12 and result.num_train_pairs is None
    assert (tmp_path / "run" / "model.safetensors").exists()
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["eval_num_pairs"] for entry in state["log_history"] if "eval_loss" in entry] == [10]


def test_a_stream_leaves_out_what_fills_no_batch(configure, tmp_path):
    words = ["data.streaming=true", "eval_strategy=no", "final_split=none", "save_strategy=no"]
    with pytest.raises(ValueError, match="no whole batch of 25: lower training.per_device_train_batch_size"):
        train(configure(*words, "per_device_train_batch_size=25"))
    train(configure(*words, "per_device_train_batch_size=25", "dataloader_drop_last=false", "max_steps=1"))


def test_several_processes_are_refused_to_evaluate_a_stream_during_training(configure, monkeypatch):
    config = configure("data.streaming=true", "source=nowhere")
    args = config.training_arguments()
    monkeypatch.setattr(GapClosedTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="streaming is true and training.eval_strategy is steps.* eval_strategy=no"):
        load_training_pairs(config, args)


def test_without_a_final_evaluation(configure, tmp_path):
    assert train(configure(*NO_MORE)).metrics == {}
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_trained_model_can_be_gone_on_from(finished, configure, tmp_path):
    words = [f"checkpoint={finished[0]}", "vision=null", "text=null", "projection_dim=16", "learning_rate=0.0"]
    train(configure(*NO_MORE, *words, "align_weight=1.5"))
    before, after = (load_file(folder / "model.safetensors") for folder in (finished[0], tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before if "weight" in name)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["align_weight"] == 1.5
