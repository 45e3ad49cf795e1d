"""The batch, written out by hand where it can be."""

import hashlib
import inspect
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizer, CLIPImageProcessor

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.data import (
    Augmentation,
    CaptionCollator,
    PairCollator,
    count_truncated,
    group_ids,
    group_ids_of,
    normalize_caption,
    stable_hash,
)
from gap_closed_clip.data.image_ids import image_id_of


SIZE = 12
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "ct", "of", "the", "lung"]


@pytest.fixture
def processor(tmp_path) -> GapClosedClipProcessor:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    size = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5]
    )
    return GapClosedClipProcessor(image_processor=image_processor, tokenizer=tokenizer)


def png(rgb: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def rows(images) -> list[dict]:
    captions = ["Chest CT", "CT of the chest , the lung", "chest  ct "]
    ids = ["a", "b", "b"]
    return [
        {"image": png(image), "caption": caption, "image_id": image_id, "modality": "CT"}
        for image, caption, image_id in zip(images, captions, ids, strict=True)
    ]


def test_batch_is_as_written_out(processor, rows, images):
    batch = PairCollator(processor)(rows)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "token_type_ids", "group_ids"}
    expected = (images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]  # no resizing: they have the right size
    assert batch["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    # [CLS] = 2, [SEP] = 3, the comma is unknown = 1
    ids = [[2, 5, 6, 3, 0, 0, 0, 0, 0], [2, 6, 7, 8, 5, 1, 8, 9, 3], [2, 5, 6, 3, 0, 0, 0, 0, 0]]
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == [[int(token != 0) for token in row] for row in ids]
    assert batch["token_type_ids"].tolist() == [[0] * 9] * 3
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "token_type_ids", "group_ids")} == {
        torch.int64
    }


def test_group_ids_say_what_is_shared(processor, rows):
    groups = PairCollator(processor)(rows)["group_ids"]
    assert groups.shape == (3, 2)
    assert (groups >= 0).all()
    same = groups[:, None] == groups[None]  # (3, 3, 2)
    assert same[..., 0].tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert same[..., 1].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_hash_is_the_digest_in_63_bits_and_the_same_in_another_process():
    digest = hashlib.blake2b("Übersicht".encode(), digest_size=8).digest()
    assert stable_hash("Übersicht") == int.from_bytes(digest, "big") // 2
    assert group_ids("a", "Chest  CT") == (stable_hash("a"), stable_hash("chest ct"))
    assert normalize_caption(" A\tStraße\n") == "a strasse"
    # The file alone: importing the package takes seconds.
    code = f"import runpy; print(runpy.run_path({inspect.getfile(group_ids)!r})['group_ids']('a', 'Chest  CT'))"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True).stdout
        assert printed.decode().strip() == str(group_ids("a", "chest ct"))


def test_long_captions_are_cut(processor, rows):
    batch = PairCollator(processor, max_length=5)(rows)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 0], [2, 6, 7, 8, 3], [2, 5, 6, 3, 0]]
    processor.tokenizer.model_max_length = 6
    assert PairCollator(processor)(rows)["input_ids"][1].tolist() == [2, 6, 7, 8, 5, 3]
    # A model that takes shorter texts than another beside it gets them as long as it takes them.
    assert PairCollator(processor, max_length=9)(rows)["input_ids"][1].tolist() == [2, 6, 7, 8, 5, 3]


def test_each_distinct_caption_comes_in_one_batch_of_its_length(processor):
    captions = ["the lung", "ct", "chest ct of the lung", "ct", "of", "the lung"]
    collator = PairCollator(processor, max_length=5)
    batches = list(collator.distinct_caption_batches(captions, 2, torch.device("meta"), "Testing"))
    assert [texts for texts, _ in batches] == [["ct", "of"], ["the lung", "chest ct of the lung"]]
    assert all(values.device.type == "meta" for _, tokens in batches for values in tokens.values())
    for texts, tokens in collator.distinct_caption_batches(captions, 2, torch.device("cpu"), "Testing"):
        expected = collator.tokenize(texts)
        assert set(tokens) == set(expected) == {"input_ids", "attention_mask", "token_type_ids"}
        assert all(torch.equal(tokens[name], expected[name]) for name in expected)
    assert tokens["input_ids"].tolist() == [[2, 8, 9, 3, 0], [2, 5, 6, 7, 3]]  # padded, and cut after 5 tokens
    assert not list(collator.distinct_caption_batches([], 2, torch.device("cpu"), "Testing"))


def test_captions_are_labels_that_are_ignored_where_they_are_padded(processor, rows, images):
    collator = PairCollator(processor)
    batch = CaptionCollator(collator)(rows)
    assert set(batch) == {"pixel_values", "group_ids", "labels"}
    ids = [[2, 5, 6, 3] + [-100] * 5, [2, 6, 7, 8, 5, 1, 8, 9, 3], [2, 5, 6, 3] + [-100] * 5]
    assert batch["labels"].tolist() == ids
    assert torch.equal(batch["pixel_values"], collator(rows)["pixel_values"])
    embedded = [{"caption": row["caption"], "shared_embeds": [0.6, 0.8]} for row in rows]  # no image at all
    batch = CaptionCollator(collator)(embedded)
    assert batch["labels"].tolist() == ids
    torch.testing.assert_close(batch["shared_embeds"], torch.tensor([[0.6, 0.8]] * 3))


def test_count_truncated(processor, rows):
    captions = ["chest ct"] * 3 + ["ct of the chest , the lung"] * 4 + ["ct of the"] * 5  # 4, 9 and 5 tokens
    pairs = Dataset.from_dict({"caption": captions})
    for max_length, expected in ((9, 0), (8, 4), (5, 4), (4, 9), (3, 12)):
        assert count_truncated(pairs, processor.tokenizer, max_length, batch_size=5) == expected


def test_bad_image_is_named(processor, rows):
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:40], "path": None}
    with pytest.raises(ValueError, match=r"image 'b' cannot be read .*data\.on_bad_image=skip"):
        PairCollator(processor)(rows)


def test_images_of_any_size_and_kind(processor, rows):
    gray16 = np.linspace(0, 4095, 40 * 25).astype(np.uint16).reshape(40, 25)
    batch = PairCollator(processor)([rows[0] | {"image": png(gray16)}])
    assert batch["pixel_values"].shape == (1, 3, SIZE, SIZE)
    gray = batch["pixel_values"][0] * torch.tensor([0.2, 0.25, 0.5])[:, None, None]
    gray = gray + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    assert abs(gray.mean() - 0.5) < 0.05  # not black


def test_window_reaches_the_decoder(processor, rows):
    gray16 = np.full((SIZE, SIZE), 1000, np.uint16)
    for window, expected in (((1000, 100), 0.5), ((2000, 100), 0.0)):
        batch = PairCollator(processor, window=window)([rows[0] | {"image": png(gray16)}])
        red = batch["pixel_values"][0, 0] * 0.2 + 0.5
        torch.testing.assert_close(red, torch.full_like(red, expected), atol=0.01, rtol=0)


def test_augmentation_is_that_of_the_batch(processor, rows):
    """Not of a worker's random state: a resumed run meets the same batches and must vary them in the same way."""
    collator = PairCollator(processor, Augmentation())
    state = torch.random.get_rng_state()
    first = collator(rows)["pixel_values"]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert first.shape == (3, 3, SIZE, SIZE)
    torch.testing.assert_close(collator(rows)["pixel_values"], first, rtol=0, atol=0)
    assert not torch.equal(collator(rows[::-1])["pixel_values"].flip(0), first)
    assert not torch.equal(PairCollator(processor)(rows)["pixel_values"], first)


def test_augmentation_leaves_the_numbers_of_gpus_alone(processor, rows, monkeypatch):
    """The dropout of a model there would else be the same whenever a batch comes again, whatever the seed."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    PairCollator(processor, Augmentation())(rows)
    assert seeds == [] and torch.equal(torch.get_rng_state(), before)


def test_held_out_rows_are_not_augmented(processor, rows):
    mixed = PairCollator(processor, Augmentation())([rows[0] | {"augment": False}, rows[1]])["pixel_values"]
    plain = PairCollator(processor)(rows[:2])["pixel_values"]
    assert torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[1], plain[1])


def test_only_varied_images_are_decoded_at_less_than_full_size(processor, rows):
    """Evaluation must see what any other way of evaluating sees."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    row = rows[0] | {"image": {"bytes": buffer.getvalue(), "path": None}}
    full = processor.image_processor([Image.open(buffer).convert("RGB")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(PairCollator(processor)([row])["pixel_values"], full, rtol=0, atol=0)
    none = Augmentation(crop_scale=(1, 1), brightness=0, contrast=0)
    reduced = PairCollator(processor, none)([row])["pixel_values"]
    assert not torch.equal(reduced, full)
    assert (reduced - full).abs().mean() < 0.2 * full.std()


@pytest.fixture
def pairs(rows) -> Dataset:
    features = Features(image=ImageFeature(decode=False), caption=Value("string"), image_id=Value("string"))
    return Dataset.from_list([{name: row[name] for name in features} for row in rows], features)


def test_in_a_worker_as_in_the_main_process(processor, pairs):
    collator = PairCollator(processor, max_length=8)
    expected = collator([pairs[index] for index in range(3)])
    loader = DataLoader(pairs, 3, collate_fn=collator, num_workers=1)
    (batch,) = loader
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], values, rtol=0, atol=0)


def test_pickles(processor, rows):
    collator = PairCollator(processor, Augmentation(), max_length=8, window=(40, 400))
    copy = pickle.loads(pickle.dumps(collator))
    torch.manual_seed(0)
    expected = collator(rows)
    torch.manual_seed(0)
    for name, values in copy(rows).items():
        assert torch.equal(values, expected[name])


# --- pairs of one's own, which no `load_pairs` has made


def bare(rows: list[dict]) -> list[dict]:
    return [{"image": row["image"], "caption": row["caption"]} for row in rows]


def same_images(collator: PairCollator, forms: list) -> list[list[bool]]:
    groups = collator([{"image": form, "caption": str(index)} for index, form in enumerate(forms)])["group_ids"]
    return (groups[:, None, 0] == groups[None, :, 0]).tolist()


def test_without_ids_images_are_known_by_what_they_are(processor, images, tmp_path):
    """Of two images, the second of which comes twice, in each form that a data set holds."""
    files = [png(image)["bytes"] for image in images[:2]]
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for path, data in zip(paths, files, strict=True):
        (tmp_path / path).write_bytes(data)
    forms = {
        "rows": [{"bytes": data, "path": None} for data in files],
        "rows of a path": [{"bytes": None, "path": path} for path in paths],
        "bytes": files,
        "paths": paths,
        "Pillow": [Image.fromarray(image) for image in images[:2]],
        "arrays": [images[0], images[1]],
        "tensors": [torch.tensor(images[0]), torch.tensor(images[1]).clone()],
    }
    expected = PairCollator(processor)(
        [{"image": files[index], "caption": "a", "image_id": "1"} for index in range(2)]
    )
    for name, (first, second) in forms.items():
        collator = PairCollator(processor)
        assert same_images(collator, [first, second, second]) == [[True, False, False]] + [[False, True, True]] * 2, (
            name
        )
        batch = collator([{"image": image, "caption": "a"} for image in (first, second)])
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    gray = [Image.new("L", (4, 2)), Image.new("L", (2, 4)), Image.new("1", (4, 2))]
    assert same_images(PairCollator(processor), gray) == torch.eye(3, dtype=torch.bool).tolist()


def test_ids_of_any_type_and_ids_that_are_missing(processor, rows):
    numbered = [row | {"image_id": number} for row, number in zip(rows, (7, 8, 8), strict=True)]
    assert PairCollator(processor)(numbered)["group_ids"][:, 0].tolist() == [stable_hash(text) for text in "788"]
    holes = [rows[0] | {"image_id": None}, rows[1] | {"image_id": None}, rows[1] | {"image_id": None}]
    groups = PairCollator(processor)(holes)["group_ids"][:, 0].tolist()
    assert groups[0] != groups[1] == groups[2]


def test_a_data_set_of_ones_own_has_the_groups_of_its_batches(processor, rows):
    files = [rows[0]["image"], rows[1]["image"], rows[1]["image"]]
    for feature in (ImageFeature(decode=False), ImageFeature()):
        features = Features(image=feature, caption=Value("string"))
        dataset = Dataset.from_dict({"image": files, "caption": ["a", "b", " B"]}, features)
        batch = PairCollator(processor)([dataset[index] for index in range(3)])
        assert group_ids_of(dataset) == [tuple(pair) for pair in batch["group_ids"].tolist()]
        assert batch["group_ids"][1].tolist() == batch["group_ids"][2].tolist() != batch["group_ids"][0].tolist()


@pytest.mark.parametrize("kind", [PairCollator, lambda processor: CaptionCollator(PairCollator(processor))])
@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (
            {"caption": "captions"},
            r"no column 'caption'\. Did you mean 'captions'\? The columns are: image, captions\.",
        ),
        (
            {"caption": "text"},
            r"no column 'caption'\. The columns are: image, text\. .*rename_column\(\.\.\., 'caption'",
        ),
        ({"image": "img"}, r"no column 'image'.*The columns are: img, caption\..*remove_columns\('image'\)"),
        ({"image": "file", "caption": "x"}, r"remove_unused_columns=False: a Trainer drops"),
    ],
)
def test_missing_columns_are_named(processor, rows, kind, renamed, message):
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in bare(rows)]
    with pytest.raises(ValueError, match=message):
        kind(processor)(rows)
    with pytest.raises(ValueError, match="The pairs have no column '(image|caption)'"):
        group_ids_of(Dataset.from_list([{name: "a" for name in rows[0]}]))


def test_a_row_without_anything(processor):
    with pytest.raises(ValueError, match=r"no column 'caption'\. There are no columns\."):
        PairCollator(processor)([{}])


@pytest.mark.parametrize("caption", [None, ["a", "b"], 3])
def test_captions_that_are_no_text(processor, rows, caption):
    with pytest.raises(
        ValueError, match="A caption is .*; it has to be one text. Of several captions make a row each"
    ):
        PairCollator(processor)([rows[0], rows[1] | {"caption": caption}])


def test_an_image_of_which_no_id_can_be_made(processor):
    with pytest.raises(ValueError, match="The image of a row is 3, of which no id can be made: .*column 'image_id'"):
        image_id_of({"image": 3})
    with pytest.raises(ValueError, match="list gives no column 'image_id'.*training.distinct_batches=false"):
        group_ids_of([{"image": "a.png", "caption": "a"}])
