"""Files and overrides to a checked configuration."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from config_files import BASE, write  # noqa: F401

from gap_closed_clip.data import DataArguments
from gap_closed_clip.training import GapClosedTrainingArguments, LoraArguments, ModelArguments, config, load_config
from gap_closed_clip.training.config_fields import NAMES_ELSEWHERE, SECTIONS, fields_of


CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))


def test_sections_become_arguments(write):
    loaded = load_config([write(BASE)])
    assert loaded.model == ModelArguments(
        vision={"architecture": "eva02_tiny_patch14_224", "model_args": {"img_size": 28}},
        text={"hidden_size": 48, "num_attention_heads": 3},
        config={"projection_dim": 64, "align_weight": 2.0},
    )
    assert loaded.data == DataArguments(phantom_train_pairs=100)
    assert loaded.training == {"learning_rate": 0.001, "num_train_epochs": 3}


def test_later_files_and_overrides_win(write):
    second = write("model: {align_weight: 0}\ntraining: {num_train_epochs: 5, seed: 1}", "second.yaml")
    loaded = load_config(
        [write(BASE), second], ["training.seed=2", "data.phantom_train_pairs=7", "model.text=some/id"]
    )
    assert loaded.model.config == {"projection_dim": 64, "align_weight": 0}
    assert loaded.model.text == "some/id"
    assert loaded.data.phantom_train_pairs == 7
    assert loaded.training == {"learning_rate": 0.001, "num_train_epochs": 5, "seed": 2}


def test_bare_keys_go_to_the_section_that_has_them():
    words = ["learning_rate=5e-4", "align_weight=3", "max_pairs=9", "freeze_text=true", "output_dir=outputs/other"]
    loaded = load_config([], words)
    assert loaded.model.config == {"align_weight": 3} and loaded.model.freeze_text is True
    assert loaded.data.max_pairs == 9
    assert loaded.training == {"learning_rate": 0.0005, "output_dir": "outputs/other"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("2E+4", 20000.0), ("-1e-2", -0.01), ("1.5e-3", 0.0015), ("3", 3), ("0.5", 0.5)],
)
def test_numbers(text, value):
    loaded = load_config([], [f"training.learning_rate={text}"]).training["learning_rate"]
    assert loaded == value and type(loaded) is type(value)


def test_no_is_a_word_and_only_true_and_false_are_truth_values():
    loaded = load_config([], ["save_strategy=no", "eval_strategy=no", "streaming=true", "augment=False"])
    assert loaded.training == {"save_strategy": "no", "eval_strategy": "no"}
    assert loaded.data.streaming is True and loaded.data.augment is False
    assert load_config([], ["resume_from_checkpoint=true"]).training["resume_from_checkpoint"] is True
    with pytest.raises(ValueError, match="data.streaming is 'yes'.* has to be bool"):
        load_config([], ["streaming=yes"])


def test_lists_and_mappings_on_the_command_line():
    words = [
        "model.align_weight=[[0.2, 1], [0.7, 2]]",
        "model.text={hidden_size: 12}",
        "report_to=[none]",
        "text=null",
    ]
    loaded = load_config([], words)
    assert loaded.model.config == {"align_weight": [[0.2, 1], [0.7, 2]]}
    assert loaded.model.text is None and loaded.training == {"report_to": ["none"]}


def test_keys_inside_a_field_leave_its_others_as_they_are(write):
    words = [
        "model.vision.model_args.depth=1",
        "vision.model_args.img_size=56",  # the section may be left out, as with fields
        "text.hidden_size=96",
        "text.intermediate_size=64",
        "lora.options.use_rslora=true",
    ]
    loaded = load_config([write(BASE)], words)
    assert loaded.model.vision == {
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"img_size": 56, "depth": 1},
    }
    assert loaded.model.text == {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 64}
    assert loaded.lora.options == {"use_rslora": True}
    assert load_config([], ["vision.architecture=resnet18"]).model.vision == {"architecture": "resnet18"}


def test_training_arguments_are_made_of_the_section_and_our_defaults(tmp_path):
    args = load_config([], [f"output_dir={tmp_path}", "weight_decay=0.5", "report_to=none"]).training_arguments()
    assert type(args) is GapClosedTrainingArguments and args.weight_decay == 0.5
    assert args.dataloader_drop_last is True and args.remove_unused_columns is False and args.distinct_batches is True


def test_fsdp_is_switched_on_by_true_and_not_by_the_old_name_of_its_form(tmp_path, caplog):
    words = [f"output_dir={tmp_path}", "report_to=none", "training.fsdp=true", "training.fsdp_config={version: 2}"]
    args = load_config([], words).training_arguments()
    assert args.fsdp is True and args.fsdp_plugin_args["fsdp_version"] == 2
    assert args.fsdp_plugin_args["reshard_after_forward"] is True  # "full_shard"
    assert "deprecated" not in caplog.text


def test_a_word_has_no_comments_which_a_path_would_be_cut_at():
    words = ["data.source=pairs #2.csv", "output_dir=#3", "data.license='a' # said twice", "seed=3 # not 2"]
    loaded = load_config([], words)
    assert loaded.data.source == "pairs #2.csv" and loaded.training["output_dir"] == "#3"
    assert loaded.data.license == "a" and loaded.training["seed"] == 3


def test_one_name_stands_for_a_list_of_it(write):
    words = ["label_columns=finding", "lora.towers=text", "lora.train=projections", "report_to=none"]
    loaded = load_config([write("data: {label_columns: other}\ntraining: {label_names: a}")], words)
    assert loaded.data.label_columns == ["finding"] and loaded.training["label_names"] == ["a"]
    assert loaded.lora.towers == ["text"] and loaded.lora.train == ["projections"]
    assert loaded.training["report_to"] == "none"  # which takes a text as well
    assert load_config([write("data: {label_columns: other}")]).data.label_columns == ["other"]
    entries = load_config([], ["data.source=[{source: a.csv, label_columns: finding}, b.csv]"]).data.sources()
    assert entries["a"].label_columns == ["finding"] and entries["b"].label_columns is None
    assert DataArguments(label_columns="finding").label_columns == ["finding"]
    assert LoraArguments(towers="vision").towers == ["vision"]


def test_memory_is_pinned_only_for_a_gpu(tmp_path):
    words = [f"output_dir={tmp_path}", "report_to=none"]
    assert load_config([], words).training_arguments().dataloader_pin_memory is torch.accelerator.is_available()
    for value in (True, False):
        args = load_config([], [*words, f"dataloader_pin_memory={str(value).lower()}"]).training_arguments()
        assert args.dataloader_pin_memory is value


def test_a_bare_key_that_two_sections_have(monkeypatch):
    monkeypatch.setitem(config.CONFIG_FIELDS, "seed", int)
    with pytest.raises(
        ValueError, match=r"seed is a field of model and training: write model\.seed or training\.seed"
    ):
        load_config([], ["seed=3"])


def test_checkpoint_and_towers_exclude_each_other(write):
    both = "model: {checkpoint: outputs/demo, vision: outputs/tower}"
    with pytest.raises(ValueError, match="model.checkpoint is 'outputs/demo' and model.vision is set too"):
        load_config([write(both)])
    for words in (["checkpoint=outputs/demo", "vision=a"], ["vision=a", "checkpoint=outputs/demo"]):
        with pytest.raises(ValueError, match="model.checkpoint is 'outputs/demo' and model.vision is set too"):
            load_config([write(BASE)], words)
    loaded = load_config([write(BASE)], ["checkpoint=outputs/demo", "vision=null", "text=null"])
    assert loaded.model.checkpoint == "outputs/demo"


def test_a_checkpoint_given_later_takes_the_place_of_the_towers(write):
    second = "model: {checkpoint: outputs/demo}"
    for loaded in (
        load_config([write(BASE)], ["checkpoint=outputs/demo"]),
        load_config([write(BASE), write(second, "second.yaml")]),
    ):
        assert (loaded.model.checkpoint, loaded.model.vision, loaded.model.text) == ("outputs/demo", None, None)
        # And of what describes the projections, which it brings along; the objective stays.
        before = load_config([write(BASE)]).model.config
        assert loaded.model.config == {name: before[name] for name in before if name != "projection_dim"}
        assert before.keys() - loaded.model.config.keys() == {"projection_dim"}
    assert load_config([write(BASE)], ["checkpoint=null"]).model.vision is not None


def test_folders_of_the_environment(write, tmp_path, monkeypatch):
    """A job's file says where its disk is, as data.source does; a folder of the name `$SCRATCH` was made."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write("model: {checkpoint: ~/base}\ntraining: {output_dir: '${SCRATCH}/run'}\n")
    config = load_config([file])
    assert config.output_dir == str(tmp_path / "scratch" / "run")
    assert config.model.checkpoint == str(tmp_path / "home" / "base")
    assert load_config([file], ["output_dir=$SCRATCH/other"]).output_dir == str(tmp_path / "scratch" / "other")
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ValueError, match=r"training\.output_dir is '\$\{SCRATCH\}/run', but .* SCRATCH is not set"):
        load_config([file])
    with pytest.raises(ValueError, match=r"model\.checkpoint is '\$SCRATCH/base', but .* SCRATCH is not set"):
        load_config([file], ["checkpoint=$SCRATCH/base", "output_dir=here"])


def test_save_and_load_round_trip(write, tmp_path):
    words = ["save_strategy=no", "crop_scale=[0.5, 1]", "text={hidden_size: 12}", "source='Bärlauch: x'"]
    loaded = load_config([write(BASE)], [*words, "model.uniformity_weight=[[0.2, 1], [0.7, 0]]"])
    loaded.save(tmp_path / "saved.yaml")
    again = load_config([tmp_path / "saved.yaml"])
    assert again == loaded
    content = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))
    assert content["data"] == {"source": "Bärlauch: x", "phantom_train_pairs": 100, "crop_scale": [0.5, 1]}
    assert content["model"]["uniformity_weight"] == [[0.2, 1], [0.7, 0]] and "config" not in content["model"]


def test_there_are_configs():
    assert "demo.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_alone_and_over_the_demo(path):
    load_config([path])
    loaded = load_config([path.parent / "demo.yaml", path], ["use_cpu=true", "report_to=none"])
    assert type(loaded.training_arguments()) is GapClosedTrainingArguments


def test_the_objectives_of_others_have_their_papers_values():
    folder = CONFIGS[0].parent
    fields = load_config([folder / "demo.yaml", folder / "contrastive_gap.yaml"]).model.config
    weights = {name: value for name, value in fields.items() if name.endswith("_weight")}
    ones = dict.fromkeys(("align_weight", "modality_uniformity_weight", "cross_uniformity_weight"), 1.0)
    assert weights == {"uniformity_weight": 0.0, **ones}
    fields = load_config([folder / "demo.yaml", folder / "siglip_objective.yaml"]).model.config
    assert fields["contrastive_loss"] == "sigmoid" and (fields["align_weight"], fields["uniformity_weight"]) == (0, 0)
    assert math.exp(fields["logit_scale_init_value"]) == pytest.approx(10, rel=1e-6) and fields["logit_bias"] == -10
    assert load_config([], ["cross_uniformity_weight=[[0.2, 1], [0.7, 0]]"]).model.config == {
        "cross_uniformity_weight": [[0.2, 1], [0.7, 0]]
    }


def test_another_source_leaves_the_license_and_the_subset_of_the_first_behind(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: {source: a.csv, license: cc0}")
    second.write_text("data: {source: b.csv}")
    assert load_config([first]).data.license == "cc0"
    assert load_config([first, second]).data.license is None
    assert load_config([first], ["data.source=b.csv"]).data.license is None
    assert load_config([first], ["data.license=mit", "data.source=b.csv"]).data.license == "mit"
    assert load_config([first], ["data.max_pairs=3"]).data.license == "cc0"
    assert load_config([], ["data.source=owner/name", "data.subset=en"]).data.subset == "en"
    third = tmp_path / "third.yaml"
    third.write_text("data: {source: owner/name, subset: en}")
    assert load_config([third, second]).data.subset is None


def test_another_source_leaves_the_folds_of_the_first_behind(write):
    first = write("data: {source: a.csv, folds: 5, fold: 2}", "first.yaml")  # as a folder's own configuration has them
    alone = write("data: {folds: 5, fold: 2}", "alone.yaml")  # of no source
    second = write("data: {source: b.csv}", "second.yaml")

    def folds(files, *words):
        data = load_config(files, words).data
        return data.folds, data.fold

    assert folds([first, second]) == folds([first], "data.source=b.csv") == (None, 0)
    assert folds([first]) == folds([first], "data.source=a.csv") == folds([first], "data.max_pairs=3") == (5, 2)
    assert folds([first], "data.source=b.csv", "data.folds=3") == (3, 0)
    assert folds([alone, second]) == folds([alone], "data.source=b.csv") == (5, 2)
    assert folds([second, alone], "data.source=c.csv") == (5, 2)


# --- lists of sources


SOURCES = [{"name": "a", "source": "x/a.csv", "license": "cc0", "label_columns": ["kind"]}, {"source": "owner/b"}]


def test_a_list_of_sources_is_read_and_saved(write, tmp_path):
    loaded = load_config([write(yaml.safe_dump({"data": {"source": SOURCES, "label_columns": ["other"]}}))])
    named = [SOURCES[0], {"name": "b", "source": "owner/b"}]
    assert loaded.data.source == named and loaded.described_data()["source"] == named
    loaded.save(tmp_path / "saved.yaml")
    again = load_config([tmp_path / "saved.yaml"])
    assert again == loaded and again.data.sources()["a"].label_columns == ["kind"]
    assert DataArguments(**loaded.described_data()) == loaded.data


def test_a_list_of_sources_on_the_command_line(write):
    words = ["data.source=[{name: a, source: x.csv, validation_split: null}, $ROOT/b]", "mix_sources=false"]
    loaded = load_config([write("data: {source: y.csv, license: cc0}")], words)
    assert loaded.data.source == [
        {"name": "a", "source": "x.csv", "validation_split": None},
        {"name": "b", "source": "$ROOT/b"},
    ]
    assert loaded.data.license is None  # it was that of another source
    assert loaded.training["mix_sources"] is False


def test_captioners_have_no_batches_of_one_source():
    with pytest.raises(ValueError, match="training.mix_sources is for encoders alone"):
        load_config(["captioning"], ["checkpoint=x", "mix_sources=false"])


def test_the_list_of_the_page_is_read(write):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL) if "source:" in block]
    loaded = load_config([write(text)])
    assert list(loaded.data.sources()) == ["medpix2", "vqamed2019", "mine", "ROCOv2-radiology"]
    assert loaded.data.sources()["mine"].caption_column == "report" and loaded.training == {"mix_sources": True}


@pytest.mark.parametrize(("elsewhere", "meant"), NAMES_ELSEWHERE.items())
def test_names_of_elsewhere_are_none_here_and_mean_fields(elsewhere, meant):
    section, field = meant.split()[0].split(".")
    assert field in fields_of(section)
    assert not any(elsewhere in fields_of(each) for each in SECTIONS)
