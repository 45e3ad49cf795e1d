"""The figure of captions, captions.jsonl, and the rows of captions in the table."""

import json

import numpy as np
import pytest
from PIL import Image

from gap_closed_clip.evaluation import (
    Captions,
    Evaluation,
    evaluate_captions,
    metrics_table,
    plot_captions,
    write_report,
)


def captions_of(pairs, texts) -> Captions:
    """The first pair of each image; what is written is up to the test."""
    first = {}
    for image_id, caption in zip(pairs["image_id"], pairs["caption"], strict=True):
        first.setdefault(image_id, [caption])
    texts = [texts] * len(first) if isinstance(texts, str) else texts
    return Captions(list(first), texts, list(first.values()))


def drawn(captions, pairs, path, **kwargs) -> np.ndarray:
    plot_captions(captions, pairs, path, **kwargs)
    return np.asarray(Image.open(path).convert("L"))


@pytest.mark.parametrize("models", [1, 3])
def test_size_and_margins(pairs, tmp_path, models):
    found = {f"model {number}": captions_of(pairs, f"caption {number}") for number in range(models)}
    figure = drawn(found, pairs, tmp_path / "new folder" / "captions.png")
    assert figure.shape[1] == 150 * 14 and 150 * 3 * 1.6 < figure.shape[0] < 150 * 3 * 2
    assert figure.std() > 20
    assert all(
        (edge == 255).all() for edge in (figure[:2], figure[-2:], figure[:, :4], figure[:, -4:])
    )  # nothing is cut off


def test_the_same_bytes_each_time(pairs, tmp_path):
    found = {"ours": captions_of(pairs, "a nodule")}
    for name in ("first.png", "second.png"):
        plot_captions(found, pairs, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize("text", ["", "A NODULE " * 200, "x" * 5000, "$\\frac$ 5 < 6_ü\n\tnodule"])
def test_captions_of_every_kind_are_drawn_inside(pairs, tmp_path, text):
    figure = drawn({"ours": captions_of(pairs, text)}, pairs, tmp_path / "captions.png")
    assert figure.shape[1] == 150 * 14 and figure.shape[0] < 150 * 3 * 2
    assert (figure[:, -4:] == 255).all()


def test_what_is_written_is_seen(pairs, tmp_path):
    """Another caption of one image changes its text's place alone; and "reference" is a name like others."""
    texts = ["a nodule"] * 6
    before = drawn({"reference": captions_of(pairs, texts)}, pairs, tmp_path / "captions.png")
    after = drawn({"reference": captions_of(pairs, [*texts[:5], "two nodules"])}, pairs, tmp_path / "captions.png")
    rows, columns = np.nonzero(before != after)
    assert 0 < np.ptp(rows) < 30 and 0 < np.ptp(columns) < 400
    colour = np.asarray(Image.open(tmp_path / "captions.png").convert("RGB")).astype(int)
    blue = (colour[..., 2] - colour[..., 0] > 100).any(axis=1)
    starts = np.flatnonzero(blue[1:] & ~blue[:-1])
    assert 3 <= len(starts) <= 4 * 3  # lines of the references, in three rows of images; not the model's


@pytest.mark.parametrize("number", [1, 2, 5])
def test_hardly_any_images(pairs, tmp_path, number):
    found = {"ours": captions_of(pairs, "a nodule")}
    figure = drawn(found, pairs, tmp_path / "captions.png", number=number)
    rows = -(-number // 2)
    assert 150 * rows * 1.6 < figure.shape[0] < 150 * rows * 2
    one = pairs.select([0])
    assert drawn({"ours": captions_of(one, "a nodule")}, one, tmp_path / "one.png").shape[0] < 150 * 2


def test_no_image_is_picked(pairs, tmp_path):
    """The order of the pairs says nothing about which are drawn."""
    found = {"ours": captions_of(pairs, "a nodule")}
    backwards = Captions(*(values[::-1] for values in vars(found["ours"]).values()))
    plot_captions(found, pairs, tmp_path / "first.png", number=3)
    plot_captions({"ours": backwards}, pairs.select(range(7, -1, -1)), tmp_path / "second.png", number=3)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_report_of_captions(pairs, tmp_path):
    found = {"ours": captions_of(pairs, "A nodule, 5 µm"), "nearest": captions_of(pairs, list("abcdef"))}
    evaluations = {
        name: Evaluation(evaluate_captions(captions), captions=captions) for name, captions in found.items()
    }
    found["nearest"] = Captions(*(values[::-1] for values in vars(found["nearest"]).values()))  # in another order
    evaluations["nearest"].captions = found["nearest"]
    table = write_report(tmp_path / "report", evaluations, {}, "test", pairs=pairs)
    expected = {"metrics.json", "metrics.md", "captions.jsonl", "captions.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == expected
    rows = [json.loads(line) for line in (tmp_path / "report" / "captions.jsonl").read_text("utf-8").splitlines()]
    assert [row["image_id"] for row in rows] == found["ours"].image_ids
    assert rows[2] == {
        "image_id": "image 2",
        "references": found["ours"].references[2],
        "captions": {"ours": "A nodule, 5 µm", "nearest": "c"},
    }
    assert (tmp_path / "report" / "metrics.md").read_text() == table + "\n"
    write_report(tmp_path / "stream", evaluations, {}, "test", pairs=pairs.to_iterable_dataset())
    assert {path.name for path in (tmp_path / "stream").iterdir()} == expected - {"captions.png"}


def test_table_of_captions():
    ours = {"coco_bleu_4": 0.123, "cider_d": 1.5, "clip_score": 0.5, "caption_words": 9.94, "num_images": 12.0}
    ours |= {"rouge_l": 0.25, "distinct_captions": 0.5, "meteor": 0.3}
    nearest = {"coco_bleu_4": 0.1, "cider_d": 0.25, "num_images": 12.0, "image_caption_cosine": 0.2}
    assert metrics_table({"ours": ours, "nearest": nearest}) == (
        "| metric                     |  ours | nearest |\n"
        "| -------------------------- | ----: | ------: |\n"
        "| BLEU-4 ↑                   | 12.3% |   10.0% |\n"
        "| ROUGE-L ↑                  | 25.0% |       - |\n"
        "| METEOR ↑                   | 30.0% |       - |\n"
        "| CIDEr-D ↑                  | 1.500 |   0.250 |\n"
        "| CLIPScore ↑                | 0.500 |       - |\n"
        "| image to caption, cosine ↑ |     - |   0.200 |\n"
        "| distinct captions          | 50.0% |       - |\n"
        "| words a caption            |   9.9 |       - |\n"
        "| images                     |    12 |      12 |"
    )


def test_a_report_that_breaks_off_leaves_no_captions_of_other_pairs(pairs, tmp_path, monkeypatch):
    def report(source):
        evaluation = Evaluation({"cider_d": 1.0}, captions=captions_of(pairs, source))
        write_report(tmp_path, {"ours": evaluation}, {"source": source}, "test", pairs=pairs)

    def broken(*args):
        raise KeyboardInterrupt

    report("own")
    assert (tmp_path / "captions.png").is_file()
    monkeypatch.setattr("gap_closed_clip.evaluation.report.plot_captions", broken)
    with pytest.raises(KeyboardInterrupt):
        report("phantoms")
    assert not (tmp_path / "captions.png").exists() and "own" not in (tmp_path / "captions.jsonl").read_text()
    write_report(tmp_path, {"ours": Evaluation({"margin": 1.0})}, {"source": "phantoms"}, "test")
    assert not (tmp_path / "captions.jsonl").exists()
