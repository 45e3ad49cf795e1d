"""What is told of a record that training learned the schema of."""

from datasets import Dataset

from gap_closed_clip.training import ModelArguments
from gap_closed_clip.training.modalities import FurtherColumns
from gap_closed_clip.training.modality_towers import new_modalities


LONG = "an organ whose name has no end"
RECORDS = [
    {"age": 40, "sex": "F", "organ": "lung", "birth": "1980-06-15"},
    {"age": 60, "sex": "F", "organ": "liver", "birth": "1980-06-15"},
    {"age": None, "sex": "m", "organ": "liver", "birth": "1990-06-15"},
    {"age": 50.0, "sex": " ", "organ": LONG, "birth": "1990-06-15"},
    {"age": 50.0, "sex": "M", "organ": "lung", "birth": "1990-06-15"},
    {"age": 50.0, "sex": "M", "organ": "lung", "birth": "1990-06-15"},
    {"age": 50.0, "sex": "f", "organ": "knee", "birth": "1990-06-15"},
    None,
]


def test_training_tells_what_it_learned_of_a_record(capsys):
    columns = {"record": ["age", "sex", "organ", "birth"]}
    dates = {"birth": {"kind": "date", "relative_to": "2020-06-15"}}
    given = FurtherColumns(columns, Dataset.from_list([{"record": record} for record in RECORDS]))
    new_modalities(ModelArguments(modalities={"record": {"fields": dates}}), given, {})
    # Ages of 40, 60 and four times 50: a variance of 200 / 6. Births 14,610 (twice) and 10,958 days before.
    assert capsys.readouterr().out == (
        "What 8 training pairs taught of record: age: number, 50 ± 5.774, missing in 25.0%; "
        "sex: category, 2 words (F, M), missing in 25.0%; "
        "organ: category, 4 words (lung, liver, an organ whose name…, ...), missing in 12.5%; "
        "birth: date, years 32.86 ± 4.517, missing in 12.5%.\n"
    )
