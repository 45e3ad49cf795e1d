"""`gap-closed-clip eval` with embeddings that others have computed."""

from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import noise_image
from safetensors.torch import save_file

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.evaluation import embed_pairs, read_metrics


DATA = {"source": "phantoms", "phantom_test_pairs": 14, "phantom_size": 32}


@pytest.fixture
def evaluate(command, monkeypatch, tmp_path):
    """evaluate("a.npy,b.npy", ...) -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return partial(command, "eval")


@pytest.fixture
def arrays(tmp_path):
    """Ten pairs as images.npy and texts.npy, half as long in both.safetensors, and ids and labels of them."""
    images = np.random.default_rng(0).normal(size=(10, 6))
    texts = images + np.random.default_rng(1).normal(size=(10, 6))
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts.astype(np.float32))
    both = {"image_embeds": torch.tensor(images / 2).float(), "text_embeds": torch.tensor(texts / 2).float()}
    save_file(both, tmp_path / "both.safetensors")
    (tmp_path / "labels.txt").write_text("CT\nMR\n" * 5)
    (tmp_path / "pairs.csv").write_text("image\n" + "".join(f"{row // 2}\n" for row in range(10)))
    return images, texts


def test_side_by_side_without_a_model_or_data(evaluate, arrays):
    words = ("labels=labels.txt", "output=report")
    code, out, err = evaluate("images.npy,texts.npy", "half=both.safetensors", *words)
    assert code == 0, err
    assert "10 pairs of images.npy,texts.npy, half\n" in out
    header = next(line for line in out.splitlines() if line.startswith("| metric"))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["images.npy,texts.npy", "half"]
    results = read_metrics("report/metrics.json")
    images, texts = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in arrays)
    expected = np.linalg.norm(images.mean(0) - texts.mean(0))
    assert results["half"]["modality_gap"] == pytest.approx(expected, abs=1e-6)
    assert results["half"] == pytest.approx(results["images.npy,texts.npy"], abs=1e-6)
    assert "v_measure" in results["half"] and "mixed_label_precision@10" in results["half"]


def test_rows_of_one_image(evaluate, arrays):
    """Any caption of an image is right, so that its id changes what is found."""
    images, texts = arrays
    images[1::2] = images[::2]
    np.save("images.npy", images)
    ids = ("image_ids=pairs.csv:image", "caption_ids=pairs.csv:image")
    for word in ids:
        assert evaluate("images.npy,texts.npy", word, "output=report")[0] == 0
    cosines = images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    right = np.arange(10) // 2
    best = [right[np.argmax(row)] == right[query] for query, row in enumerate(cosines)]
    code, out, err = evaluate("images.npy,texts.npy", ids[0], "output=report")
    found = read_metrics("report/metrics.json")["images.npy,texts.npy"]
    assert found["image_to_text_recall@1"] == pytest.approx(np.mean(best))


def test_beside_a_model(evaluate, tiny_model, tiny_processor, tmp_path):
    """Its own embeddings, saved to files, have its figures: ids and labels are those of the data set."""
    tiny_model.save_pretrained("outputs/demo")
    tiny_processor.save_pretrained("outputs/demo")
    config = yaml.safe_dump({"data": DATA, "training": {"final_split": "test"}})
    (tmp_path / "outputs" / "demo" / "train_config.yaml").write_text(config)
    found = embed_pairs(*load_checkpoint("outputs/demo"), load_pairs(DataArguments(**DATA), "test"))
    np.save("images.npy", found.image_embeds)
    np.save("texts.npy", found.text_embeds)
    code, out, err = evaluate("outputs/demo", "other=images.npy,texts.npy", "num_workers=0", "output=report")
    assert code == 0, err
    assert "14 pairs, split 'test' of 'phantoms'" in out and " demo | other |" in " ".join(out.split())
    results = read_metrics("report/metrics.json")
    assert results["other"] == pytest.approx(results["demo"], abs=1e-3, nan_ok=True)
    np.save("images.npy", found.image_embeds[:9])
    np.save("texts.npy", found.text_embeds[:9])
    code, out, err = evaluate("outputs/demo", "images.npy,texts.npy", "num_workers=0")
    assert code == 1 and "images.npy has 9 rows and there are 14 pairs" in err
    code, out, err = evaluate("outputs/demo", "demo=images.npy,texts.npy")
    assert code == 1 and "demo is the name of a model and of embeddings: write OTHER=FILES." in err
    code, out, err = evaluate("outputs/demo", "images.npy,texts.npy", "labels=labels.txt")
    assert code == 1 and "labels is of embeddings alone" in err


def test_beside_a_model_on_samples_that_lack_something(evaluate, tiny_model, tiny_processor, tmp_path):
    """Of 8 samples with an age, two have no caption and one no image: rows are of the 5 pairs, as of the model."""
    tiny_model.save_pretrained("outputs/demo")
    tiny_processor.save_pretrained("outputs/demo")
    lines = ["image,caption,age"]
    for number in range(8):
        noise_image(60, (32, 32), seed=number).save(tmp_path / f"{number}.png")
        caption = "" if number in (2, 5) else f"Finding number {number}."
        lines.append(f"{'' if number == 6 else f'{number}.png'},{caption},{40 + number}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    images, texts = np.random.default_rng(0).normal(size=(2, 8, 6))
    whole = [0, 1, 3, 4, 7]
    for name, rows in (("all", range(8)), ("whole", whole)):
        np.save(f"{name}_images.npy", images[list(rows)])
        np.save(f"{name}_texts.npy", texts[list(rows)])
    words = ["data.source=pairs.csv", "data.modalities={record: [age]}", "split=train", "num_workers=0"]
    code, out, err = evaluate("outputs/demo", "other=whole_images.npy,whole_texts.npy", "output=report", *words)
    assert code == 0, err
    results = read_metrics("report/metrics.json")
    assert results["other"]["num_pairs"] == results["demo"]["num_pairs"] == 5
    cosines = images[whole] @ texts[whole].T / np.linalg.norm(texts[whole], axis=1)
    assert results["other"]["image_to_text_recall@1"] == np.mean(cosines.argmax(axis=1) == np.arange(5))
    code, out, err = evaluate("outputs/demo", "all_images.npy,all_texts.npy", *words)
    assert code == 1 and "all_images.npy has 8 rows and there are 5 pairs" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images.npy"], "images.npy: embeddings are two arrays, images first"),
        (["images.npy,texts.npz"], "images.npy,texts.npz: embeddings are two arrays"),
        (["images.npy,none.npy"], "There is no file none.npy."),
        (["labels.txt"], "labels.txt is a file: a model is a folder or a Hub id, and embeddings are"),
        (["labels.txt,labels.txt", "data.source=phantoms"], "labels.txt,labels.txt is a file: a model is a folder"),
        (["a=images.npy,texts.npy", "a=both.safetensors"], "a is there twice: write NAME=FILES with two names."),
        (["images.npy,texts.npy", "labels=none.txt"], "labels: there is no file none.txt."),
        (["images.npy,texts.npy", "labels=five.txt"], "labels: five.txt has 5 rows and there are 10 pairs."),
        (["images.npy,texts.npy", "short=five.safetensors"], "The embeddings are of different numbers of pairs"),
        (["images.npy,texts.npy", "centering=true"], "centering is for models, and embeddings alone are named"),
        (["images.npy,texts.npy", "data.source=phantoms"], "data.source is for models, and embeddings alone"),
        (["images.npy,texts.npy", "lables=labels.txt"], "There is no setting 'lables'. Did you mean 'labels'?"),
        (["labels=labels.txt"], "No model is named"),
    ],
)
def test_bad_input_is_one_line(evaluate, arrays, tmp_path, words, message):
    (tmp_path / "five.txt").write_text("CT\n" * 5)
    save_file({"image": torch.ones(5, 2), "text": torch.ones(5, 2)}, tmp_path / "five.safetensors")
    code, out, err = evaluate(*words)
    assert code == 1 and out == ""
    assert err.startswith("gap-closed-clip eval: ") and message in err and "Traceback" not in err
