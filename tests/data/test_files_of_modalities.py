"""Arrays and further images that lie in files, of one or several sources: how they are opened, checked and joined."""

import json

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, List, Value
from PIL import Image
from transformers import CLIPImageProcessor

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.data import Augmentation, DataArguments, PairCollator, load_checked_pairs, load_pairs
from gap_closed_clip.data.features import FeaturePairs, FeatureStore, StoredFeatures
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor

from .conftest import draw


ARRAY = [[1.0, 2.0], [3.0, 4.0]]


def test_files_of_arrays_and_of_a_second_image(tiny_processor, tmp_path):
    np.save(tmp_path / "a.npy", np.array(ARRAY))
    rows = [{"image": draw(tmp_path / f"{gray}.png", gray), "caption": str(gray)} for gray in (0, 250)]
    rows[0] |= {"array": "a.npy", "second": draw(tmp_path / "b.png", 100)}
    (tmp_path / "train.csv").write_text(
        "image,caption,array,second\n"
        + "".join(f"{r['image']},{r['caption']},{r.get('array', '')},{r.get('second', '')}\n" for r in rows)
    )
    side = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size=side, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    further = {"audio": ArrayProcessor("values", [2, 2]), "lateral": image_processor}
    processor = GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)
    args = DataArguments(source=str(tmp_path / "train.csv"), modalities={"audio": "array", "lateral": "second"})
    pairs = list(load_pairs(args, "train"))
    batch = PairCollator(processor)(pairs)
    assert batch["audio_values"].tolist() == [ARRAY, [[0, 0]] * 2]
    assert batch["lateral_pixel_values"][0].unique().tolist() == pytest.approx([100 / 255])
    assert not batch["lateral_pixel_values"][1].any()
    darker = Augmentation((1.0, 1.0), brightness=0.9, contrast=0.0)
    varied = PairCollator(processor, darker)(pairs)["lateral_pixel_values"][0]
    assert varied.unique().numel() == 1 and abs(varied.unique().item() - 100 / 255) > 0.01
    held_out = PairCollator(processor, darker)([row | {"augment": False} for row in pairs])
    assert torch.equal(held_out["lateral_pixel_values"], batch["lateral_pixel_values"])
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"The array '.*a.npy' cannot be read"):
        PairCollator(processor)(pairs)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"Row 0 \(from 0\): the file '.*a.npy' of 'audio' does not exist"):
        load_pairs(args, "train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["second.png", "second.npy"])
def test_damaged_files_of_further_modalities_are_found_as_images_are(tmp_path, name, streaming):
    for number in range(4):
        draw(tmp_path / f"{number}.png", number)
        file = tmp_path / str(number) / name
        draw(file, 9) if name.endswith("png") else (file.parent.mkdir(), np.save(file, np.ones(3)))
    damaged = tmp_path / "2" / name
    damaged.write_bytes(damaged.read_bytes()[:40])
    rows = ["image,caption,second", *(f"{n}.png,caption {n},{n}/{name}" for n in (0, 1, 2)), "3.png,caption 3,"]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    options = {"modalities": {"other": "second"}, "streaming": streaming, "shuffle_buffer": 0}
    kept = load_checked_pairs(
        DataArguments(source=str(tmp_path / "train.csv"), on_bad_image="skip", **options), "train"
    )
    assert [row["caption"] for row in kept] == ["caption 0", "caption 1", "caption 3"]
    if not streaming:
        with pytest.raises(ValueError, match=f"1 of 4 images cannot be read, the first:\n.*2/{name}"):
            load_checked_pairs(DataArguments(source=str(tmp_path / "train.csv"), **options), "train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["float32", "int64", "array2d"])
def test_arrays_of_several_sources_may_be_of_different_numbers(tmp_path, tiny_processor, streaming, kind):
    draw(tmp_path / "0.png", 0)
    feature = Array2D((2, 2), "float32") if kind == "array2d" else List(List(Value(kind)))
    features = Features({"image": Value("string"), "caption": Value("string"), "wave": feature})
    waves = [[[1, 2], [3, 4]], None if kind != "array2d" else [[5, 6], [7, 8]]]
    rows = {"image": ["0.png"] * 2, "caption": ["a", "b"], "wave": waves}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "one.parquet")
    table = [{"image": "0.png", "caption": caption, "wave": [[0.5, 1.5], [2.5, 3.5]]} for caption in "cd"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    sources = [str(tmp_path / "one.parquet"), str(tmp_path / "other.jsonl")]
    args = DataArguments(source=sources, modalities={"audio": "wave"}, streaming=streaming, shuffle_buffer=0)
    further = {"audio": ArrayProcessor("values", [2, 2])}
    processor = GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)
    pairs = sorted(load_pairs(args, "train"), key=lambda row: row["caption"])
    batch = PairCollator(processor)(pairs)
    wanted = [np.zeros((2, 2)) if wave is None else np.array(wave) for wave in waves]
    wanted += [np.array([[0.5, 1.5], [2.5, 3.5]])] * 2
    assert batch["audio_values"].tolist() == [wave.tolist() for wave in wanted]


def test_arrays_and_files_of_several_sources_do_not_go_together(tmp_path):
    draw(tmp_path / "0.png", 0)
    np.save(tmp_path / "0.npy", np.array(ARRAY))
    (tmp_path / "one.csv").write_text("image,caption,wave\n0.png,a,0.npy\n")
    for name, wave in (("two", ARRAY), ("three", ARRAY[0])):
        row = {"image": "0.png", "caption": "b", "wave": wave}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for one, other in (("one.csv", "two.jsonl"), ("two.jsonl", "three.jsonl")):
        args = DataArguments(source=[str(tmp_path / one), str(tmp_path / other)], modalities={"audio": "wave"})
        with pytest.raises(ValueError, match="the modality 'audio' is .* in one source and .* in another: give all"):
            load_pairs(args, "train")


def test_features_leave_a_second_image_its_window_and_held_out_ones_as_they_are(tiny_processor, tmp_path):
    # A value of 300 in 16 bits is 192 in the window (200, 401) and 128 in (300, 401), by DICOM PS3.3 C.11.2.1.2.
    windows, grays = {"a": 200, "b": 300}, {"a": 192, "b": 128}
    for name in windows:
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / name / "second.png")
        draw(tmp_path / name / "0.png", 9)
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.csv").write_text("image,caption,second\n0.png,zero,second.png\n")
    sources = [
        {"source": str(tmp_path / name), "window_center": center, "window_width": 401}
        for name, center in windows.items()
    ]
    args = DataArguments(source=sources, modalities={"lateral": "second"})
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    lateral = CLIPImageProcessor(**settings, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    parts = tiny_processor.image_processor, tiny_processor.tokenizer, {"lateral": lateral}
    darker = Augmentation(crop_scale=(1.0, 1.0), brightness=0.9, contrast=0.0)
    varied = PairCollator(GapClosedClipProcessor(*parts), darker)
    store = FeatureStore(tmp_path / "store", {}, 1, 2)
    items = [bytes([number]) * 16 for number in range(2)]
    with store.writing(items):
        store.append(items, np.ones((2, 1, 2), np.float32))
    stored = StoredFeatures(store, store.rows(items))
    for split, collator in (("validation", varied), ("train", PairCollator(GapClosedClipProcessor(*parts)))):
        pairs = load_pairs(args, split)
        for features in (pairs, FeaturePairs(pairs, stored, stored, further=["lateral"])):
            batch = collator([features[row] for row in range(2)])
            found = batch["lateral_pixel_values"].flatten(1).mul(255).round()
            assert [row.unique().tolist() for row in found] == [[gray] for gray in grays.values()]
