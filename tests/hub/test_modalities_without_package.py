"""A processor of further modalities from a folder, where the package is not installed."""

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.model.image_processing_gap_closed_clip import GapClosedClipImageProcessor
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor

from .conftest import WITHOUT_PACKAGE


FIELDS = [
    {"name": "age", "kind": "number", "mean": 50.0, "std": 10.0},
    {"name": "born", "kind": "date", "relative_to": "2020-01-01", "allow_later": False, "mean": 0.0, "std": 1.0},
    {"name": "sex", "kind": "category", "categories": ["male", "female"]},
]
ELSEWHERE = """
from transformers import AutoProcessor

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(
    text=["a", None],
    record=[{"age": "70", "born": "2019-01-01"}, None],
    lateral=[None, None],
    array=[[[0, 1, 2], [3, 4, 5]], None],
    padding=True,
)
numbers = [[round(float(number), 3) for number in row] for row in batch["record_numbers"]]
print(numbers, batch["modality_mask"].tolist())
processor.save_pretrained(folder + "/again")
try:
    processor(record={"age": "old"})
except ValueError as error:
    print(error)
"""


def test_a_processor_of_records_works_without_the_package(python, tiny_processor, tmp_path):
    side = {"height": 8, "width": 8}
    further = {
        "record": RecordProcessor(FIELDS),
        "lateral": GapClosedClipImageProcessor(size={"shortest_edge": 8}, crop_size=side),
        "array": ArrayProcessor("input_values", [2, 3]),
    }
    folder = tmp_path / "model"
    GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further).save_pretrained(folder)
    run = python("-c", WITHOUT_PACKAGE + ELSEWHERE, str(folder), HF_HUB_OFFLINE="1")
    batch, error = run.stdout.strip().splitlines()[-2:]
    mask = [[False, True, True, False, True], [False] * 5]
    assert batch == f"[[2.0, {365 / 365.25:.3f}], [0.0, 0.0]] {mask}"
    assert "field 'age': 'old' is no number" in error
    for name in ("processor_config.json", *(path.name for path in folder.glob("*.py"))):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()
