"""Embeddings of a data set against one forward pass a pair."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Image
from transformers import Trainer, TrainingArguments

from gap_closed_clip.data import PairCollator, decode_image
from gap_closed_clip.evaluation import PairEmbeddings, build_compute_metrics, embed_pairs, evaluate_embeddings


@pytest.fixture
def counted(tiny_model):
    """The tiny model, and how many images and texts it was given."""
    counts = {"images": 0, "texts": 0}

    def count(module, args, kwargs):
        counts["images"] += len(kwargs["pixel_values"]) if "pixel_values" in kwargs else 0
        counts["texts"] += len(kwargs["input_ids"]) if "input_ids" in kwargs else 0

    tiny_model.register_forward_pre_hook(count, with_kwargs=True)
    return tiny_model, counts


def one_by_one(model, processor, pairs) -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    collator = PairCollator(processor)
    with torch.no_grad():
        outputs = [model(**collator([row])) for row in pairs]
    images, texts = [o.image_embeds for o in outputs], [o.text_embeds for o in outputs]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_equal_a_forward_pass_of_their_own(tiny_model, tiny_processor, pairs, batch_size):
    found = embed_pairs(tiny_model, tiny_processor, pairs, batch_size=batch_size)
    image, text = one_by_one(tiny_model, tiny_processor, pairs)
    np.testing.assert_allclose(found.image_embeds, image, atol=2e-6)
    np.testing.assert_allclose(found.text_embeds, text, atol=2e-6)
    assert found.image_embeds.dtype == found.text_embeds.dtype == np.float32
    assert found.image_ids == pairs["image_id"][:]
    assert found.captions == pairs["caption"][:]
    assert found.labels == pairs["label"][:]
    assert len({row.tobytes() for row in found.image_embeds}) == 6  # the images do differ


@pytest.mark.parametrize("streaming", [False, True])
def test_each_distinct_image_and_caption_once(counted, tiny_processor, pairs, streaming):
    model, counts = counted
    embed_pairs(model, tiny_processor, pairs.to_iterable_dataset() if streaming else pairs, batch_size=3)
    assert counts == {"images": 6, "texts": 6}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("nothing", [None, "", " "])
def test_rows_without_an_id_are_known_by_their_images(tiny_model, tiny_processor, pairs, nothing, streaming):
    ids = [None if row in (1, 4, 5) else identifier for row, identifier in enumerate(pairs["image_id"])]
    some = pairs.remove_columns("image_id").add_column("image_id", [nothing if i is None else i for i in ids])
    found = embed_pairs(tiny_model, tiny_processor, some.to_iterable_dataset() if streaming else some)
    image, _ = one_by_one(tiny_model, tiny_processor, pairs)
    np.testing.assert_allclose(found.image_embeds, image, atol=2e-6)
    assert [given for given in found.image_ids if given in ids] == [given for given in ids if given]
    assert len(set(found.image_ids)) == 7  # image 1 comes with its id and without

    arguments = {"output_dir": "unused", "use_cpu": True, "report_to": [], "remove_unused_columns": False}
    trainer = Trainer(
        tiny_model,
        TrainingArguments(**arguments),
        data_collator=PairCollator(tiny_processor),
        compute_metrics=build_compute_metrics(some),
    )
    recall = trainer.evaluate(some)["eval_recall@10"]
    assert recall == evaluate_embeddings(found)["recall@10"]


def test_ids_that_are_numbers_with_gaps(tiny_model, tiny_processor, pairs):
    some = pairs.remove_columns("image_id").add_column("image_id", [float("nan"), *range(1, 8)])
    found = embed_pairs(tiny_model, tiny_processor, some)
    assert found.image_ids[1:] == [str(number) for number in range(1, 8)] and len(set(found.image_ids)) == 8


def test_without_ids_and_without_images_is_an_error(pairs):
    some = pairs.remove_columns(["image", "image_id"]).add_column("image_id", [None, "a", "b", None, *"cdef"])
    with pytest.raises(ValueError, match=r"no image_id in 2 rows \(counted from 0: 0, 3\), and no images to make one"):
        build_compute_metrics(some)


@pytest.mark.parametrize("kind", ["float", "class"])
def test_labels_that_are_not_given(tiny_model, tiny_processor, pairs, kind):
    """NaN, and the -1 of a ClassLabel, are no group of their own."""
    values = [0, 1, 0, 1, None, None, 0, 1]
    some = pairs.remove_columns("label")
    if kind == "float":
        some = some.add_column("label", [float("nan") if each is None else float(each) for each in values])
    else:
        numbers = [-1 if each is None else each for each in values]
        some = some.add_column("label", numbers, feature=ClassLabel(names=["CT", "MR"]))
    found = embed_pairs(tiny_model, tiny_processor, some)
    texts = pairs.remove_columns("label").add_column("label", ["" if v is None else str(float(v)) for v in values])
    expected = embed_pairs(tiny_model, tiny_processor, texts)
    assert evaluate_embeddings(found) == evaluate_embeddings(expected)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_of_ones_own_without_ids(counted, tiny_processor, pairs, decode, streaming):
    """An image that comes twice is one image, as with ids."""
    model, counts = counted
    expected = embed_pairs(model, tiny_processor, pairs)
    counts.update(images=0, texts=0)
    own = pairs.remove_columns(["image_id", "label"]).cast_column("image", Image(decode=decode))
    numbers = own.map(lambda row, index: {"label": index % 2}, with_indices=True)  # a class of the number 0 is one
    found = embed_pairs(model, tiny_processor, numbers.to_iterable_dataset() if streaming else numbers, batch_size=3)
    assert counts == {"images": 6, "texts": 6} and len(set(found.image_ids)) == 6
    np.testing.assert_allclose(found.image_embeds, expected.image_embeds, atol=2e-6)
    np.testing.assert_allclose(found.text_embeds, expected.text_embeds, atol=2e-6)
    assert found.labels == ["0", "1"] * 4


def test_missing_columns_are_named(tiny_model, tiny_processor, pairs):
    with pytest.raises(ValueError, match="no column 'caption'. Did you mean 'captions'"):
        embed_pairs(tiny_model, tiny_processor, pairs.rename_column("caption", "captions"))
    with pytest.raises(ValueError, match="no column 'image'. The columns are: caption"):
        embed_pairs(tiny_model, tiny_processor, pairs.select_columns("caption"))


def test_a_plain_trainer_evaluates_pairs_of_ones_own(tiny_model, tiny_processor, pairs, tmp_path):
    own = pairs.remove_columns(["image_id", "label"]).cast_column("image", Image())
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    found = {}
    for name, dataset in (("own", own), ("canonical", pairs)):
        metrics = build_compute_metrics(dataset)
        options = {"data_collator": PairCollator(tiny_processor), "compute_metrics": metrics}
        found[name] = Trainer(tiny_model, args, eval_dataset=dataset, **options).evaluate()
    assert found["own"]["eval_loss"] == pytest.approx(found["canonical"]["eval_loss"], abs=1e-6)
    for metric in ("eval_modality_gap", "eval_image_to_text_recall@1"):
        assert found["own"][metric] == pytest.approx(found["canonical"][metric], abs=1e-6)
    # Without the setting the Trainer drops what the collator needs, which it says, or else the collator does.
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        Trainer(tiny_model, args, eval_dataset=own, data_collator=PairCollator(tiny_processor)).evaluate()


def test_no_image_is_decoded_twice(tiny_model, tiny_processor, pairs, monkeypatch):
    decoded = []

    def decode(image, *args, **kwargs):
        decoded.append(kwargs["name"])
        return decode_image(image, *args, **kwargs)

    monkeypatch.setattr("gap_closed_clip.data.collator.decode_image", decode)
    embed_pairs(tiny_model, tiny_processor, pairs)
    assert sorted(decoded) == [f"image {number}" for number in range(6)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_same(tiny_model, tiny_processor, pairs, num_workers):
    expected = embed_pairs(tiny_model, tiny_processor, pairs)
    stream = pairs.to_iterable_dataset(num_shards=2)
    found = embed_pairs(tiny_model, tiny_processor, stream, batch_size=4, num_workers=num_workers)
    order = [pairs["image_id"][:].index(i) for i in found.image_ids]  # workers take turns
    np.testing.assert_allclose(found.image_embeds, expected.image_embeds[order], atol=2e-6)
    by_caption = dict(zip(expected.captions, expected.text_embeds, strict=True))
    np.testing.assert_allclose(found.text_embeds, [by_caption[c] for c in found.captions], atol=2e-6)
    rows = sorted(zip(found.image_ids, found.captions, found.labels, strict=True))
    assert rows == sorted(zip(expected.image_ids, expected.captions, expected.labels, strict=True))


def test_modes_are_restored_and_dropout_is_off(tiny_model, tiny_processor, pairs):
    tiny_model.text_model.encoder.layer[0].attention.output.dropout.p = 0.9
    tiny_model.train()
    tiny_model.vision_model.eval()  # a mixture, as with a frozen tower
    modes = [module.training for module in tiny_model.modules()]
    first, second = (embed_pairs(tiny_model, tiny_processor, pairs) for _ in range(2))
    np.testing.assert_array_equal(first.text_embeds, second.text_embeds)
    assert [module.training for module in tiny_model.modules()] == modes
    assert any(modes) and not all(modes)


def test_modes_are_restored_after_an_error(tiny_model, tiny_processor, pairs):
    tiny_model.train()
    broken = pairs.map(lambda row: {"image": {"bytes": row["image"]["bytes"][:60], "path": "scan 7.png"}})
    with pytest.raises(ValueError, match="scan 7.png"):
        embed_pairs(tiny_model, tiny_processor, broken)
    assert tiny_model.training


def test_the_model_can_train_afterwards(tiny_model, tiny_processor, pairs):
    embed_pairs(tiny_model, tiny_processor, pairs)
    tiny_model.train()(**PairCollator(tiny_processor)(pairs.select(range(4)).to_list())).loss.backward()
    assert tiny_model.visual_projection.weight.grad.abs().sum() > 0


def test_autocast(tiny_model, tiny_processor, pairs):
    exact = embed_pairs(tiny_model, tiny_processor, pairs)
    rough = embed_pairs(tiny_model, tiny_processor, pairs, autocast_dtype=torch.bfloat16)
    difference = np.abs(rough.image_embeds - exact.image_embeds).max()
    assert 1e-5 < difference < 0.05
    assert rough.image_embeds.dtype == np.float32


def test_a_model_in_half_precision(tiny_model, tiny_processor, pairs):
    exact = embed_pairs(tiny_model, tiny_processor, pairs)
    rough = embed_pairs(tiny_model.to(torch.bfloat16), tiny_processor, pairs)
    np.testing.assert_allclose(rough.image_embeds, exact.image_embeds, atol=0.05)


def test_max_length_cuts_captions(tiny_model, tiny_processor, pairs):
    long = embed_pairs(tiny_model, tiny_processor, pairs)
    cut = embed_pairs(tiny_model, tiny_processor, pairs, max_length=5)
    assert np.abs(long.text_embeds - cut.text_embeds).max() > 1e-3
    np.testing.assert_array_equal(long.image_embeds, cut.image_embeds)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_pairs(tiny_model, tiny_processor, pairs, streaming):
    empty = pairs.to_iterable_dataset().take(0) if streaming else pairs.select([])
    with pytest.raises(ValueError, match="no pair to embed"):
        embed_pairs(tiny_model, tiny_processor, empty)


def test_labels_may_be_missing(tiny_model, tiny_processor, pairs):
    assert embed_pairs(tiny_model, tiny_processor, pairs.remove_columns("label")).labels == [""] * 8
    some = Dataset.from_list([*pairs.select([0]), {**pairs[1], "label": None}], features=pairs.features)
    assert embed_pairs(tiny_model, tiny_processor, some).labels == ["CT", ""]


def test_captions_that_differ_in_case_and_space_are_one():
    z = np.eye(3, dtype=np.float32)
    found = PairEmbeddings(z, z, ["a", "b", "c"], ["CT  of the chest", "ct of the Chest ", "MR"], [""] * 3)
    assert found.caption_ids[0] == found.caption_ids[1] != found.caption_ids[2]


def test_parts_of_different_length_are_refused():
    z = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="'text_embeds': 2"):
        PairEmbeddings(z, z[:2], ["a", "b", "c"], ["", "", ""], [""] * 3)


def test_pairs_that_are_a_list(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="pairs are a list: give a datasets.Dataset .*Dataset.from_list"):
        embed_pairs(tiny_model, tiny_processor, [{"image": "a.png", "caption": "a"}])
