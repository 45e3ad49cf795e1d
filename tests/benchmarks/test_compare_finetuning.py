"""That the ways of fine-tuning which are compared differ in what trains, and that finished runs are kept."""

from dataclasses import asdict, replace

import comparison
import pytest
import torch
from compare_finetuning import METHODS, best_rate, mean_recall, parameters
from comparison import CONFIGS, run_once
from conftest import tiny_config

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.training import RunConfig, add_adapters, load_config


# What a method may change of a configuration.
WHAT_TRAINS = {"freeze_vision": False, "freeze_text": False}


@pytest.fixture
def config(tmp_path, tiny_processor) -> RunConfig:
    """configs/lora.yaml on a tiny base model."""
    torch.manual_seed(0)
    GapClosedClipModel(tiny_config(center_projections=True)).save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    return load_config([CONFIGS / "lora.yaml"], [f"model.checkpoint={tmp_path / 'base'}", "use_cpu=true"])


@pytest.mark.parametrize("name", METHODS)
def test_methods_differ_in_what_trains_alone(config, name):
    changed = METHODS[name].change(config)
    assert asdict(replace(changed.model, **WHAT_TRAINS)) == asdict(config.model)
    assert (changed.data, changed.training) == (config.data, config.training)
    if changed.lora is not None:
        assert replace(changed.lora, towers=config.lora.towers) == config.lora


def test_number_of_parameters(config):
    model = GapClosedClipModel(tiny_config(center_projections=True))
    everything = sum(p.numel() for p in model.parameters())
    found = {name: parameters(method.change(config)) for name, method in METHODS.items()}
    assert {total for _, total in found.values()} == {everything}
    projections = 2 * (48 * 32 + 32) + 1
    text = sum(p.numel() for p in model.text_model.parameters())
    assert found["projections"][0] == projections
    assert found["full"][0] == everything
    assert found["full, image tower"][0] == everything - text
    # rank 8: an adapter has 8 * (inputs + outputs) parameters; a BERT layer of width 48 has six linear ones
    adapters = 8 * (4 * (48 + 48) + 2 * (48 + model.config.text_config.intermediate_size))
    assert found["LoRA"][0] - found["LoRA, image tower"][0] == adapters
    assert projections < found["LoRA, image tower"][0] < found["LoRA"][0]


def test_at_most_five_percent_train_with_the_papers_towers():
    vision = {"model_type": "timm_wrapper", "architecture": "eva_giant_patch14_clip_224"}
    with torch.device("meta"):
        model = GapClosedClipModel(GapClosedClipConfig(vision_config=vision, text_config={"model_type": "bert"}))
        everything = sum(p.numel() for p in model.parameters())
        trained = add_adapters(model, load_config([CONFIGS / "lora.yaml"]).lora, None, None)
    assert 0 < sum(p.numel() for p in trained.parameters() if p.requires_grad) < 0.05 * everything


def test_a_finished_run_is_repeated_only_with_other_settings(config, tmp_path, monkeypatch):
    trained = []

    def train(config: RunConfig) -> None:
        trained.append(config)
        folder = tmp_path / "run"
        write_metrics(folder / "metrics.json", {"run": {"margin": float(len(trained))}}, {}, "validation")
        config.save(folder / "train_config.yaml")

    monkeypatch.setattr(comparison, "train", train)
    config = METHODS["projections"].change(config)
    assert run_once(config, tmp_path / "run") == run_once(config, tmp_path / "run") == {"margin": 1.0}
    other = replace(config, training={**config.training, "num_train_epochs": 2})
    assert run_once(other, tmp_path / "run") == {"margin": 2.0}
    assert [c.training["output_dir"] for c in trained] == 2 * [str(tmp_path / "run")]
    # One without a note of its pairs is taken as it is; from then on other pairs are trained on.
    assert [run_once(other, tmp_path / "run", pairs)["margin"] for pairs in "aabba"] == [2.0, 2.0, 3.0, 3.0, 4.0]


def test_a_run_that_evaluates_nothing_is_finished_once_it_has_noted_what_it_was(config, tmp_path, monkeypatch):
    trained = []

    def train(config: RunConfig) -> None:
        trained.append(config)
        config.save(tmp_path / "run" / "train_config.yaml")
        if len(trained) > 1:  # the first one is killed before
            (tmp_path / "run" / "run.json").write_text("{}")

    monkeypatch.setattr(comparison, "train", train)
    config = replace(config, training={**config.training, "final_split": "none"})
    (tmp_path / "run").mkdir()
    assert [(run_once(config, tmp_path / "run"), len(trained)) for _ in range(3)] == [({}, 1), ({}, 2), ({}, 2)]


def test_the_rate_with_the_highest_mean_recall_is_chosen():
    metrics = {"text_to_image_recall@1": 0.1, "image_to_text_recall@10": 0.3, "margin": 9.0}
    assert mean_recall(metrics) == pytest.approx(0.2)
    assert best_rate({1e-4: metrics, 1e-3: {**metrics, "text_to_image_recall@1": 0.2, "margin": 0.0}}) == 1e-3
