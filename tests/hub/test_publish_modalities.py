"""Models of more than two modalities, published and used where the package is not installed."""

import json
import re

import pytest
import torch
from conftest import CAPTIONS, noise_image
from safetensors.torch import load_file

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.hub import publish
from gap_closed_clip.hub.reload import HUB, check_reload
from gap_closed_clip.hub.samples import check_modalities, made_up, records
from gap_closed_clip.model.pipeline_gap_closed_clip import ImageTextRetrievalPipeline
from gap_closed_clip.model.record_processing_gap_closed_clip import RecordProcessor

from .conftest import CODE, WITHOUT_PACKAGE, save_folder
from .modality_models import FIELDS, RECORDS, WEIGHTS, embeds_of, model_of_four, processor_of_four, spectrogram


# Run where the package is not installed: the model from the Hub, and the code on its card.
STRANGER = """
import json, pathlib, re
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, pipeline

repo_id, out = sys.argv[1:]
records, texts, sound = json.load(open(f"{out}/samples.json"))
model = AutoModel.from_pretrained(repo_id, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
inputs = processor(text=texts, record=records, audio=[sound, None], return_tensors="pt", padding=True)
with torch.inference_mode():
    outputs = model(**inputs)
save_file({name: embeds.contiguous() for name, embeds in outputs.embeds.items()}, f"{out}/embeds.safetensors")
card = pathlib.Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
names = {}
for block in re.findall(r"```python\\n(.*?)```", card.split("## Further modalities")[1], flags=re.DOTALL):
    exec(block, names)
item = {"text": texts[0], "record": records[0]}
hits = names["search"](item, gallery=[texts[1], {"record": records[1]}, {"audio": np.array(sound)}, item])
model.save_pretrained(f"{out}/again")
processor.save_pretrained(f"{out}/again")
json.dump([[hit["index"], hit["score"]] for hit in hits], open(f"{out}/hits.json", "w"))
"""


@pytest.fixture
def processor(tiny_processor):
    return processor_of_four(tiny_processor)


@pytest.fixture
def model():
    model = model_of_four(fusion_weights=WEIGHTS)
    model.train()
    return model


def train(model, processor) -> None:
    """Two steps on samples that lack a record or a spectrogram."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = processor(
        images=[noise_image(80, seed=seed) for seed in range(3)],
        text=CAPTIONS[:3],
        record=[*RECORDS, None],
        audio=[None, spectrogram(1), spectrogram(2)],
        return_tensors="pt",
        padding=True,
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()


def test_a_model_of_four_modalities_works_from_the_hub(online, python, model, processor, tmp_path):
    train(model, processor)
    folder = save_folder(tmp_path / "outputs" / "four", model, processor)
    publish(folder, "tester/four", license="apache-2.0")
    sound = spectrogram()
    noise_image(80).save(tmp_path / "image.png")
    (tmp_path / "samples.json").write_text(json.dumps([RECORDS, CAPTIONS[:2], sound.tolist()]))
    python("-c", WITHOUT_PACKAGE + STRANGER, "tester/four", str(tmp_path), home="stranger")

    found = load_file(tmp_path / "embeds.safetensors")
    expected = embeds_of(model, processor, text=CAPTIONS[:2], record=RECORDS, audio=[sound])
    assert torch.equal(found["text"], expected["text"]) and torch.equal(found["record"], expected["record"])
    torch.testing.assert_close(found["audio"][0], expected["audio"][0])
    assert found["audio"][1].abs().sum() == 0  # of the sample without one
    both = WEIGHTS["text"] * expected["text"][0] + WEIGHTS["record"] * expected["record"][0]
    both = both / both.norm()
    gallery = torch.stack([expected["text"][1], expected["record"][1], expected["audio"][0], both])
    hits = json.loads((tmp_path / "hits.json").read_text())
    ranked = sorted(enumerate((gallery @ both).tolist()), key=lambda hit: -hit[1])
    assert hits == [[index, pytest.approx(score, abs=1e-5)] for index, score in ranked] and hits[0][0] == 3
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == set(CODE)
    assert (tmp_path / "again" / "processor_config.json").read_bytes() == (
        folder / "processor_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "record_processing_gap_closed_clip.py",
            "= value, True",
            "= -value, True",
            "record_embeds of a clean process",
        ),
        (
            "record_processing_gap_closed_clip.py",
            "stacked[index] = self",
            "stacked[index] = 2 * self",
            "audio_embeds of",
        ),
    ],
)
def test_other_embeddings_of_a_further_modality_are_not_published(model, processor, tmp_path, file, old, new, message):
    folder = save_folder(tmp_path / "four", model, processor)
    code = (folder / file).read_text()
    assert code.count(old) == 1
    (folder / file).write_text(code.replace(old, new))
    for name in (
        "handler.py",
        "handler_bounds.py",
        "handler_images.py",
        "handler_modalities.py",
        "handler_requests.py",
    ):
        (folder / name).write_bytes((HUB / name).read_bytes())
    with pytest.raises(ValueError, match=message):
        check_reload(folder)


def test_onnx_files_of_further_modalities_go_and_are_deleted(online, model, processor, skip_reload, tmp_path):
    folder = save_folder(tmp_path / "four", model.eval(), processor)
    publish(folder, "tester/four")
    files = online.files("tester/four")
    files.update(dict.fromkeys(["onnx/record.onnx", "onnx/audio.onnx_data", "onnx/mine.onnx"], b"old"))
    done = publish(folder, "tester/four")
    gone = {name for name, change in done.changes.items() if change == "deleted"}
    assert gone == {"onnx/record.onnx", "onnx/audio.onnx_data"} and "onnx/mine.onnx" in online.files("tester/four")


def test_onnx_files_of_a_modality_that_the_model_has_no_more_are_deleted(
    online, model, processor, tiny_model, tiny_processor, skip_reload, tmp_path
):
    publish(save_folder(tmp_path / "four", model.eval(), processor), "tester/four")
    files = online.files("tester/four")
    files.update(dict.fromkeys(["onnx/record.onnx", "onnx/audio.onnx_data", "onnx/mine.onnx"], b"old"))
    folder = save_folder(tmp_path / "two", tiny_model, tiny_processor)
    listed = publish(folder, "tester/four", dry_run=True)
    done = publish(folder, "tester/four")
    assert listed.changes == done.changes
    gone = {name for name, change in done.changes.items() if change == "deleted"}
    assert gone == {"onnx/record.onnx", "onnx/audio.onnx_data"}
    assert {"onnx/mine.onnx", "config.json"} <= online.files("tester/four").keys()


def test_a_processor_of_other_modalities_is_refused(model, tiny_processor, processor):
    with pytest.raises(
        ValueError, match="embeds image, text, record, audio, and its processor makes .* image, text: "
    ):
        check_modalities(model, tiny_processor)
    other = [*FIELDS[:3], {"name": "ward", "kind": "category", "categories": ["3", "4"]}]
    with pytest.raises(ValueError, match=re.escape("the sizes [4, 3]; the processor's schema has 2 and [4, 4]")):
        check_modalities(model, processor_of_four(tiny_processor, other))
    check_modalities(model, processor)


def test_an_edited_schema_is_refused_wherever_model_and_processor_meet(model, tiny_processor, processor, tmp_path):
    model.config.modalities["record"]["tower"].schema = processor.modality_processors["record"].digest
    edited = processor_of_four(tiny_processor, [FIELDS[0], FIELDS[2], FIELDS[1], FIELDS[3]])
    folder = save_folder(tmp_path / "four", model.eval(), processor)
    load_checkpoint(folder)
    edited.save_pretrained(folder)
    for refused in (
        lambda: load_checkpoint(folder),
        lambda: check_modalities(model, edited),
        lambda: ImageTextRetrievalPipeline(model, processor=edited, device="cpu"),
    ):
        with pytest.raises(ValueError, match="'record' in processor_config.json are not those"):
            refused()


def test_made_up_samples_are_of_the_schema(processor):
    full, sparse = records(processor.modality_processors["record"])
    assert full == {"sex": "female", "age": 70.0, "birth": "1950-06-15", "study": "2020-06-15", "ward": "3"}
    assert sparse == {"ward": "3"}
    samples = made_up(processor)
    assert list(samples) == ["record", "audio"] and len(json.dumps(samples)) > 1000
    encoded = processor(**samples, return_tensors="pt")
    assert encoded["record_numbers_mask"].tolist() == [[True, True], [False, False]]
    assert encoded["record_numbers"][0].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    alone = RecordProcessor([{"name": "scan", "kind": "date", "relative_to": "2020-01-01", "mean": 2.0, "std": 1.0}])
    assert records(alone) == [{"scan": "2016-12-31"}, {"scan": "2019-01-01"}]
