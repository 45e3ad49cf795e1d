"""What a captioner's frozen encoder gives for images, computed once."""

import logging

import pytest
import torch
from captioners import caption_config, train_encoder
from conftest import captioner_of
from safetensors.torch import load_file

from gap_closed_clip.data import Augmentation, CaptionCollator, PairCollator, decode_image
from gap_closed_clip.data.features import FeaturePairs
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.evaluation import fast_tower
from gap_closed_clip.training import caption_features, precompute, train
from gap_closed_clip.training.caption_features import encode_images_once
from gap_closed_clip.training.precompute import FeatureSettings


CONVOLUTIONS = {
    "model_type": "timm_wrapper",
    "architecture": "resnet10t",
    "model_args": {"channels": [8, 8, 16, 24], "stem_width": 8},
}


@pytest.fixture(scope="module")
def pairs():
    return make_phantoms(12, seed=3, image_size=32)


@pytest.fixture
def settings(tmp_path):
    return FeatureSettings(tmp_path, views=3, batch_size=6, num_workers=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The weights as they are, so that features can be compared to rounding."""
    monkeypatch.setattr(fast_tower, "LARGEST_DISTANCE", -1.0)


def frozen_captioner(tokenizer, **kwargs):
    captioner = captioner_of(tokenizer, center_projections=True, **kwargs)
    captioner.gap_closed_clip.visual_centering.running_mean.normal_()
    captioner.freeze_encoder()
    return captioner


def collators(captioner, processor, augmentation=None):
    """Of pairs, and of captions."""
    collator = PairCollator(processor, augmentation)
    return collator, CaptionCollator(collator, (captioner.config.projection_dim, captioner.memory.patch_dim))


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
    assert set(batch) == {"labels", "shared_embeds"} | ({"image_tokens"} if memory != "embedding" else set())
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
    embeds, tokens = captioner.encode_image(pixels)
    torch.testing.assert_close(views[0], torch.cat([embeds, tokens.flatten(1)], 1)[0], rtol=2e-3, atol=2e-3)
    assert (views[1:] - views[0]).abs().amax(1).min() > 1e-2 and (views[1] - views[2]).abs().max() > 1e-2
    drawn = torch.stack([torch.from_numpy(encoded[i]["encoded_image"]) for i in (0, 0)])
    assert (drawn[0] == views).all(1).any() and torch.equal(drawn[0], drawn[1])  # of these views, by the batch alone


@pytest.mark.parametrize("part", ["visual_projection", "visual_centering", "visual_map"])
def test_what_stands_behind_the_tower_is_told_apart(pairs, tiny_processor, settings, part):
    captioner = frozen_captioner(tiny_processor.tokenizer, embedding_map="whitening")
    collator, _ = collators(captioner, tiny_processor)

    def first():
        return torch.from_numpy(encode_images_once(pairs, captioner, collator, settings)[0]["encoded_image"])

    before = first()
    assert torch.equal(first(), before)
    with torch.no_grad():
        for tensor in getattr(captioner.gap_closed_clip, part).state_dict().values():
            tensor.add_(torch.randn_like(tensor)) if tensor.is_floating_point() else None
    changed = first()
    assert (changed - before)[: captioner.config.projection_dim].abs().max() > 1e-2
    assert torch.equal(changed[captioner.config.projection_dim :], before[captioner.config.projection_dim :])


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
    room = number * 2 * (captioner.config.projection_dim + 5 * captioner.memory.patch_dim)  # four patches, a class
    monkeypatch.setattr(caption_features, "MOST_BYTES", room)
    assert encode_images_once(pairs, captioner, collator, settings) is not pairs
    monkeypatch.setattr(caption_features, "MOST_BYTES", room - 1)
    with caplog.at_level(logging.WARNING):
        assert encode_images_once(pairs, captioner, collator, settings) is pairs
    assert "runs in every step" in caplog.text and "feature_views" in caplog.text


def test_what_was_encoded_before_is_written_from_as_the_images_are(tiny_processor):
    captioner = captioner_of(tiny_processor.tokenizer, decoder_memory="patches_and_embedding")
    captioner.set_image_shift(torch.linspace(-1, 1, captioner.config.projection_dim))
    pixels = torch.randn(3, 3, 28, 28)
    embeds, tokens = captioner.encode_image(pixels)
    torch.testing.assert_close(
        captioner.encode(shared_embeds=embeds, image_tokens=tokens)[0], captioner.encode(pixels)[0]
    )
    written = captioner.generate(pixels, max_new_tokens=6)
    assert torch.equal(captioner.generate(shared_embeds=embeds, image_tokens=tokens, max_new_tokens=6), written)


@pytest.mark.parametrize(
    ("memory", "given"),
    [
        ("patches_and_embedding", ("image_tokens",)),
        ("patches_and_embedding", ("pixel_values", "shared_embeds", "image_tokens")),
        ("embedding", ("shared_embeds", "image_tokens")),
    ],
)
def test_tokens_without_their_embeddings_or_beside_images_are_refused(tiny_processor, memory, given):
    captioner = captioner_of(tiny_processor.tokenizer, decoder_memory=memory)
    pixels = torch.randn(2, 3, 28, 28)
    embeds, tokens = captioner.encode_image(pixels)
    sources = {"pixel_values": pixels, "shared_embeds": embeds, "image_tokens": tokens}
    with pytest.raises(ValueError, match="image_tokens stand in for images"):
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


def test_an_encoder_of_images_and_the_captioner_on_it_do_not_meet(pairs, tiny_processor, settings):
    captioner = frozen_captioner(tiny_processor.tokenizer)
    collator, _ = collators(captioner, tiny_processor)
    embedded = precompute.embed_pairs_once(pairs, captioner.gap_closed_clip, collator, settings, vary=True)
    encoded = encode_images_once(pairs, captioner, collator, settings)
    assert embedded.images.store.folder != encoded.images.store.folder
    assert "pooled_image" in embedded[0] and "encoded_image" in encoded.plain().select([3])[0]
