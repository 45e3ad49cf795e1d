"""What is computed once: the frozen towers' output, and the exact centers after training."""

import errno
import logging
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset, Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.data import Augmentation, PairCollator, decode_image
from gap_closed_clip.data.features import FeaturePairs, FeatureStore
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.evaluation import fast_tower
from gap_closed_clip.evaluation.fast_tower import FastTower
from gap_closed_clip.training import RecenterCallback, precompute, recenter
from gap_closed_clip.training.precompute import FeatureSettings, embed_pairs_once


@pytest.fixture(scope="module")
def pairs():
    pairs = make_phantoms(24, seed=3, image_size=32)
    first = {image_id: index for index, image_id in reversed(list(enumerate(pairs["image_id"])))}
    return pairs.select(sorted(first.values())[:20])  # 20 different images


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(text_pooling="mean", center_projections=True))
    model.freeze_towers(vision=True, text=True)
    return model


@pytest.fixture
def settings(tmp_path):
    return FeatureSettings(tmp_path, views=3, batch_size=6, num_workers=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The weights as they are, so that features can be compared to rounding."""
    monkeypatch.setattr(fast_tower, "LARGEST_DISTANCE", -1.0)


def images_run(model, monkeypatch):
    """Counts the images that go through the image tower."""
    counts = []
    run = model.vision_model.forward

    def counted(pixel_values, *args, **kwargs):
        counts.append(len(pixel_values))
        return run(pixel_values, *args, **kwargs)

    monkeypatch.setattr(model.vision_model, "forward", counted)
    monkeypatch.setattr(fast_tower, "TRIAL_ITEMS", 0)
    monkeypatch.setattr(FastTower, "_timed", lambda self, inputs, way: (torch.ones(1, 1), 0.0))
    return counts


@pytest.mark.parametrize("frozen", [("vision",), ("text",), ("vision", "text")])
def test_features_train_the_projections_as_the_towers_do(pairs, tiny_processor, settings, frozen):
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(text_pooling="mean"))
    model.freeze_towers(**dict.fromkeys(frozen, True))
    collator = PairCollator(tiny_processor)
    embedded = embed_pairs_once(pairs, model, collator, settings, vary=False)
    gradients = []
    for rows in (pairs, embedded):
        batch = collator([rows[i] for i in range(8)])
        model.zero_grad()
        torch.manual_seed(0)  # dropout of the tower that is not frozen
        model.train()(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert ("pixel_values" not in batch) == ("vision" in frozen) and ("input_ids" not in batch) == ("text" in frozen)
    assert len(gradients[0]) == len(gradients[1]) > 3
    for with_tower, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_tower, without, rtol=2e-2, atol=2e-3)  # features are kept as float16


def test_nothing_is_embedded_where_nothing_is_frozen_or_it_is_not_asked_for(pairs, tiny_processor, model, settings):
    collator = PairCollator(tiny_processor)
    assert embed_pairs_once(pairs, model, collator, replace(settings, views=0), vary=True) is pairs
    model.freeze_towers()
    assert embed_pairs_once(pairs, model, collator, settings, vary=True) is pairs
    model.vision_model.requires_grad_(False)
    next(model.vision_model.parameters()).requires_grad_(True)  # a released block
    assert embed_pairs_once(pairs, model, collator, settings, vary=True) is pairs


def test_the_views_are_the_plain_image_and_augmented_ones(pairs, tiny_processor, model, settings):
    augmentation = Augmentation()
    embedded = embed_pairs_once(pairs, model, PairCollator(tiny_processor, augmentation), settings, vary=True)
    image = decode_image(pairs[4]["image"])
    features = [
        torch.from_numpy(embedded.images.read(torch.tensor([4]).numpy(), torch.tensor([view]).numpy()))[0]
        for view in range(3)
    ]

    def pooled(image):
        pixel_values = tiny_processor.image_processor([image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return model.vision_model.eval()(pixel_values).pooler_output[0]

    torch.testing.assert_close(features[0], pooled(image), rtol=1e-3, atol=1e-3)
    store = embedded.images.store
    (item,) = [item for item, row in store._row_of.items() if row == embedded.images.rows[4]]
    generator = torch.Generator().manual_seed(int.from_bytes(item[:8], "little"))
    for view in (1, 2):
        expected = pooled(augmentation(image, generator))
        torch.testing.assert_close(features[view], expected, rtol=1e-3, atol=1e-3)
        assert (features[view] - features[0]).abs().max() > 0.01


def test_an_interrupted_run_goes_on_and_a_finished_one_is_found(pairs, tiny_processor, model, settings, monkeypatch):
    collator = PairCollator(tiny_processor, Augmentation())
    counts = images_run(model, monkeypatch)
    append, calls = FeatureStore.append, []

    def interrupted(self, digests, features):
        calls.append(len(digests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, digests, features)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureStore, "append", interrupted)
        embed_pairs_once(pairs, model, collator, settings, vary=True)
    counts.clear()
    embedded = embed_pairs_once(pairs, model, collator, settings, vary=True)
    assert sum(counts) == 3 * (20 - 4)  # two batches of two images were safe
    counts.clear()
    again = embed_pairs_once(pairs, model, collator, settings, vary=True)
    assert counts == []
    fresh = embed_pairs_once(pairs, model, collator, replace(settings, folder=settings.folder / "new"), vary=True)
    for position in range(20):
        for other in (again, fresh):
            torch.testing.assert_close(embedded[position]["pooled_image"], other[position]["pooled_image"])


def test_a_change_of_image_tower_or_transform_never_meets_old_features(
    pairs, tiny_processor, model, settings, monkeypatch, tmp_path
):
    counts = images_run(model, monkeypatch)

    def number_embedded(pairs, collator, **changes):
        counts.clear()
        embed_pairs_once(pairs, model, collator, replace(settings, **changes), vary=True)
        return sum(counts)

    files = []
    for index, row in enumerate(pairs):
        files.append(tmp_path / f"{index}.png")
        decode_image(row["image"]).save(files[-1])
    paths = [{"bytes": None, "path": str(file)} for file in files]
    pairs = pairs.remove_columns("image").add_column("image", paths, feature=Image(decode=False))
    collator = PairCollator(tiny_processor, Augmentation())
    assert number_embedded(pairs, collator) == 60 and number_embedded(pairs, collator) == 0
    changed = decode_image(paths[7])
    changed.putpixel((0, 0), (255, 0, 255))
    changed.save(files[7])
    assert number_embedded(pairs, collator) == 3
    assert number_embedded(pairs.select(range(5)), collator) == 0  # a part, a fold
    assert number_embedded(pairs, PairCollator(tiny_processor, Augmentation(brightness=0.1))) == 60
    assert number_embedded(pairs, collator, views=2) == 40
    assert number_embedded(pairs, PairCollator(tiny_processor)) == 20
    assert number_embedded(pairs, PairCollator(tiny_processor, Augmentation(), window=(40.0, 80.0))) == 60
    size = tiny_processor.image_processor.image_mean
    monkeypatch.setattr(tiny_processor.image_processor, "image_mean", [0.4, *size[1:]])
    assert number_embedded(pairs, collator) == 60
    with torch.no_grad():
        next(model.vision_model.parameters()).flatten()[0].add_(1e-3)
    assert number_embedded(pairs, collator) == 60


def test_a_saved_model_finds_the_features_of_its_towers(pairs, tiny_processor, model, settings, tmp_path, monkeypatch):
    collator = PairCollator(tiny_processor, Augmentation())
    embed_pairs_once(pairs, model, collator, settings, vary=True)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    collator = PairCollator(GapClosedClipProcessor.from_pretrained(tmp_path / "saved"), Augmentation())
    loaded = GapClosedClipModel.from_pretrained(tmp_path / "saved")
    loaded.freeze_towers(vision=True, text=True)
    counts = images_run(loaded, monkeypatch)
    monkeypatch.setattr(loaded, "encode_text", lambda **inputs: pytest.fail("a caption was embedded again"))
    embed_pairs_once(pairs, loaded, collator, settings, vary=True)
    assert counts == []


def test_captions_are_known_by_their_tokens(pairs, tiny_processor, model, settings, monkeypatch):
    counts = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda **inputs: (counts.append(1), encode(**inputs))[1])
    embed_pairs_once(pairs, model, PairCollator(tiny_processor), settings, vary=False)
    counts.clear()
    embed_pairs_once(pairs, model, PairCollator(tiny_processor), settings, vary=False)
    assert counts == []
    shorter = embed_pairs_once(pairs, model, PairCollator(tiny_processor, max_length=5), settings, vary=False)
    assert counts != []
    tokens = PairCollator(tiny_processor, max_length=5).tokenize([pairs["caption"][3]])
    with torch.no_grad():
        expected = encode(**tokens).pooler_output[0]
    torch.testing.assert_close(torch.from_numpy(shorter[3]["pooled_text"]), expected, rtol=1e-3, atol=1e-3)


def test_a_full_disk_says_so_before_and_during_the_work(pairs, tiny_processor, model, settings, monkeypatch):
    collator = PairCollator(tiny_processor)
    usage = precompute.shutil.disk_usage(settings.folder)
    with monkeypatch.context() as patch:
        patch.setattr(precompute.shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(OSError, match="data.feature_cache"):
            embed_pairs_once(pairs, model, collator, settings, vary=False)

    def full(self, digests, features):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device.*goes on from there"):
        patch.setattr(FeatureStore, "append", full)
        embed_pairs_once(pairs, model, collator, settings, vary=False)


def test_an_image_that_cannot_be_read_is_named(pairs, tiny_processor, model, settings):
    rows = [{**pairs[0], "image": {"bytes": b"no image", "path": None}, "image_id": "scan 7"}]
    broken = Dataset.from_list(rows, features=pairs.features)
    with pytest.raises(ValueError, match="scan 7"):
        embed_pairs_once(broken, model, PairCollator(tiny_processor), settings, vary=False)


@pytest.mark.parametrize("largest, expected", [(1e-2, True), (-1.0, False)])
def test_a_faster_way_is_taken_only_if_it_gives_the_same(monkeypatch, largest, expected):
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(fast_tower, "LARGEST_DISTANCE", largest)
    monkeypatch.setattr(fast_tower, "cpu_has_bfloat16", lambda: True)
    timed = FastTower._timed

    def pretend(self, inputs, way):
        features, _ = timed(self, inputs, way)
        return features, 1.0 - 0.5 * (way.layout == torch.channels_last) - 0.2 * (way.dtype is not None)

    monkeypatch.setattr(FastTower, "_timed", pretend)
    inputs = {"pixel_values": torch.randn(4, 3, 64, 64) * torch.arange(1.0, 5.0)[:, None, None, None]}
    with torch.no_grad():
        reference = tower(inputs["pixel_values"])
        fast = FastTower(tower, lambda tower, inputs: tower(inputs["pixel_values"]), inputs)
        features = fast(inputs)
    assert (fast.way.dtype == torch.bfloat16 and fast.way.layout == torch.channels_last) == expected
    assert (1 - torch.cosine_similarity(features.float(), reference)).max() <= (1e-2 if expected else 1e-6)
    fast.restore()
    assert all(parameter.is_contiguous() for parameter in tower.parameters())


def test_a_faster_way_has_to_give_each_part_of_the_features(monkeypatch):
    """The first of 101 numbers is wrong: as a part of its own it counts."""
    exact = torch.randn(8, 101, generator=torch.Generator().manual_seed(0))
    wrong = exact.clone()
    wrong[:, 0] *= -1

    def pretend(self, inputs, way):
        is_fast = way.layout == torch.channels_last
        return wrong if is_fast else exact, 0.5 if is_fast else 1.0

    monkeypatch.setattr(FastTower, "_timed", pretend)
    monkeypatch.setattr(fast_tower, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(fast_tower, "LARGEST_DISTANCE", 0.5)
    inputs = {"pixel_values": torch.randn(8, 3, 8, 8)}
    ways = [FastTower(nn.Conv2d(3, 8, 3), lambda *_: exact, inputs, parts).way.layout for parts in ((), (1, 100))]
    assert ways == [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize(
    "has_bfloat16, expected", [(True, [None, None, torch.bfloat16, torch.bfloat16]), (False, [None, None])]
)
def test_a_cpu_without_instructions_for_bfloat16_is_not_tried_in_it(monkeypatch, has_bfloat16, expected):
    tried = []

    def pretend(self, inputs, way):
        tried.append(way.dtype)
        return torch.ones(5, 2), 1.0

    monkeypatch.setattr(FastTower, "_timed", pretend)
    monkeypatch.setattr(fast_tower, "cpu_has_bfloat16", lambda: has_bfloat16)
    tower = nn.Conv2d(3, 8, 3)
    fast = FastTower(tower, lambda tower, inputs: tower(**inputs), {"pixel_values": torch.randn(5, 3, 8, 8)})
    assert tried == expected
    assert fast.way == fast_tower.Way(torch.contiguous_format, None)


def plain_batches(pairs, processor, **kwargs):
    return DataLoader(pairs, batch_size=6, collate_fn=PairCollator(processor), **kwargs)


def mean_over_deviation(model, pairs, processor):
    """For images and texts the largest |mean| / deviation of a feature over the pairs, in evaluation mode."""
    batch = PairCollator(processor)(list(pairs))
    batch.pop("group_ids")
    pixel_values = batch.pop("pixel_values")
    training = model.training
    with torch.no_grad():
        image = model.eval().get_image_features(pixel_values).pooler_output
        text = model.get_text_features(**batch).pooler_output
    model.train(training)
    assert image.std(0).min() > 0 and text.std(0).min() > 0  # it is no constant that has been centered
    return max((features.mean(0).abs() / features.std(0)).max().item() for features in (image, text))


@pytest.mark.parametrize("embedded", [False, True])
def test_recentered_features_have_mean_zero_over_the_training_pairs(pairs, tiny_processor, model, settings, embedded):
    collator = PairCollator(tiny_processor, Augmentation())
    model.train()(**collator([pairs[i] for i in range(8)]))  # one augmented batch: not yet the exact centers
    rows = pairs
    if embedded:
        rows = embed_pairs_once(pairs, model, collator, settings, vary=True).plain()
        assert isinstance(rows, FeaturePairs)
    assert mean_over_deviation(model, pairs, tiny_processor) > 0.1
    recenter(model, plain_batches(rows, tiny_processor))
    assert model.training
    assert mean_over_deviation(model, pairs, tiny_processor) < (2e-2 if embedded else 1e-3)


def test_recentering_without_pairs_is_an_error(model):
    with pytest.raises(ValueError, match="no batch"):
        recenter(model, [])


def test_a_plain_trainer_recenters_before_evaluations_and_checkpoints(pairs, tiny_processor, tmp_path, caplog):
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(center_projections=True))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        eval_strategy="steps", eval_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    seen = []

    class Watched(Trainer):
        def evaluate(self, *args, **kwargs):
            seen.append(mean_over_deviation(model, pairs, tiny_processor))
            return super().evaluate(*args, **kwargs)

    collator = PairCollator(tiny_processor, Augmentation())
    trainer = Watched(
        model=model, args=args, train_dataset=pairs, eval_dataset=pairs, data_collator=collator,
        callbacks=[RecenterCallback(plain_batches(pairs, tiny_processor))],
    )  # fmt: skip
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert len(seen) == 2 and max(seen) < 1e-3
    assert mean_over_deviation(model, pairs, tiny_processor) < 1e-3
