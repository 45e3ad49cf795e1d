"""Phantoms: reproducible, varied, long-tailed, hung the way radiologists hang images."""

import gzip
import hashlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from gap_closed_clip.data import phantoms
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.data.phantoms.cases import Case, Modality, zipf_index


@pytest.fixture(scope="module")
def many() -> datasets.Dataset:
    """Enough pairs for counting; small images, since only the words matter."""
    return make_phantoms(1500, seed=11, image_size=32)


@pytest.fixture(scope="module")
def few() -> datasets.Dataset:
    return make_phantoms(60, seed=5, image_size=96)


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def digest(pairs) -> str:
    joined = hashlib.sha256()
    for row in pairs:
        joined.update(row["image"]["bytes"] + repr({**row, "image": None}).encode())
    return joined.hexdigest()


def test_same_seed_gives_the_same_pairs_in_another_process(few):
    code = (  # the phantoms alone: importing the whole package takes seconds
        "import hashlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from phantoms import make_phantoms\n"
        f"{inspect.getsource(digest)}\n"
        "print(digest(make_phantoms(60, seed=5, image_size=96)))"
    )
    command = [sys.executable, "-c", code, str(Path(phantoms.__file__).parent.parent)]
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == digest(few)


def test_a_shorter_set_is_the_beginning_of_a_longer_one(few):
    for count in (1, 17):
        assert digest(make_phantoms(count, seed=5, image_size=96)) == digest(few.select(range(count)))


def test_different_seeds_share_no_image(few):
    other = make_phantoms(60, seed=6, image_size=96)
    assert not {row["bytes"] for row in few["image"]} & {row["bytes"] for row in other["image"]}
    assert not set(few["image_id"]) & set(other["image_id"])
    assert not set(few["case_id"]) & set(other["case_id"])
    finding = phantoms.BRAIN.findings[0]
    case = Case("brain MR", finding, ("axial T1",), "left", "deep", size=0.5, number=1, age=50, sex="male")
    drawn = {
        phantoms.draw_image(case, "axial T1", False, 48, entropy)
        for entropy in ([1, 0, 0], [2, 0, 0], [1, 1, 0], [1, 0, 1])
    }
    assert len(drawn) == 4


def test_columns_follow_the_pairs_contract(few):
    assert few.features["image"] == datasets.Image(decode=False)
    for name in ("image_id", "caption", "label", "modality", "finding", "side", "zone", "size", "sex", "organ"):
        assert few.features[name] == datasets.Value("string")
    assert few.features["age"] == datasets.Value("int32")
    assert len(few) == 60
    for row in few:
        assert row["image"]["bytes"].startswith(b"\x89PNG")
        assert pixels(row).shape == (96, 96) and pixels(row).dtype == np.uint8
        assert row["label"].startswith(row["modality"] + " / ")
        assert row["side"] in ("right", "left", "bilateral", "")
        assert row["size"] in ("small", "moderate", "large", "")
        assert row["age"] is None or 0 < row["age"] < 100
        assert row["sex"] in ("female", "male", None)


def test_one_image_id_is_one_image(many):
    images = {}
    for row in many:
        assert images.setdefault(row["image_id"], row["image"]["bytes"]) == row["image"]["bytes"]
    assert len(set(images.values())) == len(images)


def test_no_flat_image_and_no_empty_caption(many, few):
    for row in few:
        values = pixels(row)
        assert values.std() > 12 and len(np.unique(values)) > 40, row["image_id"]
    for row in many:
        assert pixels(row).std() > 8, row["image_id"]
        assert row["caption"] == row["caption"].strip() and len(row["caption"]) > 3
        assert "  " not in row["caption"] and ".." not in row["caption"] and " ." not in row["caption"]
        assert row["caption"][0].isupper() or not row["caption"][0].isalpha()


def draw(modality: Modality, key: str, side: str, view: str, zone: str = "") -> np.ndarray:
    """Mean of several unjittered images of one finding, to average the grain and the clutter out."""
    finding = next(finding for finding in modality.findings if finding.key == key)
    case = Case(modality.name, finding, (view,), side, zone, size=0.8, number=2, age=50, sex="male")
    images = [phantoms.draw_image(case, view, False, 64, [9, k], jitter=0.0) for k in range(24)]
    return np.mean([np.asarray(Image.open(io.BytesIO(image)), dtype=np.float64) for image in images], axis=0)


@pytest.mark.parametrize(
    ("modality", "key", "view", "zone"),
    [
        (phantoms.RADIOGRAPH, "effusion", "PA", ""),
        (phantoms.RADIOGRAPH, "pneumothorax", "AP", ""),
        (phantoms.RADIOGRAPH, "mass", "PA", "upper"),
        (phantoms.CT, "effusion", "mediastinal window", ""),
        (phantoms.CT, "mass", "lung window", "posterior"),
        (phantoms.BRAIN, "old infarct", "axial T2", "parietal"),
        (phantoms.BRAIN, "glioma", "coronal T1 contrast", "frontal"),
    ],
)
def test_the_patients_right_is_at_the_image_left(modality, key, view, zone):
    normal = draw(modality, "normal", "", view)
    for side in ("right", "left"):
        change = np.abs(draw(modality, key, side, view, zone) - normal)
        image_left, image_right = change[:, :30].mean(), change[:, 34:].mean()
        near, far = (image_left, image_right) if side == "right" else (image_right, image_left)
        assert near > 1.5 * far, (side, near, far)


def test_the_heart_lies_to_the_patients_left_and_the_right_breast_hangs_on_the_image_right():
    chest = draw(phantoms.RADIOGRAPH, "normal", "", "PA")[36:44]
    assert chest[:, 34:46].mean() > chest[:, 18:30].mean() + 5
    mirrored = draw(phantoms.RADIOGRAPH, "dextrocardia", "", "PA")[36:44]
    assert mirrored[:, 18:30].mean() > mirrored[:, 34:46].mean() + 5
    for side, wall, air in (("right", slice(60, 64), slice(0, 4)), ("left", slice(0, 4), slice(60, 64))):
        breast = draw(phantoms.MAMMOGRAM, "normal", side, "CC")[24:40]
        assert breast[:, wall].mean() > breast[:, air].mean() + 30


def test_every_finding_can_be_drawn_in_every_view():
    sides = {"r": "right", "l": "left", "b": "bilateral"}
    for modality in phantoms.MODALITIES:
        for finding in modality.findings:
            for view in finding.views or modality.views:
                zone = finding.zones[0] if finding.zones else ""
                for side in [sides[letter] for letter in sorted(set(finding.sides))] or [""]:
                    case = Case(modality.name, finding, (view,), side, zone, 0.7, 3, 60, "female")
                    image = phantoms.draw_image(case, view, True, 48, [1, 2])
                    assert np.asarray(Image.open(io.BytesIO(image))).std() > 10, (finding.key, view, side)


def test_labels_are_long_tailed_and_findings_more_so(many):
    labels, findings = Counter(many["label"]), Counter(zip(many["modality"], many["finding"], strict=True))
    assert 12 <= len(labels) <= 22
    assert len({label.split(" / ")[0] for label in labels}) == 5
    assert max(labels.values()) < 0.15 * len(many) and min(labels.values()) >= 8
    assert len(findings) > 55
    ranked = sorted(findings.values(), reverse=True)
    assert ranked[0] > 8 * ranked[-5]
    assert sum(ranked[: len(ranked) // 4]) > 0.45 * len(many)


def test_zipf_index_follows_zipfs_law():
    rng = np.random.default_rng(0)
    counts = np.bincount([zipf_index(rng, 4) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12), atol=0.015)


def test_captions_are_shared_left_vague_and_tell_more_than_the_image(many):
    captions = list(many["caption"])
    counts = Counter(captions)
    shared = sum(count for count in counts.values() if count > 1) / len(captions)
    assert 0.15 < shared < 0.3
    twice = sum(count > 1 for count in Counter(many["image_id"]).values()) / len(captions)
    assert 0 < twice < 0.05
    sided = [row for row in many.remove_columns("image") if row["side"] in ("right", "left")]
    told = np.mean([row["side"] in row["caption"].lower() for row in sided])
    assert 0.5 < told < 0.85
    assert 0.15 < np.mean(["year-old" in caption or " aged " in caption for caption in captions]) < 0.6
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) <= 3 and max(lengths) >= 25 and 7 < np.mean(lengths) < 25
    words = Counter(word for caption in captions for word in caption.lower().split())
    assert len(words) > 800 and sum(count == 1 for count in words.values()) > 0.2 * len(words)


def test_a_caption_never_names_the_other_side(many):
    for row in many:
        if row["side"] in ("right", "left"):
            other = {"right": "left", "left": "right"}[row["side"]]
            words = row["caption"].lower().replace("left lateral", "").replace("right upper quadrant", "")
            words = words.replace("right ventricle", "")
            assert other not in words.replace("-", " ").replace(".", " ").split(), row["caption"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_pairs=0, seed=1), "num_pairs is 0"),
        (dict(num_pairs=5, seed=-1), "seed is -1"),
        (dict(num_pairs=5, seed=1, image_size=16), "image_size is 16"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantoms(**arguments)


def test_no_caption_is_copied_from_roco(many, radiology_data):
    real = set()
    for split in ("validation", "test"):
        with gzip.open(
            Path(radiology_data) / "roco_captions" / split / "radiology" / "captions.txt.gz", "rt"
        ) as lines:
            real.update(line.split("\t", 1)[1].strip(" .\n").lower() for line in lines if "\t" in line)
    copied = {caption for caption in many["caption"] if caption.strip(" .").lower() in real}
    assert not {caption for caption in copied if len(caption.split()) > 7}


def test_records_are_of_the_case_that_is_drawn_and_told(many):
    """What captions tell of age and size is what the record says, where it says something."""
    told = {"age": 0, "finding_size": 0}
    for row in many:
        ages = re.findall(r"(\d+)-year-old|aged (\d+)", row["caption"])
        if ages and row["age"] is not None:
            assert str(row["age"]) in ages[0]
            told["age"] += 1
        sizes = re.findall(r"(\d+\.\d)(?: × \d+\.\d)? cm", row["caption"])
        if sizes and row["finding_size"] is not None and row["size"]:
            assert abs(10 * float(sizes[0]) - row["finding_size"]) <= 0.55
            told["finding_size"] += 1
        assert row["sex"] != "male" or not re.search(r"\b(woman|lady|girl)\b", row["caption"])
    assert told["age"] > 100 and told["finding_size"] > 20


def test_records_lack_something_at_random(many):
    cases = {row["case_id"]: row for row in many}.values()
    for name in ("age", "sex"):
        assert 0.03 < sum(row[name] is None for row in cases) / len(cases) < 0.07
    measured = [row for row in cases if any(f.millimetres[1] and f.key == row["finding"] for f in findings_of(row))]
    assert 0.06 < sum(row["finding_size"] is None for row in measured) / len(measured) < 0.14
    for row in cases:
        if row["finding"].startswith("normal"):
            assert row["finding_size"] is None
        elif row["finding_size"] is not None:
            (finding,) = (f for f in findings_of(row) if f.key == row["finding"])
            assert finding.millimetres[0] <= row["finding_size"] <= finding.millimetres[1]
    assert all(row["organ"] for row in cases)
    organs = {row["organ"] for row in cases}
    assert organs == {"lung", "pleura", "heart", "mediastinum", "brain", "gallbladder", "kidney", "liver", "breast"}
    assert all(row["organ"] == row["label"].split(" / ")[1] for row in cases if row["modality"] == "ultrasound")


def findings_of(row: dict) -> tuple:
    return next(modality.findings for modality in phantoms.MODALITIES if modality.name == row["modality"])


def test_images_and_captions_are_those_of_earlier_versions():
    """Digests of version 1's pairs, before they had a record."""
    pairs = make_phantoms(40, seed=3, image_size=48)
    captions = hashlib.sha256("\n".join(pairs["caption"]).encode()).hexdigest()
    images = hashlib.sha256(b"".join(pixels(row).tobytes() for row in pairs)).hexdigest()
    assert (captions[:16], images[:16]) == ("40e175ec06804e7a", "5ff49d21d92ffb11")
