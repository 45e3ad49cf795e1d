"""train() with modalities beyond image and text, by configuration alone."""

import json
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from modality_runs import AUDIO, BINS, FRAMES, RATE, RECORD, RUN, tiny_run, write_table
from safetensors.torch import load_file
from transformers import (
    ASTConfig,
    ASTModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import PairCollator, load_pairs
from gap_closed_clip.evaluation import embed_pairs, evaluate_model, fast_tower
from gap_closed_clip.evaluation.fusion import fusion_weights
from gap_closed_clip.training import load_config, train


@pytest.fixture
def configure(tmp_path):
    """configure("seed=3", ...) -> a tiny run into the folder `run`."""
    return partial(tiny_run, tmp_path)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Folder, configuration and result of a run with records."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "run.yaml").write_text(RUN)
    config = load_config([folder / "run.yaml"], [f"output_dir={folder / 'run'}", RECORD, "final_split=test"])
    return folder / "run", config, train(config)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of a run with image and text alone."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.yaml").write_text(RUN)
    train(load_config([folder / "run.yaml"], [f"output_dir={folder / 'run'}"]))
    return folder / "run"


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


def batch_of(config, processor: GapClosedClipProcessor, split: str = "train", number: int = 6) -> dict:
    pairs = load_pairs(config.data, split)
    return PairCollator(processor)([pairs[row] for row in range(number)])


def embeds_of(model: GapClosedClipModel, batch: dict) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return model.eval()(**batch).embeds


# --- records


def test_the_columns_alone_make_a_record_and_its_tower(records):
    folder, config, _ = records
    model, processor = load_checkpoint(folder)
    assert model.config.modality_names == ("image", "text", "record")
    rows = load_pairs(config.data, "train")["record"]
    ages = [row["age"] for row in rows if row["age"] is not None]
    age, sex, organ, _ = processor.modality_processors["record"].fields
    assert age["mean"] == pytest.approx(statistics.mean(ages)) and age["std"] == pytest.approx(
        statistics.pstdev(ages), rel=0.05
    )
    assert set(sex["categories"]) == {"female", "male"}
    assert set(organ["categories"]) == {row["organ"] for row in rows}
    tower = model.config.modalities["record"]["tower"]
    assert (tower.num_numbers, tower.categories) == (2, [4, 2 + len(organ["categories"])])


def test_the_reloaded_folder_gives_the_metrics_of_the_run(records):
    folder, config, result = records
    again = evaluate_model(*load_checkpoint(folder), load_pairs(config.data, "test"), batch_size=8)
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    assert load_config([folder / "train_config.yaml"]) == config


def test_from_pretrained_and_load_checkpoint_embed_alike(records):
    folder, config, _ = records
    model, processor = load_checkpoint(folder)
    other = GapClosedClipModel.from_pretrained(folder)
    assert GapClosedClipProcessor.from_pretrained(folder).modality_processors == processor.modality_processors
    batch = batch_of(config, processor)
    first, second = embeds_of(model, batch), embeds_of(other, batch)
    assert list(first) == ["image", "text", "record"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_of_queries_are_those_of_the_training_pairs(records):
    folder, config, _ = records
    model, processor = load_checkpoint(folder)
    expected = fusion_weights(embed_pairs(model, processor, load_pairs(config.data, "train")))
    assert model.config.fusion_weights == pytest.approx(expected, abs=1e-3)
    assert list(expected) == ["image", "text", "record"]


def test_training_goes_on_from_its_own_folder_with_its_schema(records, configure):
    folder, _, _ = records
    config = configure(f"checkpoint={folder}", RECORD, "data.phantom_seed=5")
    train(config)
    before, after = (load_checkpoint(path) for path in (folder, config.output_dir))
    assert after[1].modality_processors == before[1].modality_processors
    weights = [model.state_dict() for model, _ in (before, after)]
    assert list(weights[0]) == list(weights[1])
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert "modality_towers.record.tower.number_tokens" in changed


def test_a_record_is_added_to_a_trained_model_of_two_modalities(two, configure):
    config = configure(f"checkpoint={two}", RECORD, "model.modalities.record.tower.hidden_size=32", "learning_rate=0")
    train(config)
    before = load_file(two / "model.safetensors")
    after = load_file(Path(config.output_dir) / "model.safetensors")
    # Running means are taken anew, of the same pairs.
    for name in [name for name in before if "num_batches" not in name]:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)
    assert {name.split(".")[1] for name in after if name not in before} == {"record"}
    assert after["modality_towers.record.tower.number_tokens"].shape == (3, 2, 32)
    assert after["modality_towers.record.tower.number_tokens"].std() == pytest.approx(0.02, rel=0.2)


def test_a_modality_that_the_data_lack_stays_as_it_is(records, configure, caplog):
    folder, _, _ = records
    config = configure(f"checkpoint={folder}", "weight_decay=0.5")
    train(config)
    assert "The model takes record, and data.modalities has none" in caplog.text
    before, after = (load_file(Path(path) / "model.safetensors") for path in (folder, config.output_dir))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("record" in name for name in changed)


def test_frozen_towers_run_once_beside_records_and_missing_samples(table, configure, tmp_path, monkeypatch):
    # Whether a tower runs in bfloat16, whose rounding the weights would show, is found by a trial of the machine.
    monkeypatch.setattr(fast_tower, "cpu_has_bfloat16", lambda: False)
    words = [f"data.source={table}", "data.modalities={record: [age, sex]}", "eval_strategy=no", "report_to=none"]
    # Without dropout, whose masks depend on how often random numbers were drawn before.
    words.append("model.modalities.record.tower.hidden_dropout_prob=0.0")
    frozen = [*words, "freeze_vision=true", "freeze_text=true", "data.augment=false", "optim=sgd"]
    states = {}
    for views in (0, 1):
        folder = tmp_path / f"views-{views}"
        cache = f"data.feature_cache={tmp_path / 'cache'}"
        train(configure(*frozen, f"data.feature_views={views}", f"output_dir={folder}", cache))
        states[views] = load_file(folder / "model.safetensors")
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_bad_record_of_held_out_pairs_is_told_before_training(configure, tmp_path, split):
    noise_image(32, seed=1).save(tmp_path / "0.png")
    rows = [f"0.png,caption {number},{20 + number},train" for number in range(8)]
    rows += [f"0.png,held out {number},{'about sixty' if number == 1 else 50},{split}" for number in range(3)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,age,split", *rows]) + "\n")
    words = [f"data.source={tmp_path / 'pairs.csv'}", "data.modalities={record: [age]}"]
    words += ["eval_strategy=epoch"] if split == "val" else ["eval_strategy=no", "final_split=test"]
    message = (
        f"data.modalities.record, {'validation' if split == 'val' else split} pairs: Record, row 1 .*'about sixty'"
    )
    with pytest.raises(ValueError, match=message):
        train(configure(*words, "save_strategy=steps", "save_steps=1", "max_steps=2"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "metric", ["image_record_recall@10", "mean_over_pairs_debiased_modality_gap", "caption_tells_record[sex]"]
)
def test_a_metric_of_further_modalities_chooses_the_best_model(table, configure, tmp_path, metric):
    words = [f"data.source={table}", "data.modalities={record: [age, sex]}", "data.folds=4", "max_steps=3"]
    words += ["eval_strategy=steps", "eval_steps=1", "eval_grouping=false", "save_strategy=best"]
    train(configure(*words, "load_best_model_at_end=true", f"metric_for_best_model={metric}"))
    states = sorted((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    assert states  # each of them was the best one when it was written
    for state in (json.loads(path.read_text()) for path in states):
        found = [entry[f"eval_{metric}"] for entry in state["log_history"] if "eval_loss" in entry]
        assert state["best_metric"] == (min(found) if "gap" in metric else max(found)) == found[-1]


def test_a_metric_that_no_evaluation_has_is_answered_with_the_nearest_of_all_modalities(table, configure):
    words = [f"data.source={table}", "data.modalities={record: [age, sex]}", "data.folds=4", "eval_strategy=steps"]
    words += ["eval_steps=1", "save_strategy=best", "load_best_model_at_end=true"]
    with pytest.raises(ValueError, match="no 'image_record_recal@10': did you mean 'image_record_recall@10'"):
        train(configure(*words, "metric_for_best_model=image_record_recal@10"))
    with pytest.raises(ValueError, match="no 'text_to_record\\[agee\\]_mae@10'"):
        train(configure(*words, "metric_for_best_model=text_to_record[agee]_mae@10"))


# --- towers of transformers and timm


def test_an_audio_tower_trains_by_configuration_alone(table, configure):
    """ASTModel, tiny and random, on made-up spectrograms: no line of code knows of it."""
    config = configure(f"data.source={table}", "data.modalities={audio: spectrogram}", AUDIO, "eval_strategy=no")
    train(config)
    folder = Path(config.output_dir)
    model, processor = load_checkpoint(folder)
    assert type(model.parts("audio").tower) is ASTModel
    assert json.loads((folder / "processor_config.json").read_text())["modality_processors"]["audio"] == {
        "modality_processor_type": "ArrayProcessor",
        "input_name": "input_values",
        "shape": [FRAMES, BINS],
    }
    batch = batch_of(config, processor)
    assert batch["modality_mask"].tolist() == [
        *[[True] * 3] * 2,
        [True, True, False],
        [True, False, True],
        [False, True, True],
        [True] * 3,
    ]
    first, second = embeds_of(model, batch), embeds_of(GapClosedClipModel.from_pretrained(folder), batch)
    assert all(torch.equal(first[name], second[name]) for name in ("image", "text", "audio"))
    assert first["audio"].norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1, 1, 1])
    # By hand: transformers' own ASTModel with these weights.
    tower = ASTModel(model.config.modalities["audio"]["tower"])
    tower.load_state_dict(model.parts("audio").tower.state_dict())
    with torch.inference_mode():
        pooled = tower.eval()(batch["audio_input_values"]).pooler_output
        projected = model.parts("audio").projection(pooled) - model.parts("audio").centering.running_mean
    expected = torch.nn.functional.normalize(projected, dim=-1)
    torch.testing.assert_close(first["audio"][:2], expected[:2])


def test_a_published_waveform_tower_brings_its_feature_extractor(table, configure, tmp_path):
    torch.manual_seed(0)
    tower = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[8, 8],
            conv_stride=[10, 4],
            conv_kernel=[10, 4],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
        )
    )
    tower.save_pretrained(tmp_path / "tower")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "tower")
    words = ["data.modalities={audio: wave}", f"model.modalities.audio.tower={tmp_path / 'tower'}"]
    config = configure(
        f"data.source={table}", *words, "freeze_modalities=audio", "learning_rate=1e-2", "eval_strategy=no"
    )
    train(config)
    model, processor = load_checkpoint(config.output_dir)
    assert type(processor.modality_processors["audio"]) is Wav2Vec2FeatureExtractor
    kept = model.parts("audio").tower.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tower.state_dict().items())
    assert batch_of(config, processor)["audio_input_values"].shape == (6, RATE)
    assert str(tmp_path) not in (Path(config.output_dir) / "config.json").read_text()


def test_a_published_tower_added_to_a_checkpoint_keeps_its_weights(table, two, configure, tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = ASTModel(ASTConfig(**sizes, max_length=FRAMES, num_mel_bins=BINS))
    tower.save_pretrained(tmp_path / "tower")
    words = ["data.modalities={audio: spectrogram}", f"model.modalities.audio.tower={tmp_path / 'tower'}"]
    train(configure(f"checkpoint={two}", f"data.source={table}", *words, "freeze_modalities=audio", "max_steps=1"))
    model, _ = load_checkpoint(tmp_path / "run")
    kept = model.parts("audio").tower.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tower.state_dict().items())


def test_a_second_view_gets_the_image_processor_of_its_timm_tower(table, configure, tmp_path):
    torch.manual_seed(0)
    architecture = {"architecture": "mobilenetv3_small_050", "model_args": {"img_size": None}}
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="mobilenetv3_small_050")).train()
    for _ in range(30):  # until its statistics are those of its layers: else features vanish, and gradients burst
        tower(torch.rand(8, 3, 64, 64))
    tower.save_pretrained(tmp_path / "tower")
    words = ["data.modalities={lateral: lateral}", f"model.modalities.lateral.tower={tmp_path / 'tower'}"]
    config = configure(f"data.source={table}", *words, "eval_strategy=no", "image_root=/")
    train(config)
    model, processor = load_checkpoint(config.output_dir)
    side = model.parts("lateral").tower.timm_model.pretrained_cfg["input_size"][1]
    assert processor.modality_processors["lateral"].crop_size["height"] == side, architecture
    assert batch_of(config, processor)["lateral_pixel_values"].shape == (6, 3, side, side)
    # BatchNorm of a published tower keeps its statistics.
    fresh = TimmWrapperModel.from_pretrained(tmp_path / "tower").state_dict()
    trained = model.parts("lateral").tower.state_dict()
    assert all(torch.equal(trained[name], fresh[name]) for name in fresh if "running_mean" in name)
    assert any(not torch.equal(trained[name], fresh[name]) for name in fresh)


def test_a_published_spectrogram_tower_is_told_from_one_of_another_size(table, configure, tmp_path):
    ASTModel(
        ASTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_length=FRAMES * 2,
            num_mel_bins=BINS,
        )
    ).save_pretrained(tmp_path / "tower")
    words = ["data.modalities={audio: spectrogram}", f"model.modalities.audio.tower={tmp_path / 'tower'}"]
    with pytest.raises(
        ValueError, match="data.modalities.audio: its tower, a audio-spectrogram-transformer model, can"
    ):
        train(configure(f"data.source={table}", *words, "eval_strategy=no"))


def test_the_objective_compares_with_the_anchor_that_is_set(table, configure):
    words = [f"data.source={table}", "data.modalities={record: [age, sex]}", "eval_strategy=no", "max_steps=1"]
    losses = {}
    for anchor in ("image", "record", "null"):
        config = configure(*words, f"anchor={anchor}", f"output_dir={Path(table).parent / f'run-{anchor}'}")
        train(config)
        model, processor = load_checkpoint(config.output_dir)
        assert model.config.anchor == (None if anchor == "null" else anchor)
        with torch.no_grad():
            losses[anchor] = float(model(**batch_of(config, processor)).align_loss)
    assert len({np.round(value, 6) for value in losses.values()}) == 3
