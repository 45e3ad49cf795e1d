"""The towers of further modalities exported to ONNX and run in onnxruntime beside torch."""

import datetime
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

from gap_closed_clip.hub import export_onnx, onnx
from gap_closed_clip.hub.onnx import files_of
from gap_closed_clip.hub.onnx_further import further_batches

from .modality_models import FIELDS, RECORDS, embeds_of, model_of_four, processor_of_four, spectrogram


@pytest.fixture(scope="module")
def exported(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "onnx"
    model, processor = model_of_four(), processor_of_four(tiny_processor)
    return model, processor, folder, export_onnx(model, processor, folder, name="owner/four", tolerance=2e-6)


def run(folder, file, **inputs):
    session = onnxruntime.InferenceSession(str(folder / file))
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def test_every_tower_is_exported(exported):
    model, processor, folder, differences = exported
    written = {path.name for path in folder.iterdir()}
    assert {"record.onnx", "audio.onnx"} < written <= set(files_of(["record", "audio"]))
    found = {(difference.file, difference.inputs) for difference in differences}
    assert {(f"{name}.onnx", kind) for name in ("record", "audio") for kind in ("random", "processed")} <= found
    for number in (1, 3):
        rows = (RECORDS * 2)[:number]
        encoded = processor.modality_processors["record"](rows)
        expected = embeds_of(model, processor, record=rows)["record"]
        np.testing.assert_allclose(run(folder, "record.onnx", **encoded), expected, atol=2e-6)
    sounds = [spectrogram(1), spectrogram(2)]
    inputs = {"input_values": torch.tensor(np.stack(sounds))}
    expected = embeds_of(model, processor, audio=sounds)["audio"]
    np.testing.assert_allclose(run(folder, "audio.onnx", **inputs), expected, atol=2e-6)


def test_the_readme_makes_of_a_record_what_the_processor_makes(exported, monkeypatch):
    model, processor, folder, _ = exported
    monkeypatch.chdir(folder)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[-1]
    names: dict = {}
    exec(code, names)
    schema = json.loads((folder / "preprocessing.json").read_text())["modalities"]["record"]
    assert list(schema["inputs"]) == ["numbers", "numbers_mask", "categories"] and schema["file"] == "record.onnx"
    assert schema["field_order"] == ["age", "birth", "sex", "ward"]
    expected = embeds_of(model, processor, record=[schema["example"]])["record"]
    np.testing.assert_allclose(names["record_embeds"], expected, atol=2e-6)
    strange = [{"sex": " FEMALE\n", "age": " 41 "}, {"sex": "", "age": "", "birth": ""}, {"sex": " ", "age": "\t"}]
    strange += [
        {"age": float("nan"), "sex": float("nan"), "ward": 3.0},
        {"ward": True},
        {"age": np.float32(3), "ward": 2},
    ]
    strange += [{"birth": "1961-02-03", "study": ""}, {"birth": " 1961-02-03 ", "study": float("nan")}]
    strange += [
        {"birth": " 1961-02-03T10:00", "study": " 2020-01-01 "},
        {"birth": datetime.date(1961, 2, 3), "study": "2020-01-01"},
    ]
    for record in [*RECORDS, {"sex": "other"}, {"birth": "1990-01-01"}, {"ward": 3}, *strange]:
        arrays, wanted = names["inputs"](record), processor.modality_processors["record"]([record])
        for name, array in arrays.items():
            np.testing.assert_allclose(array, wanted[name].numpy(), atol=1e-6, err_msg=f"{record} {name}")
            assert array.dtype == wanted[name].numpy().dtype


@pytest.mark.parametrize("fields", [FIELDS[:1], FIELDS[1:2]], ids=["no numbers", "no categories"])
def test_a_record_of_one_kind_of_field(tiny_processor, tmp_path, monkeypatch, fields):
    for part in ("_export_images", "_export_texts"):  # most of the time would be theirs
        monkeypatch.setattr(onnx, part, lambda *args: None)
    model, processor = model_of_four(fields), processor_of_four(tiny_processor, fields)
    folder = tmp_path / "onnx"
    export_onnx(model, processor, folder)
    (kind, batch), *_ = further_batches(processor, "record", (3,))
    taken = {each.name for each in onnxruntime.InferenceSession(str(folder / "record.onnx")).get_inputs()}
    found = run(folder, "record.onnx", **{name: batch[name] for name in taken})
    with torch.no_grad():
        expected = model(**{f"record_{name}": value for name, value in batch.items()}).embeds["record"]
    np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=kind)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[-1], names)
    expected = embeds_of(model, processor, record=[names["schema"]["example"]])["record"]
    np.testing.assert_allclose(names["record_embeds"], expected, atol=2e-6)
    onnx._check_replaceable(folder, overwrite=True)
    (folder / "video.onnx").touch()
    with pytest.raises(FileExistsError, match="holds what no export wrote, video.onnx"):
        onnx._check_replaceable(folder, overwrite=True)
