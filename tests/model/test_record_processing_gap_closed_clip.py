"""Rows of records to tensors, held against values worked out by hand; and what is said of bad ones."""

import datetime
import decimal
import json
import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor


AGE = {"name": "age", "kind": "number", "mean": 50.0, "std": 10.0}
SEX = {"name": "sex", "kind": "category", "categories": ["female", "male"]}
BIRTH = {"name": "birth", "kind": "date", "relative_to": "study", "mean": 40.0, "std": 20.0}


@pytest.fixture
def processor() -> RecordProcessor:
    return RecordProcessor([SEX, AGE, BIRTH])


def test_tensors_are_as_written_out(processor):
    rows = [
        {"age": 62, "sex": " Female\n", "birth": "1960-01-01", "study": "2020-01-01"},
        {"age": "35.5", "sex": "other", "birth": None, "study": "2020-01-01"},
        None,
        {"age": float("nan"), "sex": ""},
        {"age": "", "birth": datetime.date(2000, 6, 1), "study": ""},
    ]
    batch = processor(rows)
    years = 21915 / 365.25  # days from 1960-01-01 to 2020-01-01
    expected = [[1.2, (years - 40) / 20], [-1.45, 0], [0, 0], [0, 0], [0, 0]]
    np.testing.assert_allclose(batch["numbers"].numpy(), expected, rtol=1e-6)
    assert batch["numbers_mask"].tolist() == [[True, True], [True, False], [False] * 2, [False] * 2, [False] * 2]
    assert batch["categories"].tolist() == [[2], [1], [0], [0], [0]]
    assert [batch[name].dtype for name in ("numbers", "numbers_mask", "categories")] == [
        torch.float32,
        torch.bool,
        torch.int64,
    ]
    assert (processor.num_numbers, processor.category_sizes) == (2, [4])
    assert processor.field_names == ["age", "birth", "sex"]
    assert processor.column_names == ["sex", "age", "birth", "study"]


@pytest.mark.parametrize(
    "rows",
    [
        {"age": [60, None], "sex": ["male", None]},
        {"age": np.array([60.0, np.nan]), "sex": np.array(["male", ""])},
        pd.DataFrame({"age": [60, None], "sex": ["male", None]}),
        pd.DataFrame({"age": pd.array([60, pd.NA], "Int64"), "sex": pd.array(["MALE", pd.NA], "string")}),
        [{"age": np.int64(60), "sex": np.str_("male")}, {}],
        [{"age": torch.tensor(60), "sex": "male"}, {"age": np.float32("nan")}],
        [{"age": decimal.Decimal(60), "sex": "male"}, None],
    ],
    ids=["columns", "arrays", "data frame", "nullable data frame", "numpy", "tensor", "decimal"],
)
def test_rows_of_every_form(rows):
    batch = RecordProcessor([AGE, SEX])(rows)
    assert batch["numbers"].tolist() == [[1.0], [0.0]] and batch["numbers_mask"].tolist() == [[True], [False]]
    assert batch["categories"].tolist() == [[3], [0]]


def test_one_row_and_other_tensors():
    processor = RecordProcessor([AGE, SEX])
    for age in (60, np.array(60), torch.tensor(60.0)):  # a value, and no column
        assert processor({"age": age})["numbers"].tolist() == [[1.0]]
    assert processor(None)["numbers_mask"].tolist() == [[False]]
    assert processor([])["numbers"].shape == (0, 1)
    assert isinstance(processor({"age": 60}, return_tensors="np")["categories"], np.ndarray)
    assert processor({"age": 60}, return_tensors=None)["numbers"] == [[1.0]]


def test_what_fit_learns():
    rows = [
        {"age": "20", "sex": "F", "smoker": True, "study": "2020-03-01", "grade": "II"},
        None,
        {"age": 40, "sex": "m", "smoker": None, "study": "2021-03-01 08:15", "grade": ""},
        {"age": None, "sex": "f ", "smoker": False, "study": None, "grade": "iii"},
        {"age": 60.0, "sex": "F", "smoker": True, "study": "2020-03-01", "grade": "II"},
    ]
    fields = {field.pop("name"): field for field in RecordProcessor.fit(rows).fields}
    assert fields["age"] == {"kind": "number", "mean": 40.0, "std": pytest.approx(math.sqrt(800 / 3))}
    assert fields["sex"] == {"kind": "category", "categories": ["F", "m"]}
    assert fields["smoker"] == {"kind": "category", "categories": ["true", "false"]}
    assert fields["grade"] == {"kind": "category", "categories": ["II", "iii"]}
    years = np.array([365, 0, 365]) / 365.25
    assert fields["study"]["relative_to"] == "2021-03-01" and fields["study"]["allow_later"] is True
    assert fields["study"]["mean"] == pytest.approx(years.mean()) and fields["study"]["std"] == pytest.approx(
        years.std()
    )


def test_a_description_goes_before_what_would_be_guessed():
    rows = [{"ward": 3, "age": 20, "sex": "male"}, {"ward": 4, "age": 30, "sex": "female"}]
    ward, age = {"name": "ward", "kind": "category"}, {"name": "age", "kind": "number", "mean": 0}
    processor = RecordProcessor.fit(rows, [ward, age, SEX])
    assert processor.fields == [
        {"name": "ward", "kind": "category", "categories": ["3", "4"]},
        {"name": "age", "kind": "number", "mean": 0, "std": 5.0},
        SEX,
    ]
    assert processor({"ward": 4.0})["categories"].tolist() == [[3, 0]]
    assert RecordProcessor.fit(rows, ["sex"]).field_names == ["sex"]


def test_a_date_may_be_later_where_its_field_says_so():
    late = {"birth": "2021-01-01", "study": "2020-01-01"}
    assert RecordProcessor([BIRTH | {"allow_later": True}])([late])["numbers"].item() < -2
    fitted = RecordProcessor.fit([{"seen": "2020-01-01"}, {"seen": "2010-01-01"}])
    assert fitted({"seen": "2024-05-01"})["numbers"].item() < 0  # rows to come are later than those of training


def test_a_saved_schema_is_the_same(processor):
    saved = json.loads(json.dumps(processor.to_dict()))
    assert saved["modality_processor_type"] == "RecordProcessor"
    assert RecordProcessor.from_dict(saved) == processor


def test_a_field_that_no_row_has_is_told_once(processor, caplog):
    logging.getLogger("transformers").propagate = True
    rows = [{"age": 1}, {"age": 2, "sex": None}, None]
    processor(rows), processor(rows)
    told = [record.getMessage() for record in caplog.records]
    assert [message.split("'")[1] for message in told] == ["birth", "study"]
    processor([{"age": 1}])
    assert len(caplog.records) == 2


GOOD = {"age": 62, "sex": "male", "birth": "1960-01-01", "study": "2020-01-01"}
# What is wrong with a record, and what is said of it: the table of docs/modalities.md.
BAD = {
    "a string where a number belongs": (
        {"age": "about sixty"},
        "Record, row 1 (from 0), field 'age': 'about sixty' is no number. Correct it, or leave it empty (None) where "
        "it is not known. If the field holds words, it is a category.",
    ),
    "a decimal comma": ({"age": "62,5"}, "field 'age': '62,5' is no number."),
    "a boolean where a number belongs": ({"age": True}, "field 'age': True is no number."),
    "an infinite number": ({"age": math.inf}, "field 'age': inf is infinite. Correct it, or leave it empty"),
    "a written infinity": ({"age": "-inf"}, "field 'age': '-inf' is infinite."),
    "an endless number": ({"age": 10**400}, "is infinite."),
    "a number beyond float32": ({"age": 1e300}, "field 'age': 1e+300 is beyond what can be computed with."),
    "a field too many": (
        {"agee": 62},
        "Record, row 1 (from 0), field 'agee' with the value 62: the schema has no such field. Did you mean 'age'? "
        "Its fields are: sex, age, birth, study. Leave it out, or rename it.",
    ),
    "no date": ({"birth": "60s"}, "field 'birth': '60s' is no date. Write it as 2021-03-31."),
    "a day that is not there": ({"birth": "2019-02-30"}, "'2019-02-30' is no date."),
    "a number where a date belongs": ({"birth": 1960}, "field 'birth': 1960 is no date."),
    "no date beside it": ({"study": "soon"}, "field 'birth': study is 'soon' is no date."),
    "a date in the future": (
        {"birth": "2031-05-01"},
        "Record, row 1 (from 0), field 'birth': 2031-05-01 lies after 2020-01-01 (study), which it is relative to. "
        "Correct it, or leave it empty (None) where it is not known. If it may be later, describe the field with "
        '"allow_later": true.',
    ),
    "a list": (
        {"sex": ["male", "female"]},
        "Record, row 1 (from 0), field 'sex': ['male', 'female'] is of type list; a field takes one text, number, "
        "boolean or date. Make a field of each value.",
    ),
    "an array": ({"age": np.array([1.0, 2.0])}, "is of type ndarray; a field takes one"),
    "a nested dict": (
        {"sex": {"at birth": "male"}},
        "field 'sex': {'at birth': 'male'} is a mapping; a field takes one",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_is_told(processor, changed, message):
    with pytest.raises(ValueError) as error:
        processor([GOOD, GOOD | changed])
    assert message in str(error.value)
    assert "row 1 (from 0)" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  ", np.nan, pd.NA, pd.NaT, np.datetime64("NaT")])
def test_what_is_missing_is_no_error(processor, missing):
    batch = processor([dict.fromkeys(GOOD, missing), {}])
    assert not batch["numbers_mask"].any() and not batch["categories"].any() and not batch["numbers"].any()


def test_an_unknown_category_is_unknown(processor):
    assert processor([GOOD | {"sex": "diverse"}])["categories"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("age", "give a list of mappings"),
        (5, "give a list of mappings"),
        ([[1, 2]], r"row 0 \(from 0\): it is \[1, 2\]; a row is a mapping"),
        ({"age": [1, 2], "sex": ["male"]}, "of different lengths: {'age': 2, 'sex': 1}"),
    ],
)
def test_what_are_no_rows(processor, rows, message):
    with pytest.raises(ValueError, match=message):
        processor(rows)


def column(values) -> list[dict]:
    return [{"it": value} for value in values]


REPORTS = [f"Axial image {i} shows a lesion of the {i}th segment, unchanged since the last visit." for i in range(60)]
UNFIT = {
    "all missing": (
        column([None, "", math.nan]),
        "field 'it': it is empty in every training row. Leave the field out.",
    ),
    "one number": (column([52, None, "52"]), "it is 52 in every training row that has it, and so tells nothing."),
    "free text": (column(REPORTS), "which is for the text tower: make it part of the caption."),
    "an identifier": (column(f"P{i:05d}" for i in range(99)), "an identifier tells nothing of other patients."),
    "too many categories": (
        column(f"id {i}" for i in range(20_000)),
        "field 'it': it has 20,000 categories, more than 10,000: most are too rare to be learned, and an "
        "identifier tells nothing of other patients. Leave the field out, or group its values first.",
    ),
    "numbers and words": (
        column([1, 2, 3, "old"]),
        "field 'it': most of its values are numbers, but 1 are not ('old'). Correct those or leave them empty, or "
        'describe the field: {"name": "it", "kind": "number"} or "category".',
    ),
    "dates and words": (column(["2020-01-01", "2020-01-02", "soon"]), "most of its values are dates, but 1 are not"),
    "a decimal comma": (
        column(["19,4", "20", "-0,5"]),
        "field 'it': its values are numbers with a decimal comma ('19,4', '20', '-0,5'). Write them with a point. If "
        'they are none, describe the field: {"name": "it", "kind": "category"}.',
    ),
    "ages of DICOM": (
        column(f"{i:03d}Y" for i in range(20, 40)),
        "its values are numbers with a unit ('020Y', '021Y', '022Y', ...). Write the numbers alone, all in one unit.",
    ),
    "doses": (column(f"{i / 2} mg/kg" for i in range(20)), "its values are numbers with a unit ('0.0 mg/kg', "),
    "dates as in Germany": (
        column(["31.03.2021", "1.4.21"]),
        "its values are dates in another form than ISO's ('31.03.2021', '1.4.21'). Write them as 2021-03-31.",
    ),
    "dates as in the USA": (column(["03/31/2021", "4/1/2021"]), "dates in another form than ISO's ('03/31/2021',"),
    "dates of DICOM": (
        column(["20210331", 19891224]),
        "its values are dates without hyphens ('20210331', '19891224'). Write them as 2021-03-31. If they are none, "
        'describe the field: {"name": "it", "kind": "number"}.',
    ),
    "a list": (column([1, [2]]), "Record, row 1 (from 0), field 'it': [2] is of type list"),
    "no record": ([None, None], "There are no fields to learn: no row has a record."),
}


@pytest.mark.parametrize(("rows", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_learned_is_told(rows, message):
    with pytest.raises(ValueError) as error:
        RecordProcessor.fit(rows)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1.5T", "3T", "1.5 T"] * 20, "category"),  # few that differ
        ([f"T{i}" for i in range(12)] * 3, "category"),
        (["L4/5", "L5", "1,2 and 3"] * 9, "category"),
        ([20210331, 20211331], "number"),  # there is no 13th month
        ([19.4, "20"], "number"),
    ],
)
def test_what_looks_like_another_form_of_a_number_or_date_and_is_none(values, kind):
    (field,) = RecordProcessor.fit(column(values)).fields
    assert field["kind"] == kind


def test_a_description_goes_before_the_form_of_values():
    described = [{"name": "it", "kind": "number"}]
    (field,) = RecordProcessor.fit(column([20210331, 20210401]), described).fields
    assert field["mean"] == 20210366
    described = [{"name": "it", "kind": "category"}]
    assert RecordProcessor.fit(column(["31.03.2021", "01.04.2021"] * 5), described).category_sizes == [4]


def test_a_described_category_may_be_rare_but_not_a_million():
    described = [{"name": "it", "kind": "category"}]
    assert RecordProcessor.fit(column(REPORTS), described).category_sizes == [62]
    with pytest.raises(ValueError, match="more than 10,000"):
        RecordProcessor.fit(column(f"id {i}" for i in range(10_001)), described)


def test_of_the_rows_without_a_record_the_numbers_are_right():
    with pytest.raises(ValueError, match=r"row 2 \(from 0\), field 'age': 'x' is no number"):
        RecordProcessor.fit([{"age": 1}, None, {"age": "x"}], [{"name": "age", "kind": "number"}])


def test_fields_that_are_not_there():
    with pytest.raises(ValueError, match="field 'gae': no row has 'gae'. Did you mean 'age'"):
        RecordProcessor.fit([{"age": 1}], ["gae"])
    with pytest.raises(ValueError, match="field 'birth': no row has 'study'"):
        RecordProcessor.fit([{"birth": "1990-01-01"}], [{"name": "birth", "kind": "date", "relative_to": "study"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "A record has no fields"),
        ([{"kind": "number"}], "describe it as"),
        ([{"name": "a", "kind": "text"}], "The field 'a' is of kind 'text'; known are number, category, date."),
        ([AGE, AGE], "two fields of the name 'age'"),
        ([AGE | {"max": 3}], "unknown key 'max'; a number has mean, std."),
        ([AGE | {"std": 0}], "The field 'age': its std is 0; it must be above 0."),
        ([AGE | {"mean": "x"}], "its mean is 'x'; it must be a number."),
        ([{"name": "age", "kind": "number"}], "'age' has no mean and no std: learn them from training rows"),
        ([SEX | {"categories": ["m", "M "]}], "two differ in nothing but case or white space"),
        ([SEX | {"categories": "mf"}], "must be a list of words"),
        ([BIRTH | {"relative_to": 5}], "its relative_to is 5; it must be a date or the name of a column."),
    ],
)
def test_a_bad_schema_is_told(fields, message):
    with pytest.raises(ValueError) as error:
        RecordProcessor(fields)
    assert message in str(error.value)


def test_arrays_of_one_shape():
    processor = ArrayProcessor("input_values", [2, 2])
    batch = processor([np.arange(4).reshape(2, 2), None, [[4, 5], [6, 7]], torch.ones(2, 2, dtype=torch.bfloat16)])
    expected = [[[0, 1], [2, 3]], [[0, 0], [0, 0]], [[4, 5], [6, 7]], [[1, 1], [1, 1]]]
    assert batch["input_values"].tolist() == expected and batch["input_values"].dtype == torch.float32
    assert processor(np.ones((3, 2, 2)))["input_values"].shape == (3, 2, 2)
    assert processor(np.ones((2, 2)))["input_values"].shape == (1, 2, 2)
    assert ArrayProcessor.from_dict(json.loads(json.dumps(processor.to_dict()))) == processor


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3)), r"input_values\[1\] has the shape \(2, 3\), not \(2, 2\): cut or pad it first."),
        ([[1, 2], [3, math.nan]], r"input_values\[1\] has values that are NaN or infinite"),
        ([["a", "b"]], r"input_values\[1\] is no array of numbers"),
        ([[1, 2], [3]], r"input_values\[1\] is no array of numbers"),
    ],
)
def test_a_bad_array_is_told(array, message):
    with pytest.raises(ValueError, match=message):
        ArrayProcessor("input_values", (2, 2))([None, array])


@pytest.mark.parametrize(("name", "shape"), [("", [2]), ("a b", [2]), ("a", []), ("a", [0]), ("a", ["b"])])
def test_a_bad_description_of_arrays(name, shape):
    with pytest.raises(ValueError, match="it must"):
        ArrayProcessor(name, shape)
