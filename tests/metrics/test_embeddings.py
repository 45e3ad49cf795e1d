"""Arrays are measured where they are, and give what lists give: the same values, the same errors."""

import evaluate
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from gap_closed_clip.metrics._embeddings import UnitRows

from .conftest import random_pairs, traced_peak


NAMES = ("modality_gap", "cross_modal_retrieval", "cross_modal_grouping", "clip_score")


def inputs_of(name: str, n: int = 40, dim: int = 6) -> dict[str, np.ndarray | list]:
    """All inputs of the metric, with repeated ids and one to three references."""
    image, text = random_pairs(n, dim)
    random = np.random.default_rng(1)
    if name == "clip_score":
        references = [random.normal(size=(1 + row % 3, dim)).astype(np.float32) for row in range(n)]
        return {"image_embeds": image, "caption_embeds": text, "reference_embeds": references}
    inputs = {"image_embeds": image, "text_embeds": text}
    if name != "modality_gap":
        inputs |= {"image_ids": [f"i{k}" for k in random.integers(0, 30, n)]}
        inputs |= {"caption_ids": [f"c{k}" for k in random.integers(0, 35, n)]}
    return inputs | ({"labels": [f"group {k % 3}" for k in range(n)]} if name == "cross_modal_grouping" else {})


def as_lists(inputs: dict[str, np.ndarray | list]) -> dict[str, list]:
    """Plain Python."""
    return {
        name: [row.tolist() if isinstance(row, np.ndarray) else row for row in column]
        for name, column in inputs.items()
    }


def through_arrow(metric: evaluate.Metric, inputs: dict) -> dict[str, float]:
    """The way by which `evaluate` passes what was added before."""
    metric.add_batch(**as_lists(inputs))
    return metric.compute()


def embeddings_as(inputs: dict, convert) -> dict:
    return {name: convert(column) if isinstance(column, np.ndarray) else column for name, column in inputs.items()}


@pytest.fixture
def no_arrow(monkeypatch):
    """Whatever would pass through `evaluate`'s file or buffer fails."""
    monkeypatch.setattr(evaluate.EvaluationModule, "add_batch", lambda *_, **__: pytest.fail("through Arrow"))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_give_what_lists_give(load, name):
    metric, inputs = load(name), inputs_of(name)
    expected = through_arrow(metric, inputs)
    assert metric.compute(**inputs) == expected
    assert metric.compute(**as_lists(inputs)) == expected
    assert all(np.isfinite(value) for value in expected.values())


CONVERSIONS = {
    "float64": lambda z: z.astype(np.float64),
    "float16": lambda z: z.astype(np.float16),
    "transposed": np.asfortranarray,
    "every other row": lambda z: np.repeat(z, 2, axis=0)[::2],
    "list of arrays": list,
    "tensor": torch.from_numpy,
    "tensor with gradients": lambda z: torch.from_numpy(z).requires_grad_(),
    "float64 tensor": lambda z: torch.from_numpy(z).double(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", ["modality_gap", "cross_modal_retrieval", "clip_score"])
def test_kinds_of_arrays(load, no_arrow, name, conversion):
    metric, inputs = load(name), inputs_of(name)
    if conversion == "float16":
        inputs = embeddings_as(inputs, lambda z: z.astype(np.float16).astype(np.float32))
    expected = metric.compute(**inputs)
    assert metric.compute(**embeddings_as(inputs, CONVERSIONS[conversion])) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 100])
def test_columns_of_a_data_frame(load, name, first):
    """Of some rows of a larger one, say, whose index does not begin at 0."""
    inputs = inputs_of(name)
    frame = pandas.DataFrame({key: list(column) for key, column in inputs.items()}, index=range(first, first + 40))
    expected = load(name).compute(**inputs)
    assert load(name).compute(**{key: frame[key] for key in inputs}) == expected
    matrix = pandas.DataFrame(inputs["image_embeds"], index=frame.index)
    assert load(name).compute(**{**inputs, "image_embeds": matrix}) == expected
    metric = load(name)
    for rows in (slice(0, 25), slice(25, 40)):
        metric.add_batch(**{key: frame[key].iloc[rows] for key in inputs})
    assert metric.compute() == pytest.approx(expected, nan_ok=True)


def test_bfloat16(load, no_arrow):
    image, text = (torch.from_numpy(z).bfloat16() for z in random_pairs(20, 8))
    found = load("modality_gap").compute(image_embeds=image, text_embeds=text)
    assert found == load("modality_gap").compute(image_embeds=image.float(), text_embeds=text.float())


def test_float64_values_are_read_as_float32(load):
    """As the features say; the last digits of float64 count in neither way."""
    image, text = np.random.default_rng(0).normal(size=(2, 20, 8))
    metric = load("modality_gap")
    found = metric.compute(image_embeds=image, text_embeds=text)
    assert found == metric.compute(image_embeds=image.tolist(), text_embeds=text.tolist())
    assert found == metric.compute(image_embeds=image.astype(np.float32), text_embeds=text.astype(np.float32))


def outcome(metric: evaluate.Metric, inputs: dict) -> tuple[type, str] | dict[str, float]:
    try:
        return metric.compute(**inputs)
    except Exception as error:
        return type(error), str(error).split("Input ")[0]  # arrays are printed in another way than lists are


FAULTS = {
    "zero": lambda image, text: (image, text * np.where(np.arange(9) == 3, 0, 1)[:, None].astype(np.float32)),
    "nan": lambda image, text: (np.where(np.arange(9) == 5, np.nan, 1)[:, None].astype(np.float32) * image, text),
    "infinite in float32": lambda image, text: (image.astype(np.float64) * 1e39, text),
    "no row": lambda image, text: (image[:0], text[:0]),
    "no dimension": lambda image, text: (image[:, :0], text[:, :0]),
    "other dimension": lambda image, text: (image, text[:, :3]),
    "other number of rows": lambda image, text: (image, text[:8]),
    "one axis": lambda image, text: (image[0], text[0]),
    "three axes": lambda image, text: (image[:, None], text[:, None]),
    "integers": lambda image, text: (np.ones((9, 4), np.int64), np.ones((9, 4), np.int64)),
    "booleans": lambda image, text: (np.ones((9, 4), bool), np.ones((9, 4), bool)),
    "strings": lambda image, text: (np.full((9, 4), "a"), text),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["modality_gap", "cross_modal_retrieval", "clip_score"])
def test_faults_are_told_as_of_lists(load, name, fault):
    """What is no fault to `evaluate`, as integers, is none here."""
    image, text = FAULTS[fault](*random_pairs(9, 4))
    names = ("image_embeds", "caption_embeds" if name == "clip_score" else "text_embeds")
    metric = load(name, keep_in_memory=True)
    of_arrays = outcome(metric, dict(zip(names, (image, text), strict=True)))
    of_lists = outcome(metric, dict(zip(names, (image.tolist(), text.tolist()), strict=True)))
    assert of_arrays == of_lists
    assert isinstance(of_arrays, dict) == (fault in ("integers", "booleans"))


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_complex_numbers_are_refused(load):
    image, text = (z.astype(np.complex64) for z in random_pairs(5, 4))
    with pytest.raises(pyarrow.ArrowNotImplementedError):
        load("modality_gap").compute(image_embeds=image, text_embeds=text)


@pytest.mark.parametrize("ids", [["a", 1, "b"], [1, 2, 3], ["a", None, "b"], ["a", "b"]])
def test_ids_are_checked_as_beside_lists(load, ids):
    image, text = random_pairs(3, 4)
    kwargs = {"image_ids": ids, "caption_ids": ["p", "q", "r"]}
    of_arrays = outcome(load("cross_modal_retrieval"), {"image_embeds": image, "text_embeds": text, **kwargs})
    lists = {"image_embeds": image.tolist(), "text_embeds": text.tolist()}
    assert of_arrays == outcome(load("cross_modal_retrieval"), lists | kwargs)


@pytest.mark.parametrize("name", ["cross_modal_retrieval", "cross_modal_grouping", "mixed_gallery_search"])
@pytest.mark.parametrize(
    "convert", [list, np.array, torch.tensor, pandas.Series, lambda numbers: [float(number) for number in numbers]]
)
def test_ids_and_labels_may_be_whole_numbers(load, name, convert):
    image, text = random_pairs(12, 4)
    numbers = {"image_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10], "caption_ids": [7, *range(20, 31)]}
    numbers |= {} if name == "cross_modal_retrieval" else {"labels": 4 * [0, 1, 2]}
    strings = {column: [str(value) for value in values] for column, values in numbers.items()}
    numbers = {column: convert(values) for column, values in numbers.items()}
    metric, vectors = load(name), {"image_embeds": image, "text_embeds": text}
    expected = metric.compute(**vectors, **strings)
    assert metric.compute(**vectors, **numbers) == expected
    for rows in (slice(0, 5), slice(5, 12)):
        metric.add_batch(**{column: values[rows] for column, values in (vectors | numbers).items()})
    assert metric.compute() == expected


@pytest.mark.parametrize("name", ["image_ids", "caption_ids"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"row 2 has none \(None\): give each row an id of its own, or leave {name} out"),
        (np.nan, r"row 2 has none \(nan\): give each row"),
        (pandas.NA, r"row 2 has none \(<NA>\): give each row"),
        (1.5, "row 2 is 1.5: ids are strings or whole numbers"),
        (np.inf, "row 2 is inf: ids are strings"),
        (["a"], r"row 2 is \['a'\]: ids are strings"),
    ],
)
def test_what_is_no_id_is_named(load, name, value, message):
    """In every way that a metric takes rows; NaN was an id "nan" which all such rows had in common."""
    image, text = random_pairs(3, 4)
    inputs = {"image_embeds": image, "text_embeds": text, name: ["a", "b", value]}
    metric = load("cross_modal_retrieval")
    for take in (metric.compute, metric.add_batch):
        with pytest.raises(ValueError, match=f"{name}: {message.format(name=name)}"):
            take(**inputs)


def test_what_was_added_before_counts(load):
    image, text = random_pairs(12, 5)
    metric = load("modality_gap")
    metric.add_batch(image_embeds=image[:7], text_embeds=text[:7])
    together = metric.compute(image_embeds=image[7:], text_embeds=text[7:])
    assert together == metric.compute(image_embeds=image, text_embeds=text)


def test_in_memory(load):
    image, text = random_pairs(12, 5)
    metric = load("modality_gap", keep_in_memory=True)
    expected = metric.compute(image_embeds=image, text_embeds=text)
    metric.add_batch(image_embeds=image, text_embeds=text)
    assert metric.compute() == expected


def test_combined(load):
    """Without ids two metrics have the same inputs; added rows need all names."""
    image, text = random_pairs(12, 5)
    vectors = {"image_embeds": image, "text_embeds": text}
    metrics = [load("modality_gap"), load("cross_modal_retrieval")]
    expected = metrics[0].compute(**vectors) | metrics[1].compute(**vectors)
    combined = evaluate.combine(metrics)
    assert combined.compute(**vectors) == expected
    for rows in (slice(0, 5), slice(5, 12)):
        combined.add_batch(image_embeds=image[rows], text_embeds=text[rows], image_ids=None, caption_ids=None)
    assert combined.compute() == expected


@pytest.mark.parametrize("name", ["modality_gap", "clip_score"])
def test_arrays_are_not_copied(load, name):
    """Two arrays of 10 MB; as Python floats each would take 60 MB and more."""
    image, text = random_pairs(20_000, 128)
    other = "caption_embeds" if name == "clip_score" else "text_embeds"
    metric = load(name)
    with traced_peak() as peak:
        metric.compute(**{"image_embeds": image, other: text})
    assert peak.bytes < 8e6


def test_unit_rows():
    matrix = random_pairs(2500, 3)[0]  # more than two blocks
    rows = UnitRows(matrix, "z")
    expected = matrix.astype(np.float64) / np.sqrt((matrix.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    for selection in (slice(None), slice(1020, 1030), [2400, 3, 3], np.arange(2500) % 2 == 0, 2047):
        np.testing.assert_allclose(rows[selection], expected[selection], rtol=0, atol=1e-15)
    assert rows[:].dtype == np.float64 and len(rows) == 2500 and rows.dim == 3
    matrix[2300] = np.nan
    with pytest.raises(ValueError, match="z: row 2300 holds NaN"):
        UnitRows(matrix, "z")
