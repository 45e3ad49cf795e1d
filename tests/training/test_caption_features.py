"""What a captioner's frozen encoder gives for images, computed once."""

import copy
import logging

import pytest
import torch
from captioners import caption_config, train_encoder
from conftest import CAPTIONS, caption_labels, captioner_of, tiny_config
from safetensors.torch import load_file
from test_precompute import exact, settings  # noqa: F401
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import Augmentation, CaptionCollator, PairCollator, decode_image
from gap_closed_clip.data.features import FeaturePairs
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.model.tower_kinds_gap_closed_clip import image_width, token_width
from gap_closed_clip.training import caption_features, precompute, train
from gap_closed_clip.training.caption_features import encode_images_once


CONVOLUTIONS = {
    "model_type": "timm_wrapper",
    "architecture": "resnet10t",
    "model_args": {"channels": [8, 8, 16, 24], "stem_width": 8},
}


@pytest.fixture(scope="module")
def pairs():
    return make_phantoms(12, seed=3, image_size=32)


def frozen_captioner(tokenizer, **kwargs):
    captioner = captioner_of(tokenizer, center_projections=True, **kwargs)
    captioner.gap_closed_clip.visual_centering.running_mean.normal_()
    captioner.freeze_encoder()
    return captioner


def collators(captioner, processor, augmentation=None):
    """Of pairs, and of captions."""
    collator = PairCollator(processor, augmentation)
    tower = captioner.gap_closed_clip.vision_model
    return collator, CaptionCollator(collator, (image_width(tower), token_width(tower)))


@pytest.mark.parametrize("memory", ["patches_and_embedding", "embedding"])
@pytest.mark.parametrize("tower", ["patches", "convolutions"])
def test_a_decoder_learns_from_features_as_from_pixels(pairs, tiny_processor, settings, memory, tower):
    kwargs = {} if tower == "patches" else {"vision_config": CONVOLUTIONS}
    captioner = frozen_captioner(tiny_processor.tokenizer, decoder_memory=memory, **kwargs).train()
    collator, collate = collators(captioner, tiny_processor)
    encoded = encode_images_once(pairs, captioner, collator, settings)
    assert isinstance(encoded, FeaturePairs)
    found = []
    for rows in (pairs, encoded):
        batch = collate([rows[i] for i in range(8)])
        captioner.zero_grad()
        torch.manual_seed(0)  # the decoder's dropout
        loss = captioner(**batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in captioner.named_parameters() if p.grad is not None}
        found.append((loss, gradients))
    assert set(batch) == {"labels", "pooled_image"} | ({"image_tokens"} if memory != "embedding" else set())
    (loss, gradients), (other_loss, other_gradients) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == other_gradients.keys() and "memory.embedding_projection.weight" in gradients
    for name, gradient in gradients.items():
        similarity = torch.cosine_similarity(gradient.flatten(), other_gradients[name].flatten(), dim=0)
        assert similarity > 0.999 or gradient.norm() < 1e-4, name


def test_the_views_are_the_plain_image_and_augmented_ones(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    augmentation = Augmentation(crop_scale=(0.5, 0.6), brightness=0.3, contrast=0.3, horizontal_flip=False)
    collator, _ = collators(captioner, tiny_processor, augmentation)
    encoded = encode_images_once(pairs, captioner, collator, settings)
    store, rows = encoded.images.store, encoded.images.rows
    views = torch.stack([torch.from_numpy(store.read(rows[:1], torch.tensor([view]).numpy()))[0] for view in range(3)])
    image = decode_image(pairs[0]["image"])
    pixels = tiny_processor.image_processor([image], return_tensors="pt")["pixel_values"]
    outputs = captioner.gap_closed_clip.encode_image(pixels)
    expected = torch.cat([outputs.pooler_output, outputs.last_hidden_state.flatten(1)], 1)[0]
    torch.testing.assert_close(views[0], expected, rtol=2e-3, atol=2e-3)
    assert (views[1:] - views[0]).abs().amax(1).min() > 1e-2 and (views[1] - views[2]).abs().max() > 1e-2
    drawn = torch.stack([torch.from_numpy(encoded[i]["encoded_image"]) for i in (0, 0)])
    assert (drawn[0] == views).all(1).any() and torch.equal(drawn[0], drawn[1])  # of these views, by the batch alone


def test_encoders_on_one_tower_share_its_patches_and_another_tower_has_its_own(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    collator, _ = collators(captioner, tiny_processor)
    first = encode_images_once(pairs, captioner, collator, settings)
    with torch.no_grad():
        captioner.gap_closed_clip.visual_projection.weight.add_(1.0)
        captioner.gap_closed_clip.visual_centering.running_mean.add_(1.0)
    second = encode_images_once(pairs, captioner, collator, settings)
    assert second.images.store.folder == first.images.store.folder
    with torch.no_grad():
        next(captioner.gap_closed_clip.vision_model.parameters()).add_(1.0)
    third = encode_images_once(pairs, captioner, collator, settings)
    assert third.images.store.folder != first.images.store.folder
    assert torch.from_numpy(third[0]["encoded_image"] - first[0]["encoded_image"]).abs().max() > 1e-2


def test_encoders_run_in_every_step_where_they_train_or_patches_take_too_much(
    pairs, tiny_processor, settings, monkeypatch, caplog
):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    collator, _ = collators(captioner, tiny_processor)
    settings.views = 0
    assert encode_images_once(pairs, captioner, collator, settings) is pairs
    settings.views = 3
    captioner.freeze_encoder(False)
    assert encode_images_once(pairs, captioner, collator, settings) is pairs
    captioner.freeze_encoder()
    number = len(set(pairs["image_id"]))
    room = number * 2 * (48 + 5 * 48)  # what represents an image, a class token and four patches
    monkeypatch.setattr(caption_features, "MOST_BYTES", room)
    assert encode_images_once(pairs, captioner, collator, settings) is not pairs
    monkeypatch.setattr(caption_features, "MOST_BYTES", room - 1)
    with caplog.at_level(logging.WARNING):
        assert encode_images_once(pairs, captioner, collator, settings) is pairs
    assert "runs in every step" in caplog.text and "feature_views" in caplog.text


def test_what_a_tower_gave_before_is_written_from_as_the_images_are(tiny_processor):
    captioner = captioner_of(tiny_processor.tokenizer, decoder_memory="patches_and_embedding")
    captioner.set_image_shift(torch.linspace(-1, 1, captioner.config.projection_dim))
    pixels = torch.randn(3, 3, 28, 28)
    outputs = captioner.gap_closed_clip.encode_image(pixels)
    before = {"pooled_image": outputs.pooler_output, "image_tokens": outputs.last_hidden_state}
    for found, expected in zip(captioner.encode(**before), captioner.encode(pixels), strict=True):
        torch.testing.assert_close(found, expected)
    written = captioner.generate(pixels, max_new_tokens=6)
    assert torch.equal(captioner.generate(**before, max_new_tokens=6), written)


@pytest.mark.parametrize(
    ("memory", "given", "message"),
    [
        ("patches_and_embedding", ("image_tokens",), "stand in for images together"),
        ("patches_and_embedding", ("pooled_image",), "stand in for images together"),
        ("patches_and_embedding", ("pixel_values", "image_tokens"), "stand in for images together"),
        ("patches_and_embedding", ("pixel_values", "pooled_image", "image_tokens"), "one of them"),
        ("patches_and_embedding", ("shared_embeds", "pooled_image", "image_tokens"), "one of them"),
        ("embedding", ("pooled_image", "image_tokens"), "stand in for images together"),
        ("embedding", ("pooled_image", "shared_embeds"), "one of them"),
    ],
)
def test_what_stands_in_for_images_by_half_or_beside_others_is_refused(tiny_processor, memory, given, message):
    captioner = captioner_of(tiny_processor.tokenizer, decoder_memory=memory)
    pixels = torch.randn(2, 3, 28, 28)
    outputs = captioner.gap_closed_clip.encode_image(pixels)
    sources = {
        "pixel_values": pixels,
        "shared_embeds": torch.randn(2, captioner.config.projection_dim),
        "pooled_image": outputs.pooler_output,
        "image_tokens": outputs.last_hidden_state,
    }
    with pytest.raises(ValueError, match=message):
        captioner.encode(**{name: sources[name] for name in given})


def test_a_second_run_decodes_no_image_and_a_resumed_one_is_an_unbroken_one(tmp_path, monkeypatch):
    encoder = train_encoder(tmp_path)
    words = ["final_split=none", "eval_strategy=no", f"data.feature_cache={tmp_path / 'features'}", "save_steps=4"]
    train(caption_config(encoder, tmp_path / "first", *words))

    def refuse(*args, **kwargs):
        raise AssertionError("an image was decoded for the tower again")

    monkeypatch.setattr(precompute, "decode_image", refuse)
    monkeypatch.setattr(PairCollator, "images", refuse)
    train(caption_config(encoder, tmp_path / "second", *words))
    (tmp_path / "second" / "model.safetensors").unlink()
    checkpoint = tmp_path / "second" / "checkpoint-4"
    train(caption_config(encoder, tmp_path / "second", *words, f"resume_from_checkpoint={checkpoint}"))
    first, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == resumed.keys()
    assert all(torch.equal(values, resumed[name]) for name, values in first.items())


def test_a_decoder_on_the_embedding_alone_finds_what_the_encoder_was_trained_on(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer, decoder_memory="embedding")
    collator, _ = collators(captioner, tiny_processor)
    embedded = precompute.embed_pairs_once(pairs, captioner.gap_closed_clip, collator, settings, vary=True)
    encoded = encode_images_once(pairs, captioner, collator, settings)
    assert embedded.images.store.folder == encoded.images.store.folder
    plain, other = embedded.plain().select([3])[0], encoded.plain().select([3])[0]
    assert (plain["pooled_image"] == other["encoded_image"]).all()


def test_a_batch_that_comes_again_is_seen_in_other_views_in_other_epochs(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    augmentation = Augmentation(crop_scale=(0.5, 0.6), brightness=0.3, contrast=0.3, horizontal_flip=False)
    collator, collate = collators(captioner, tiny_processor, augmentation)
    encoded = encode_images_once(pairs, captioner, collator, settings)
    alone, together = set(), set()
    for epoch in range(12):
        encoded.set_epoch(epoch)
        alone.add(encoded.__getitems__([5])[0]["encoded_image"].tobytes())
        together.add(encoded.__getitems__([5, 6])[0]["encoded_image"].tobytes())
    assert len(alone) == len(together) == 3
    for rows in ([5], [5, 6]):
        seen = []
        for epoch in (0, 1, 1):
            collate.set_epoch(epoch)
            seen.append(collate([pairs[row] for row in rows])["pixel_values"])
        assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
        # A shuffled batch is varied by what is in it alone, as all were before 0.2; not that of a single pair.
        collate.epoch.shuffled = True
        expected = seen[1] if len(rows) == 1 else seen[0]
        assert torch.equal(collate([pairs[row] for row in rows])["pixel_values"], expected)
        collate.epoch.shuffled = False


def test_workers_that_live_on_learn_the_epoch(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    collator, collate = collators(captioner, tiny_processor, Augmentation(crop_scale=(0.5, 0.6)))
    encoded = encode_images_once(pairs, captioner, collator, settings)
    for rows, name in ((encoded, "pooled_image"), (pairs, "pixel_values")):
        loader = DataLoader(rows, 4, collate_fn=collate, num_workers=1, persistent_workers=True)
        for epoch in range(3):
            encoded.set_epoch(epoch)
            collate.set_epoch(epoch)
            for found, expected in zip(loader, DataLoader(rows, 4, collate_fn=collate), strict=True):
                assert torch.equal(found[name], expected[name])


def test_training_tells_the_epoch(tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(FeaturePairs, "set_epoch", lambda self, epoch: epochs.append(epoch))
    words = ["final_split=none", "eval_strategy=no", "num_train_epochs=3", "max_steps=-1"]
    train(caption_config(train_encoder(tmp_path), tmp_path / "run", *words))
    assert sorted(set(epochs)) == [0, 1, 2]


def test_images_of_different_sizes_are_encoded_in_every_step(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer, vision_config=CONVOLUTIONS)
    processor = copy.deepcopy(tiny_processor)
    collator, collate = collators(captioner, processor)
    processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    assert encode_images_once(pairs, captioner, collator, settings) is pairs
    assert captioner(**collate([pairs[0], pairs[1]])).loss.isfinite()


@pytest.mark.parametrize("train_on", ["image", "text"])
def test_a_decoder_that_is_stored_in_bfloat16_is_trained_in_float32(tmp_path, train_on):
    encoder = train_encoder(tmp_path)
    text = load_checkpoint(encoder)[0].config.text_config
    BertModel(BertConfig(**text.to_dict())).to(torch.bfloat16).save_pretrained(tmp_path / "decoder")
    words = [f"captioning.decoder={tmp_path / 'decoder'}", f"train_on={train_on}"]
    train(caption_config(encoder, tmp_path / "run", *words, "final_split=none", "eval_strategy=no"))
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_decoder_on_an_encoder_that_was_stored_in_bfloat16_is_in_float32(tiny_processor, tmp_path):
    GapClosedClipModel(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    encoder = GapClosedClipModel.from_pretrained(tmp_path, dtype=torch.bfloat16).float()  # as training makes it
    assert encoder.config.text_config.dtype == torch.bfloat16
    captioner = GapClosedClipForConditionalGeneration.from_clip(encoder, tiny_processor.tokenizer)
    assert captioner.decoder.dtype == captioner.decoder.config.dtype == torch.float32
    labels = caption_labels(tiny_processor.tokenizer, CAPTIONS[:2])
    assert captioner(torch.randn(2, 3, 28, 28), labels=labels).loss.isfinite()


def test_a_new_captioner_has_the_precision_of_its_encoder(tiny_processor):
    encoder = GapClosedClipModel(tiny_config()).to(torch.bfloat16)
    captioner = GapClosedClipForConditionalGeneration.from_clip(encoder, tiny_processor.tokenizer)
    assert captioner.decoder.dtype == captioner.memory.embedding_norm.weight.dtype == torch.bfloat16
    assert captioner.eval().generate(torch.randn(2, 3, 28, 28).bfloat16(), max_new_tokens=3).shape[0] == 2
