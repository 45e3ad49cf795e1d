"""The `captioning:` section: what it becomes, and what is said of a wrong one."""

import pytest
import yaml

from gap_closed_clip.training import CaptioningArguments, load_config


DEFAULTS = {
    "decoder_memory": "patches_and_embedding",
    "decoder_embedding_tokens": 4,
    "embedding_noise": 0.0,
    "label_smoothing": 0.1,
    "caption_objective_weight": 0.0,
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedding_tokens=0"], r"^captioning\.embedding_tokens is 0; it must be 1 or more\.$"),
        (["max_new_tokens=0"], r"^captioning\.max_new_tokens is 0; it must be 1 or more\.$"),
        (["num_beams=-1"], r"^captioning\.num_beams is -1; it must be 1 or more\.$"),
        (["noise=-0.5"], r"^captioning\.noise is -0\.5; it must be 0 or more\.$"),
        (["objective_weight=-1"], r"^captioning\.objective_weight is -1; it must be 0 or more\.$"),
        (["label_smoothing=1"], r"^captioning\.label_smoothing is 1; it must be from 0 to below 1\.$"),
        (["label_smoothing=-0.1"], r"^captioning\.label_smoothing is -0\.1; it must be from 0 to below 1\.$"),
        (["train_on=text", "memory=patches_and_embedding"], r"train_on is text, which has no patches: leave capt"),
        (["train_on=text", "encoders=joint"], r"on text alone would leave the images behind\. Use encoders=frozen"),
        (
            ["mean_shift=true"],
            r"mean_shift .* never seen an image: it goes with captioning\.train_on=text",
        ),
        (["decoder={hiden_size: 48}"], r"captioning\.decoder: unknown key 'hiden_size': did you mean 'hidden_size'\?"),
        (["decoder={model_type: gpt2}"], r"captioning\.decoder\.model_type is 'gpt2': .* is of type 'bert'"),
        (["decoder={hidden_size: wide}"], r"captioning\.decoder: .*'hidden_size' expected int, got str"),
        (["decoder=3"], r"captioning\.decoder is 3 \(int\); it has to be str \| dict \| None"),
        (["train_on=images"], r"captioning\.train_on is 'images' .*'image', 'text'"),
        (["memory=patches"], r"captioning\.memory is 'patches' .*'patches_and_embedding', 'embedding'"),
        (["encoders=freeze"], r"captioning\.encoders is 'freeze' .*'frozen', 'joint'"),
        (["noise=loud"], r"captioning\.noise is 'loud' \(str\); it has to be float \| None"),
        (["mean_shift=1"], r"captioning\.mean_shift is 1 \(int\); it has to be bool"),
        (["captioning.train_onn=text"], r"unknown key 'train_onn' in section 'captioning': did you mean 'train_on'\?"),
        (["captionning.noise=1"], r"unknown section 'captionning' in .*: did you mean 'captioning'\?"),
        (["labl_smoothing=0"], r"unknown key 'labl_smoothing': did you mean captioning\.label_smoothing\?"),
        (["captioning.align_weight=1"], r"in section 'captioning': it belongs to the section 'model'"),
        (["model.label_smoothing=0"], r"in section 'model': it belongs to the section 'captioning'"),
        # beside other sections
        (["captioning.noise=1", "lora.rank=4"], r"lora and captioning are both there: train the adapters first"),
        (["predict_with_generate=true"], r"predict_with_generate is true, and nothing writes captions: add a section"),
        (
            ["captioning.noise=1", "contrastive_batch_size=64"],
            r"contrastive_batch_size is for encoders alone: .* set per_device_train_batch_size",
        ),
        (["label_smoothing_factor=0.1"], r"would take the labels from the model: set captioning\.label_smoothing"),
    ],
)
def test_what_is_wrong_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        load_config([], words)


def test_there_is_a_section_where_a_key_of_it_is_given(tmp_path):
    assert load_config([], ["learning_rate=1e-3"]).captioning is None
    assert load_config([], ["captioning.num_beams=3"]).captioning == CaptioningArguments(num_beams=3)
    assert load_config([], ["train_on=text"]).captioning == CaptioningArguments(train_on="text")
    (tmp_path / "empty.yaml").write_text("captioning: {}")
    assert load_config([tmp_path / "empty.yaml"]).captioning == CaptioningArguments()
    changed = load_config([tmp_path / "empty.yaml"], ["captioning.decoder.hidden_size=24", "noise=2"])
    assert changed.captioning == CaptioningArguments(decoder={"hidden_size": 24}, noise=2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["captioning.num_beams=1"], {}),
        (["train_on=text"], {"decoder_memory": "embedding", "embedding_noise": 1.0}),
        (["train_on=text", "noise=0"], {"decoder_memory": "embedding"}),
        (["memory=embedding", "noise=0.5"], {"decoder_memory": "embedding", "embedding_noise": 0.5}),
        (["encoders=joint"], {"caption_objective_weight": 1.0}),
        (["encoders=joint", "objective_weight=0.3"], {"caption_objective_weight": 0.3}),
        (["objective_weight=0.3"], {}),  # frozen encoders have none
        (["embedding_tokens=2", "label_smoothing=0"], {"decoder_embedding_tokens": 2, "label_smoothing": 0}),
    ],
)
def test_fields_of_the_models_configuration(words, expected):
    assert load_config([], words).captioning.config_fields() == DEFAULTS | expected


@pytest.mark.parametrize(
    "words", [[], ["train_on=text", "mean_shift=true", "noise=0.5"], ["captioning.decoder={hidden_size: 24}"]]
)
def test_round_trip_through_train_config(tmp_path, words):
    (tmp_path / "first.yaml").write_text("captioning: {}\nmodel: {checkpoint: outputs/demo}")
    loaded = load_config([tmp_path / "first.yaml"], words)
    loaded.save(tmp_path / "train_config.yaml")
    assert load_config([tmp_path / "train_config.yaml"]) == loaded
    content = yaml.safe_load((tmp_path / "train_config.yaml").read_text())
    assert set(content["captioning"]) == {word.partition("=")[0].removeprefix("captioning.") for word in words}
    (tmp_path / "other.yaml").write_text("model: {checkpoint: outputs/demo}")
    load_config([tmp_path / "other.yaml"]).save(tmp_path / "other_config.yaml")
    assert "captioning" not in (tmp_path / "other_config.yaml").read_text()
