"""Embeddings from files: what is read, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gap_closed_clip.evaluation.arrays import ArrayFiles, columns_of_rows, is_arrays, load_arrays, read_lines


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(images, texts) -> the files images.npy and texts.npy."""
    monkeypatch.chdir(tmp_path)

    def save(images, texts) -> ArrayFiles:
        np.save("images.npy", np.asarray(images))
        np.save("texts.npy", np.asarray(texts))
        return ArrayFiles("images.npy", "texts.npy")

    return save


IMAGES = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], dtype=np.float16)
TEXTS = np.array([[5.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def test_rows_become_unit_vectors(write):
    found = load_arrays(write(IMAGES, TEXTS))
    np.testing.assert_allclose(found.image_embeds, [[0.6, 0.8], [0, 1], [1, 0]], atol=1e-7)
    np.testing.assert_allclose(found.text_embeds, [[1, 0], [1, 0], [0, 1]], atol=1e-7)
    assert found.image_embeds.dtype == np.float32
    assert found.image_ids == found.captions == ["0", "1", "2"] and found.labels == ["", "", ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_safetensors(tmp_path, dtype):
    path = str(tmp_path / "both.safetensors")
    tensors = {"text_embeds": torch.tensor(TEXTS, dtype=dtype), "image_embeds": torch.tensor(IMAGES, dtype=dtype)}
    save_file(tensors, path)
    found = load_arrays(ArrayFiles.parse(path))
    np.testing.assert_allclose(found.image_embeds[0], [0.6, 0.8], atol=1e-7)
    np.testing.assert_allclose(found.text_embeds[2], [0, 1], atol=1e-7)


@pytest.mark.parametrize(
    "names", [["a", "b"], ["image_embeds"], ["image_a", "image_b", "text"], ["image_text"], ["image_text", "scale"]]
)
def test_safetensors_with_other_tensors(tmp_path, names):
    path = str(tmp_path / "both.safetensors")
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(ValueError, match=f"holds the tensors {', '.join(sorted(names))}: it needs one with 'image'"):
        load_arrays(ArrayFiles.parse(path))


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (IMAGES, TEXTS[:2], r"images.npy has the shape \(3, 2\) and texts.npy \(2, 2\): row i of both is one pair"),
        (IMAGES, np.ones((3, 4)), r"\(3, 2\) and texts.npy \(3, 4\)"),
        (IMAGES[0], TEXTS, r"images.npy has the shape \(2,\): embeddings are \(N, D\)"),
        (np.ones((0, 2)), TEXTS, r"images.npy has the shape \(0, 2\)"),
        (IMAGES, np.ones((3, 2), dtype=np.int64), "texts.npy is of int64: embeddings are floats"),
        (IMAGES, TEXTS + [[1], [np.nan], [np.inf]], "texts.npy has NaN or infinite values, in 2 rows: 1, 2"),
        (IMAGES * [[0], [1], [0]], TEXTS, "images.npy has 2 rows of zeros, which have no direction: 0, 2"),
    ],
)
def test_what_is_no_embedding(write, images, texts, message):
    with pytest.raises(ValueError, match=message):
        load_arrays(write(images, texts))


def test_files_that_can_not_be_read(write, tmp_path):
    write(IMAGES, TEXTS)
    with pytest.raises(FileNotFoundError, match="There is no file captions.npy"):
        load_arrays(ArrayFiles("images.npy", "captions.npy"))
    np.save("objects.npy", np.array([{"a": 1}]), allow_pickle=True)  # pickled
    with pytest.raises(ValueError, match="objects.npy is no array of numbers that can be read"):
        load_arrays(ArrayFiles("images.npy", "objects.npy"))
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.npy is no array of numbers"):
        load_arrays(ArrayFiles("images.npy", "empty.npy"))
    (tmp_path / "both.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="both.safetensors is truncated or no safetensors file"):
        load_arrays(ArrayFiles.parse("both.safetensors"))
    with pytest.raises(FileNotFoundError, match="There is no file none.safetensors"):
        load_arrays(ArrayFiles.parse("none.safetensors"))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_read(write, tmp_path):
    write(IMAGES, TEXTS)
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match="pickled.npy is no array of numbers that can be read"):
        load_arrays(ArrayFiles("images.npy", "pickled.npy"))
    assert not (tmp_path / "touched").exists()


def test_the_words_that_name_arrays():
    assert is_arrays("a.npy") and is_arrays("a.npy,b.npy") and is_arrays("x/y.safetensors")
    assert not is_arrays("outputs/demo") and not is_arrays("owner/name")
    assert ArrayFiles.parse("a.npy,b.npy") == ArrayFiles("a.npy", "b.npy")
    for word in ("a.npy", "a.npy,b.npy,c.npy", "a.npy,b.csv", "a.npy,b.safetensors"):
        with pytest.raises(ValueError, match="images first, `images.npy,texts.npy`, or one file"):
            ArrayFiles.parse(word)
    with pytest.raises(ValueError, match="a.npy,a.npy: images and captions are two arrays"):
        ArrayFiles.parse("a.npy,a.npy")


def test_form_feeds_do_not_end_a_row(tmp_path):
    (tmp_path / "ids.csv").write_text('id,text\na,"one\x0ctwo"\nb,x\u2028y\n', encoding="utf-8")
    (tmp_path / "ids.txt").write_text("a\x0cb\nc\n")
    found = columns_of_rows(2, str(tmp_path / "ids.txt"), f"{tmp_path / 'ids.csv'}:text", f"{tmp_path / 'ids.csv'}:id")
    assert found.image_ids == ["a\x0cb", "c"] and len(set(found.captions)) == 2 and found.labels == ["a", "b"]


def test_ids_and_labels_from_lines_and_columns(tmp_path):
    (tmp_path / "labels.txt").write_text("CT\n\nMR\n")
    table = tmp_path / "pairs.csv"
    table.write_text('image,caption\na,"One, with a\nbreak"\na,x\nb,X\n', encoding="utf-8-sig")
    places = (f"{table}:image", f"{table}:caption", str(tmp_path / "labels.txt"))
    found = columns_of_rows(3, *places)
    assert found.image_ids == ["a", "a", "b"] and found.labels == ["CT", "", "MR"]
    assert len(set(found.captions)) == 3  # "x" and "X" are different ids
    with pytest.raises(ValueError, match="labels: .*labels.txt has 3 rows and there are 4 pairs"):
        columns_of_rows(4, labels=places[2])
    with pytest.raises(ValueError, match="labels: .* has no column 'capton'. Did you mean 'caption'?"):
        columns_of_rows(3, labels=f"{table}:capton")
    with pytest.raises(ValueError, match="image_ids: .* has several columns; name one, as in .*pairs.csv:COLUMN"):
        columns_of_rows(3, image_ids=str(table))
    with pytest.raises(FileNotFoundError, match="caption_ids: there is no file none.txt"):
        columns_of_rows(3, caption_ids="none.txt")


@pytest.mark.parametrize("setting", ["image_ids", "caption_ids"])
def test_rows_without_an_id_are_not_one_image(tmp_path, setting):
    table, lines = tmp_path / "ids.csv", tmp_path / "ids.txt"
    table.write_text('id,label\na,CT\n,\nb,MR\n"  ",\n')
    lines.write_text("a\n\nb\n \n")
    message = r"has no id in 2 of 4 rows \(counted from 0: 1, 3\): give each an id of its own, or leave "
    for place in (f"{table}:id", str(lines)):
        with pytest.raises(ValueError, match=f"{setting}: .*{message}{setting} out"):
            columns_of_rows(4, **{setting: place})
    assert columns_of_rows(4, labels=f"{table}:label").labels == ["CT", "", "MR", ""]  # that is no label


def test_columns_of_a_csv_with_semicolons(tmp_path):
    (tmp_path / "pairs.csv").write_text('label;size\nCT;3,5\n"M;R";\n')
    assert read_lines("labels", f"{tmp_path / 'pairs.csv'}:label", 2) == ["CT", "M;R"]
    assert read_lines("labels", f"{tmp_path / 'pairs.csv'}:size", 2) == ["3,5", ""]
    (tmp_path / "one.csv").write_text('"CT; MR, or both"\n1\n2\n')  # a single column all the same
    assert read_lines("labels", f"{tmp_path / 'one.csv'}:CT; MR, or both", 2) == ["1", "2"]
    with pytest.raises(ValueError, match="labels: .* has no column 'labl'. Did you mean 'label'"):
        read_lines("labels", f"{tmp_path / 'pairs.csv'}:labl", 2)


@pytest.mark.parametrize("name", ["table.tsv", "TABLE.TSV"])
def test_a_table_separated_by_tabs(tmp_path, name):
    rows = ["image\tcaption\tlabel", "a.png\tOne, two.\tCT", 'b.png\t"Three\nfour"\t', "a.png\tFive\tMR"]
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    table = tmp_path / name
    found = columns_of_rows(3, f"{table}:image", f"{table}:caption", f"{table}:label")
    assert (found.image_ids, found.captions, found.labels) == (
        ["a.png", "b.png", "a.png"],
        list("012"),
        ["CT", "", "MR"],
    )
    with pytest.raises(ValueError, match="has several columns; name one, as in"):
        columns_of_rows(4, labels=str(table))  # whose first line is no label


def test_an_empty_line_of_a_single_column_is_a_row(tmp_path):
    """As of a text file, where it is no label; a line of several columns has their separators."""
    (tmp_path / "one.csv").write_text("label\nCT\n\nMR\n\n")
    assert read_lines("labels", f"{tmp_path / 'one.csv'}:label", 4) == ["CT", "", "MR", ""]
    assert read_lines("labels", f"{tmp_path / 'one.csv'}:label", 3) == ["CT", "", "MR"]  # the last one ends the file
    (tmp_path / "two.csv").write_text('number,label\n1,CT\n2,\n3,"M\nR"\n4\n\n')
    assert read_lines("labels", f"{tmp_path / 'two.csv'}:label", 4) == ["CT", "", "M\nR", ""]


def test_a_table_with_an_open_quotation_mark(tmp_path):
    (tmp_path / "open.csv").write_text('label,size\nCT,"5 inches\n' + "MR,4 inches\n" * 20_000)
    with pytest.raises(ValueError, match="labels: .*open.csv is no table that can be read .* quotation mark"):
        read_lines("labels", f"{tmp_path / 'open.csv'}:label", 20_001)
