"""Fields of records from captions against a naive search, and what captions give away."""

import datetime
import decimal

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings
from gap_closed_clip.evaluation.modality_report import what_captions_tell
from gap_closed_clip.evaluation.modality_values import values_of
from gap_closed_clip.evaluation.record_fields import field_told_in_captions, predict_record_fields

from .records import of_three


def with_records(embeddings, rows) -> PairEmbeddings:
    embeddings.values["record"] = values_of(rows)
    return embeddings


def naive(embeddings, field: str, k: int) -> tuple[list, list]:
    """Truth, and the vote of the k nearest records of samples that share neither image nor caption."""
    records = embeddings.values["record"].records
    rows = [i for i, row in enumerate(records) if row and field in row and embeddings.present["text"][i]]
    truth, found = [], []
    for i in rows:
        others = [
            j
            for j in rows
            if embeddings.image_ids[j] != embeddings.image_ids[i] and embeddings.captions[j] != embeddings.captions[i]
        ]
        cosines = {j: float(embeddings.text_embeds[i] @ embeddings.further["record"][j]) for j in others}
        near = sorted(others, key=lambda j: -cosines[j])[:k]
        values = [records[j][field] for j in near]
        truth.append(records[i][field])
        if isinstance(values[0], str):
            votes = {
                value: (values.count(value), sum(cosines[j] for j in near if records[j][field] == value))
                for value in values
            }
            found.append(max(votes, key=votes.get))
        else:
            found.append(float(np.median(values)))
    return truth, found


def test_against_a_naive_search():
    embeddings = of_three(n=80, lacking=0.2)
    embeddings.image_ids[:] = [f"i{k // 2}" for k in range(80)]  # partners share theirs, and know each other's record
    result = predict_record_fields(embeddings, "record", block_size=7)
    for k in (1, 10):
        truth, found = naive(embeddings, "sex", k)
        right = np.mean([a == b for a, b in zip(truth, found, strict=True)])
        assert result[f"text_to_record[sex]_accuracy@{k}"] == pytest.approx(right)
        balanced = balanced_accuracy_score(truth, found)
        assert result[f"text_to_record[sex]_balanced_accuracy@{k}"] == pytest.approx(balanced)
        truth, found = naive(embeddings, "age", k)
        assert result[f"text_to_record[age]_mae@{k}"] == pytest.approx(np.abs(np.subtract(truth, found)).mean())
    ages = np.array(truth)
    assert result["text_to_record[age]_median_mae"] == pytest.approx(np.abs(ages - np.median(ages)).mean())
    sexes = naive(embeddings, "sex", 1)[0]
    most = max(sexes.count("male"), sexes.count("female")) / len(sexes)
    assert result["text_to_record[sex]_majority_accuracy"] == pytest.approx(most)
    assert result["text_to_record[sex]_chance_balanced_accuracy"] == 0.5


def test_a_space_that_knows_the_field_beats_the_majority():
    """The record says the sex alone, and so does the text."""
    random = np.random.default_rng(0)
    sexes = random.integers(0, 2, 100)
    embeddings = of_three(n=100)
    axis = np.eye(24)[0]
    for z in (embeddings.text_embeds, embeddings.further["record"]):
        z += (3 * np.where(sexes, 1, -1)[:, None] * axis).astype(np.float32)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    result = predict_record_fields(with_records(embeddings, [{"sex": "fm"[sex]} for sex in sexes]), "record")
    assert result["text_to_record[sex]_accuracy@10"] == 1 > result["text_to_record[sex]_majority_accuracy"]


def test_kinds_of_fields():
    rows = [
        {
            "born": datetime.date(1950 + k % 7, 1, 1) if k % 2 else f"{1950 + k % 7}-01-01",
            "size": str(k % 5),
            "smoker": k % 3 == 0,
            "hospital": "one",
            "note": f"a text of its own, {k}",
        }
        for k in range(20)
    ]
    result = predict_record_fields(with_records(of_three(n=20), rows), "record")
    kinds = {name.split("]")[0].split("[")[1]: "mae" if "mae" in name else "accuracy" for name in result}
    assert kinds == {"born": "mae", "size": "mae", "smoker": "accuracy"}  # one value, and free text, are left out
    assert 1 < result["text_to_record[born]_median_mae"] < 3  # years


@pytest.mark.parametrize(
    ("write", "same"),
    [
        (lambda age: decimal.Decimal(age), float),
        (lambda age: f"{1950 + age}-03-31T10:30:00", lambda age: datetime.date(1950 + age, 3, 31)),
        (lambda age: np.datetime64(f"{1950 + age}-03-31"), lambda age: datetime.date(1950 + age, 3, 31)),
        (lambda age: "nan" if age % 2 else "6", lambda age: "odd" if age % 2 else "even"),  # no number to a schema
        (lambda age: datetime.time(age % 3), lambda age: "abc"[age % 3]),  # which a schema does not take
    ],
)
def test_a_value_counts_as_it_does_in_the_schema(write, same):
    ages = np.random.default_rng(0).integers(20, 30, 40).tolist()
    found, wanted = (
        predict_record_fields(with_records(of_three(n=40), [{"it": kind(age)} for age in ages]), "record")
        for kind in (write, same)
    )
    assert wanted and found == pytest.approx(wanted)


def test_one_family_has_nobody_to_ask():
    embeddings = of_three(n=10)
    embeddings.image_ids[:] = ["the same"] * 10
    result = predict_record_fields(embeddings, "record")
    assert np.isnan(result["text_to_record[age]_mae@1"]) and result["text_to_record[age]_median_mae"] > 0


@pytest.mark.parametrize(
    ("caption", "record", "told"),
    [
        ("A 45-year-old woman.", {"age": 45}, True),
        ("A 45-year-old woman.", {"age": 45.0}, True),
        ("A 45-year-old woman.", {"age": "45"}, True),
        ("A nodule of 4.5 mm.", {"size": 4}, False),
        ("A nodule of 4.5 mm.", {"size": 4.5}, True),
        ("145 slices.", {"age": 45}, False),
        ("A CTA of the chest", {"modality": "CT"}, False),
        ("FEMALE, chest pain", {"sex": "female"}, True),
        ("A female patient", {"sex": "male"}, False),
        ("CT of the Upper  Abdomen", {"place": "upper abdomen"}, True),
        ("CT of the abdomen, upper part", {"place": "upper abdomen"}, False),
        ("Contrast in 4mm slices", {"size": 4}, True),
        ("A nodule in a lobe, ward B.", {"ward": "B"}, True),
        ("There is a nodule.", {"ward": "A"}, False),
        ("A nodule. A lump.", {"ward": "A"}, False),
        ("A nodule, ward A.", {"ward": "A"}, True),
        ("Metastasis in segment m.", {"sex": "M"}, False),
        ("m, 45 years", {"sex": "m"}, False),
        ("IT showed nothing.", {"site": "it"}, False),
        ("Stroke, ICU admission, 3T MR", {"modality": "MR"}, True),
        ("Seen on 2020-01-31.", {"day": datetime.datetime(2020, 1, 31)}, True),  # a parquet file's dates
        ("Seen on 2020-01-31.", {"day": np.datetime64("2020-01-31T10:30")}, True),
        ("Seen on 2020-01-31.", {"day": "2020-01-31 00:00:00"}, True),
        ("Seen on 2020-01-31.", {"day": datetime.datetime(2020, 1, 30)}, False),
        ("Done at 10:30:00.", {"time": datetime.time(10, 30)}, True),
        ("男性 45", {"sex": "男性"}, True),
        ("女性 45", {"sex": "男性"}, False),
        ("Fracture de la m\u00e2choire", {"site": "ma\u0302choire"}, True),  # composed and not
        ("Ma\u0302choire", {"site": "m\u00e2choire"}, True),
    ],
)
def test_what_a_caption_tells(caption, record, told):
    (field,) = record
    assert field_told_in_captions([{"caption": caption, "record": record}]) == {field: float(told)}
    assert field_told_in_captions([{"caption": caption, **record}], [field]) == {field: float(told)}


def test_shares_are_of_those_that_have_both():
    rows = [
        {"caption": "A man of 60.", "record": {"age": 60, "sex": "male"}},
        {"caption": "CT.", "record": {"age": 61, "sex": None}},
        {"caption": "", "record": {"age": 62}},
        {"caption": "Nobody knows.", "record": None},
        {"caption": "Of 63.", "image": {"bytes": None, "path": "63"}, "record": {"age": 63}},
    ]
    assert field_told_in_captions(rows) == {"age": pytest.approx(2 / 3), "sex": 0.0}


def test_eval_says_it_in_one_line():
    embeddings = of_three(n=40)
    ages = [k % 3 for k in range(40)]
    result = evaluate_embeddings(with_records(embeddings, [{"age": age, "sex": "f"} for age in ages]))
    assert result["caption_tells_record[age]"] == 1.0  # "case 7, 1 years"
    line = what_captions_tell(result)
    assert "'age' in 100%, 'sex' in 0%" in line and "\n" not in line
    assert what_captions_tell({"margin": 0.1}) == ""


def test_small_sets_give_no_warning_of_many_classes(recwarn):
    embeddings = of_three(n=40)
    embeddings.labels[:] = [f"label {k % 30}" for k in range(40)]
    assert "linear_probe_balanced_accuracy_image_to_text" in evaluate_embeddings(embeddings)
    assert not [str(one.message) for one in recwarn if "unique classes" in str(one.message)]
