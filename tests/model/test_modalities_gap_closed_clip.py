"""Models of more than two modalities: a record, sounds, a second image tower."""

import json

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from modalities import RECORD, modalities_config, modalities_inputs
from transformers import ASTConfig, ASTModel, AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.micro_batches_gap_closed_clip import MicroBatches
from gap_closed_clip.model.modalities_gap_closed_clip import inputs_by_modality, pairs_of
from gap_closed_clip.model.modality_processing_gap_closed_clip import encode_modality
from gap_closed_clip.model.record_tower_gap_closed_clip import GapClosedClipRecordConfig, GapClosedClipRecordTower


@pytest.fixture
def model() -> GapClosedClipModel:
    torch.manual_seed(0)
    return GapClosedClipModel(modalities_config(center_projections=True)).eval()


def test_each_modality_is_its_tower_projected_and_centered(model):
    """By hand, from the parts; the audio tower is transformers' own."""
    inputs = modalities_inputs()
    model.parts("audio").centering.running_mean.normal_()
    outputs = model(**inputs)
    assert list(outputs.embeds) == ["image", "text", "record", "audio"] == list(model.config.modality_names)
    assert type(model.modality_towers["audio"].tower) is ASTModel
    tower, projection, centering, _ = model.parts("audio")
    pooled = tower(inputs["audio_input_values"]).pooler_output
    projected = projection(pooled) - centering.running_mean
    expected = projected / projected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(outputs.embeds["audio"], expected)
    features = model.get_features("audio", input_values=inputs["audio_input_values"]).pooler_output
    torch.testing.assert_close(features, projected)
    del inputs["audio_input_values"]
    again = model(**inputs, pooled_audio=pooled)
    torch.testing.assert_close(again.loss, outputs.loss)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_a_sound_is_embedded_alone_as_beside_a_longer_one(family):
    """The mean over a sound's tokens is without those of the padding, of which the tower's tokens have fewer."""
    torch.manual_seed(0)
    convolutions = {"conv_dim": [8, 8], "conv_stride": [10, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    tower = AutoConfig.for_model(family, **convolutions, **sizes, **positions, feat_extract_norm="layer")
    model = GapClosedClipModel(tiny_config(modalities={"audio": {"tower": tower}})).eval()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    sounds = [torch.randn(length).numpy() for length in (803, 2000, 1204)]
    together = model(**encode_modality("audio", extractor, sounds)).embeds["audio"]
    for sound, expected in zip(sounds, together, strict=True):
        alone = encode_modality("audio", extractor, [sound])
        torch.testing.assert_close(model(**alone).embeds["audio"][0], expected, rtol=0, atol=1e-6)
        mean = model.parts("audio").tower(alone["audio_input_values"]).last_hidden_state.mean(1)
        torch.testing.assert_close(model(pooled_audio=mean).embeds["audio"][0], expected, rtol=0, atol=1e-6)


def test_images_and_texts_are_those_of_a_model_without_the_others(model):
    two = GapClosedClipModel(tiny_config(center_projections=True)).eval()
    two.load_state_dict({name: value for name, value in model.state_dict().items() if "modality_towers" not in name})
    inputs, outputs = tiny_inputs(), model(**modalities_inputs())
    expected = two(**inputs)
    for found in (outputs, model(**inputs)):  # beside the others, and alone
        assert torch.equal(found.image_embeds, expected.image_embeds)
        assert torch.equal(found.text_embeds, expected.text_embeds)
    assert torch.equal(model(**inputs).loss, expected.loss)
    assert model(**inputs).further_embeds is None


@pytest.mark.parametrize("anchor", ["image", "record", None])
def test_the_loss_compares_the_anchor_with_each_or_every_two(anchor):
    torch.manual_seed(0)
    model = GapClosedClipModel(modalities_config(anchor=anchor, uniformity_weight=0.0)).eval()
    outputs = model(**modalities_inputs())
    z, scale = outputs.embeds, model.temperature()
    names = list(z)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if anchor is None or anchor in (a, b)]
    target = torch.arange(4)
    contrastive, align = [], []
    for a, b in pairs:
        logits = scale * z[a] @ z[b].T
        contrastive.append((torch.nn.functional.cross_entropy(logits, target)
                            + torch.nn.functional.cross_entropy(logits.T, target)) / 2)  # fmt: skip
        align.append((z[a] - z[b]).square().sum(-1).mean())
    torch.testing.assert_close(outputs.contrastive_loss, torch.stack(contrastive).mean())
    torch.testing.assert_close(outputs.align_loss, torch.stack(align).mean())


def test_what_a_sample_lacks_is_a_row_of_zeros_and_moves_nothing(model):
    """Also where NaN stands in its place; the loss of the others is that of a batch without it."""
    model.train()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 3] = False
    results = []
    for filler in (0.0, 7.0):
        inputs = modalities_inputs()
        inputs["record_numbers"][1] = filler
        inputs["audio_input_values"][3] = filler
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        outputs = model(**inputs, modality_mask=mask if filler else mask.long())
        outputs.loss.backward()
        assert outputs.embeds["record"][1].abs().sum() == 0 == outputs.embeds["audio"][3].abs().sum()
        assert torch.equal(outputs.modality_mask.bool(), mask)
        results.append(
            [outputs.loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_micro_batches_give_the_same_loss_and_gradients(model):
    model.train()
    inputs = {
        **modalities_inputs(6),
        "modality_mask": torch.rand(6, 4) > 0.2,
        "group_ids": torch.tensor([0, 1, 2, 2, 4, 5]),
    }
    inputs["modality_mask"][:, :2] = True
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    found = []
    for whole in (True, False):
        config = modalities_config(center_projections=True)
        config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
        copy = GapClosedClipModel(config).train()
        copy.load_state_dict(model.state_dict())
        copy.double()
        outputs = copy(**inputs) if whole else copy(micro_batches=MicroBatches.split(inputs, 2))
        outputs.loss.backward()
        found.append([outputs.loss, *(p.grad for p in copy.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 50
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-7)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [entry["name"] for entry in config["modalities"]] == ["record", "audio"]
    record, audio = (entry["tower"] for entry in config["modalities"])
    assert record["categories"] == [4, 3] and audio["model_type"] == "audio-spectrogram-transformer"
    for again in (GapClosedClipModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        again.eval()
        inputs = modalities_inputs()
        for name, embeds in model(**inputs).embeds.items():
            assert torch.equal(again(**inputs).embeds[name], embeds), name
        assert type(again.config.modalities["record"]["tower"]) is GapClosedClipRecordConfig


def test_a_missing_number_is_not_zero_and_what_stands_there_does_not_matter():
    torch.manual_seed(0)
    tower = GapClosedClipRecordTower(
        GapClosedClipRecordConfig(**{k: v for k, v in RECORD.items() if k != "model_type"})
    )
    tower.eval()
    categories = torch.tensor([[0, 1]])
    given, missing = torch.tensor([[True, True]]), torch.tensor([[True, False]])

    def pooled(second: float, mask) -> torch.Tensor:
        return tower(torch.tensor([[0.5, second]]), mask, categories).pooler_output

    assert torch.equal(pooled(0.0, missing), pooled(float("nan"), missing))
    assert not torch.allclose(pooled(0.0, missing), pooled(0.0, given), atol=1e-4)
    assert not torch.allclose(pooled(0.0, given), pooled(1.0, given), atol=1e-4)


def test_inputs_are_sorted_by_modality():
    inputs = {"view_pixel_values": 1, "pooled_text": 3, "pixel_values": 4, "labels": 5, "views": 6}
    found = inputs_by_modality(("image", "text", "view"), inputs)
    assert found == {"image": {"pixel_values": 4}, "text": {"pooled": 3}, "view": {"pixel_values": 1}}
    assert pairs_of(["text", "record"], "image") == [(0, 1)]  # without the anchor, the first


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"image": {"tower": RECORD}}, "means something else already"),
        ({"Record": {"tower": RECORD}}, "it must be of small letters"),
        ({"record": {"tower": {}}}, "modalities.record.tower has no model_type"),
        ({"record": {"tower": {"model_type": "nonsense"}}}, "knows no model_type 'nonsense'"),
        ({"record": {"tower": RECORD, "size": 3}}, "modalities.record is"),
        ({"record": {"tower": RECORD, "pooling": "max"}}, "modalities.record.pooling is 'max'"),
        ({"record": {"tower": {**RECORD, "hidden_size": 15}}}, "use a multiple of num_attention_heads"),
    ],
)
def test_what_is_said_of_a_wrong_modality(modalities, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(modalities=modalities)


def test_what_is_said_of_wrong_inputs(model):
    inputs = modalities_inputs()
    with pytest.raises(ValueError, match="modality_mask has the shape .4, 3.: it is .B, 4., a column for each"):
        model(**inputs, modality_mask=torch.ones(4, 3))
    with pytest.raises(ValueError, match="takes audio_input_values; it got audio_sound"):
        model(**tiny_inputs(), audio_sound=inputs["audio_input_values"])
    with pytest.raises(ValueError, match="no modality 'video', only image, text, record, audio"):
        model.get_features("video", pixel_values=torch.zeros(1))
    with pytest.raises(ValueError, match="takes 2 and 2: they are of another schema"):
        model(**{**inputs, "record_categories": torch.zeros(4, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="anchor is 'video'"):
        tiny_config(anchor="video")
    assert isinstance(model.config.modalities["audio"]["tower"], ASTConfig)


def test_features_of_what_the_processor_makes(model):
    """By the names that the inputs have for the model; a mask of all modalities goes along."""
    inputs = {key: value for key, value in modalities_inputs().items() if key.startswith("record")}
    mask = torch.tensor([[True, True, index != 2, False] for index in range(4)])
    found = model.get_features("record", **inputs, modality_mask=mask).pooler_output
    bare = {key.removeprefix("record_"): value for key, value in inputs.items()}
    assert torch.equal(found, model.get_features("record", **bare, modality_mask=mask[:, 2]).pooler_output)


def test_what_is_said_of_records_of_another_schema(model):
    inputs = {key: value for key, value in modalities_inputs().items() if key.startswith("record")}
    inputs["record_categories"][1, 1] = 3
    with pytest.raises(ValueError, match=r"has \[4, 3\] of them: of another schema"):
        model(**inputs)
    del inputs["record_numbers_mask"]
    with pytest.raises(ValueError, match="takes record_numbers, record_numbers_mask, record_categories; it got"):
        model(**inputs)
    with pytest.raises(
        ValueError, match="got none of pixel_values, input_ids, record_..., audio_...: give inputs of one"
    ):
        model(recrod_numbers=inputs["record_numbers"])
    with pytest.raises(ValueError, match="use a number of 0 or more"):
        GapClosedClipRecordConfig(num_numbers="two")
    with pytest.raises(ValueError, match="modalities are record, record: one is there twice"):
        tiny_config(modalities=[{"name": "record", "tower": RECORD}] * 2)


def test_modalities_that_are_given_when_a_folder_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = GapClosedClipModel.from_pretrained(tmp_path, modalities={"record": {"tower": RECORD}})
    assert again.config.modality_names == ("image", "text", "record")
    inputs = {key: value for key, value in modalities_inputs().items() if not key.startswith("audio")}
    assert torch.equal(again.eval()(**inputs).embeds["record"], model(**inputs).embeds["record"])
    with pytest.raises(ValueError, match="modalities.record.tower is .bert.: it is a mapping"):
        GapClosedClipModel.from_pretrained(tmp_path, modalities={"record": {"tower": "bert"}})
