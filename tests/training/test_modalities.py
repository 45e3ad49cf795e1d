"""Modalities beyond image and text in a configuration: what fits, what is refused, and what trains."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, tiny_inputs
from datasets import Dataset
from modality_runs import AUDIO, RECORD, tiny_run, write_table
from peft import PeftConfig

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.training import ModelArguments, train
from gap_closed_clip.training.encoder import build_model_and_processor
from gap_closed_clip.training.fuse import set_fusion_weights
from gap_closed_clip.training.modalities import FurtherColumns
from gap_closed_clip.training.release import set_tower_learning_rate


VISION = {
    "architecture": "eva02_tiny_patch14_224",
    "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 300,
}
ROWS = [
    {"age": 20.0, "sex": "female", "birth": "2000-01-01", "seen": "2020-01-01"},
    {"age": 40.0, "sex": "male", "birth": "1980-01-01", "seen": "2020-01-01"},
    {"age": None, "sex": "male", "birth": "1960-01-01", "seen": "2020-01-01"},
    {"age": 60.0, "sex": None, "birth": None, "seen": None},
]


def records(*columns: str) -> FurtherColumns:
    """The columns of ROWS as training pairs have them."""
    rows = [{"record": {column: row[column] for column in columns}} for row in ROWS]
    return FurtherColumns({"record": list(columns)}, Dataset.from_list(rows))


def inputs_of(number: int) -> dict[str, torch.Tensor]:
    """Random images and texts of a small vocabulary."""
    inputs = tiny_inputs(number)
    return {**inputs, "input_ids": inputs["input_ids"] % 50 + 5}


def build(given: FurtherColumns, **kwargs):
    return build_model_and_processor(ModelArguments(vision=VISION, text=TEXT, **kwargs), CAPTIONS, given)


@pytest.fixture
def configure(tmp_path):
    """configure("seed=3", ...) -> a tiny run into the folder `run`."""
    return partial(tiny_run, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a model with records of age and sex."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model, processor = build(records("age", "sex"), config={"projection_dim": 16})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


# --- what is refused, before training


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["modalities={record: {tower: {hidden_sise: 32}}}"],
            "record.tower: unknown key 'hidden_sise': did you mean 'hidden_size'",
        ),
        (
            ["modalities={record: {tower: {num_numbers: 3}}}"],
            "record.tower.num_numbers: leave it out, training takes it",
        ),
        (
            ["modalities={record: {tower: {hidden_size: 30}}}"],
            "hidden_size is 30: use a multiple of num_attention_heads",
        ),
        (["modalities={record: {towre: {}}}"], "model.modalities.record: unknown key 'towre': did you mean 'tower'"),
        (
            ["modalities={record: 3}"],
            "model.modalities.record is 3: it is a mapping with the keys tower, pooling, fields",
        ),
        (["modalities={record: {tower: 3}}"], "model.modalities.record.tower is 3: name a folder or a Hub id"),
        (["modalities={record: {pooling: max}}"], "record.pooling is 'max': use one of cls, mean, pooler"),
        (["modalities={record: {fields: [age]}}"], "it maps columns of the record to what is to be known of them"),
        (["modalities={image: {}}"], "A modality cannot be called 'image'"),
        (
            ["modalities={audio: {tower: {model_type: audio-spectrogram}}}"],
            "transformers knows no 'audio-spectrogram': did you mean 'audio-",
        ),
        (
            ["modalities={audio: {tower: {model_type: vit, hiden_size: 8}}}"],
            "unknown key 'hiden_size': did you mean 'hidden_size'",
        ),
        (
            ["modalities={lateral: {tower: {architecture: resnet_eightteen}}}"],
            "model.modalities.lateral.tower.architecture: timm .* has no",
        ),
        (["projection_hidden_dim={recrod: 32}"], "projection_hidden_dim has .*: its keys are image, text, record"),
        (["anchor=recrod"], "anchor is 'recrod': use one of image, text, record"),
        (["fusion_weights={image: 1}"], "unknown key 'fusion_weights'"),
    ],
)
def test_a_wrong_description_is_refused_at_once(configure, words, message):
    words = [f"model.{word}" if word.startswith("modalities") else word for word in words]
    with pytest.raises(ValueError, match=message):
        configure(RECORD, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.modalities={record: {}}"],
            "model.modalities.record is described, and data.modalities has no 'record'.",
        ),
        ([RECORD, "model.modalities={recrd: {}}"], "data.modalities has no 'recrd': did you mean 'record'"),
        (
            ["data.modalities={audio: view}"],
            "data.modalities.audio is the column 'view', and nothing says which tower takes",
        ),
        (
            [RECORD, "model.modalities.record.tower=owner/name"],
            "is a list of columns, which is a record: its tower starts",
        ),
        (
            [RECORD, "model.modalities.record.tower={model_type: vit}"],
            "is a list of columns, a record, and the tower of record in model.mo",
        ),
        (
            ["data.modalities={audio: view}", "model.modalities.audio.tower.hidden_size=8"],
            "is the column 'view' and the tower of audio .* a record's",
        ),
        (
            [RECORD, "model.modalities={record: {fields: {ages: {kind: number}}}}"],
            "data.modalities.record has no 'ages': did you mean 'age'",
        ),
        (
            [RECORD, "freeze_modalities=recrod"],
            "model.freeze_modalities: unknown modality 'recrod': did you mean 'record'",
        ),
        (
            ["data.modalities={audio: view}", "model.modalities.audio.tower=./nowhere"],
            "model.modalities.audio.tower: there is no folder nowhere",
        ),
    ],
)
def test_model_and_data_that_do_not_go_together_are_refused(configure, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(configure(*words))


def test_a_decoder_takes_no_further_modalities(configure):
    with pytest.raises(ValueError, match="The section captioning is there, and data.modalities: a decoder writes"):
        configure(RECORD, "captioning.encoders=frozen")


@pytest.mark.parametrize("columns", ["{record: [empty, sex]}", "{audio: empty}"])
def test_a_column_without_a_value_is_named(configure, table, columns):
    words = [AUDIO] if "audio" in columns else []
    with pytest.raises(ValueError, match="data.modalities.*empty|empty.*data.modalities"):
        train(configure(f"data.source={table}", f"data.modalities={columns}", "data.on_missing=skip", *words))


def test_a_modality_that_no_sample_has_is_named():
    rows = [{"audio": None}, {"audio": None}]
    with pytest.raises(ValueError, match="data.modalities.audio: no training pair has a value in spectrogram"):
        FurtherColumns({"audio": "spectrogram"}, Dataset.from_list(rows)).first("audio")


# --- a checkpoint's records


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"age": 3.0}], "other fields: the data lack sex. Its record is of age, sex"),
        (
            [{"age": 3.0, "sex": "male", "place": "arm"}],
            "other fields: the checkpoint knows no place. Its record is of",
        ),
        ([{"age": "old", "sex": "male"}], "do not go together: Record, row 0 .* field 'age'"),
        ([{"age": 3.0, "sex": "m"}, {"age": 4.0, "sex": "f"}], "the checkpoint knows none of the 2 values of 'sex'"),
    ],
)
def test_records_of_another_schema_than_the_checkpoints_are_refused(trained, rows, message):
    given = FurtherColumns({"record": list(rows[0])}, Dataset.from_list([{"record": row} for row in rows]))
    with pytest.raises(ValueError, match=f"data.modalities.record and model.checkpoint {trained} .*{message}"):
        build_model_and_processor(ModelArguments(checkpoint=str(trained)), CAPTIONS, given)


def test_some_unknown_categories_are_told_and_taken(trained, caplog):
    rows = [{"age": 3.0, "sex": "male"}, {"age": 4.0, "sex": "other"}]
    given = FurtherColumns({"record": ["age", "sex"]}, Dataset.from_list([{"record": row} for row in rows]))
    build_model_and_processor(ModelArguments(checkpoint=str(trained)), CAPTIONS, given)
    assert f"1 of 2 values of 'sex' in data.modalities.record are unknown to {trained}" in caplog.text


def test_a_checkpoints_modality_is_not_described_again(trained):
    args = ModelArguments(checkpoint=str(trained), modalities={"record": {"tower": {"hidden_size": 32}}})
    with pytest.raises(
        ValueError, match="model.modalities.record is described, and model.checkpoint .* brings its own"
    ):
        build_model_and_processor(args, CAPTIONS, records("age", "sex"))


def test_a_modality_is_added_behind_those_of_a_checkpoint(trained):
    rows = [{"record": {"age": 3.0, "sex": "male"}, "history": {"birth": "1980-01-01"}}] * 2
    given = FurtherColumns({"history": ["birth"], "record": ["age", "sex"]}, Dataset.from_list(rows))
    with pytest.raises(ValueError, match="data.modalities.history"):  # one date says nothing
        build_model_and_processor(ModelArguments(checkpoint=str(trained)), CAPTIONS, given)
    rows[1] = {"record": {"age": 3.0, "sex": "male"}, "history": {"birth": "1970-01-01"}}
    given = FurtherColumns(given.columns, Dataset.from_list(rows))
    model, processor = build_model_and_processor(ModelArguments(checkpoint=str(trained)), CAPTIONS, given)
    before, old_processor = load_checkpoint(trained)
    assert model.config.modality_names == ("image", "text", "record", "history")
    assert list(processor.modality_processors) == ["record", "history"]
    assert processor.modality_processors["record"] == old_processor.modality_processors["record"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())
    inputs = inputs_of(3)
    with torch.inference_mode():
        assert torch.equal(model.eval()(**inputs).image_embeds, before.eval()(**inputs).image_embeds)


# --- records


def test_fields_say_what_values_do_not():
    sex = {"kind": "category", "categories": ["male", "female"]}
    entry = {"fields": {"birth": {"kind": "date", "relative_to": "seen"}, "sex": sex}}
    model, processor = build(records("birth", "seen", "sex"), modalities={"record": entry})
    record = processor.modality_processors["record"]
    assert model.config.modalities["record"]["tower"].schema == record.digest
    birth, sex = record.fields
    assert birth["relative_to"] == "seen" and birth["mean"] == pytest.approx((20 + 40 + 60) / 3, abs=0.01)
    assert sex["categories"] == ["male", "female"]
    encoded = processor(record=[{key: ROWS[0][key] for key in ("birth", "seen", "sex")}])
    assert encoded["record_numbers"][0, 0] == pytest.approx(-1.2247, abs=0.01)  # (20 - 40) / std of 20, 40 and 60


def test_sizes_of_a_record_tower_come_from_the_configuration_and_its_fields_from_the_data():
    model, _ = build(
        records("age", "sex"), modalities={"record": {"tower": {"hidden_size": 24, "num_hidden_layers": 1}}}
    )
    tower = model.parts("record").tower.config
    assert (tower.hidden_size, tower.num_hidden_layers, tower.num_numbers, tower.categories) == (24, 1, 1, [4])


@pytest.mark.parametrize("column", ["age", "sex"])
def test_a_record_of_numbers_or_categories_alone_gets_every_gradient(column):
    model, processor = build(records(column))
    rows = [{column: row[column]} for row in ROWS]
    inputs = {**inputs_of(4), **processor(record=rows)}
    model.train()(**inputs).loss.backward()
    assert [
        name for name, parameter in model.named_parameters() if parameter.grad is None and parameter.requires_grad
    ] == []


def test_the_towers_rate_is_that_of_published_towers_and_not_of_records(trained):
    model, _ = load_checkpoint(trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    set_tower_learning_rate(optimizer, model, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.1 if name.startswith(("vision_model.", "text_model.")) else 1.0), name
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    set_tower_learning_rate(optimizer, model, 0.1, ["record"])  # as if it were a published one
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slow = {name for name, parameter in model.named_parameters() if rates[id(parameter)] == 0.1}
    assert "modality_towers.record.tower.record_token" in slow and "modality_towers.record.projection.bias" not in slow


@pytest.mark.parametrize(("frozen", "trains"), [([], True), (["record"], False)])
def test_frozen_towers_of_further_modalities_stay_and_their_projections_train(frozen, trains):
    model, _ = build(records("age", "sex"), freeze_modalities=frozen)
    parts = model.train().parts("record")
    assert {p.requires_grad for p in parts.tower.parameters()} == {trains} == {parts.tower.training}
    assert all(p.requires_grad for p in parts.projection.parameters())


@pytest.mark.parametrize("source", ["scratch", "checkpoint", "checkpoint of two"])
def test_adapters_train_beside_a_record_that_is_saved_as_a_whole(configure, trained, source, tmp_path):
    words = ["data.modalities={record: [age, sex]}", "lora.layers=all", "lora.rank=2"]
    if source == "checkpoint":
        words.append(f"checkpoint={trained}")
    elif source == "checkpoint of two":
        for part in build(FurtherColumns()):
            part.save_pretrained(tmp_path / "two")
        words.append(f"checkpoint={tmp_path / 'two'}")
    config = configure(*words)
    train(config)
    folder = Path(config.output_dir)
    assert "modality_towers.record" in PeftConfig.from_pretrained(str(folder)).modules_to_save
    assert (folder / "base").is_dir() == (source != "checkpoint")
    model, processor = load_checkpoint(folder)
    base, _ = load_checkpoint(trained if source == "checkpoint" else folder / "base")
    assert model.config.fusion_weights is not None and base.config.fusion_weights is None
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(model.state_dict()[name], tensor)}
    assert {"modality_towers.record.tower.number_tokens", "modality_towers.record.projection.weight"} <= changed
    assert "vision_model.timm_model.patch_embed.proj.weight" not in changed
    assert processor.modality_processors["record"].field_names == ["age", "sex"]


def test_an_adapter_is_refused_on_a_base_that_lacks_its_modality(configure, tmp_path):
    config = configure("data.modalities={record: [age, sex]}", "lora.layers=all", "lora.rank=2")
    train(config)
    torch.manual_seed(0)
    model, processor = build(FurtherColumns())
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run" / "base")
    with pytest.raises(
        ValueError, match="was trained with the modality record, and its base model .*base has none: put"
    ):
        load_checkpoint(tmp_path / "run")


def test_embeddings_that_are_not_finite_leave_the_weights_of_queries_open(trained, caplog):
    model, processor = load_checkpoint(trained)
    with torch.no_grad():
        model.parts("record").projection.weight.fill_(torch.nan)
    batch = {
        **inputs_of(4),
        **processor(record=[{key: row[key] for key in ("age", "sex")} for row in ROWS]),
        "modality_mask": torch.ones(4, 3, dtype=torch.bool),
    }
    set_fusion_weights(model, [batch])
    assert model.config.fusion_weights is None and "stays open, so all count alike" in caplog.text
