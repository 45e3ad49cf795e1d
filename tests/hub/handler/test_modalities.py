"""Requests with records, arrays and items of several modalities."""

import json

import pytest
import torch
from conftest import CAPTIONS

from ..conftest import load_handler
from ..modality_models import RECORDS, WEIGHTS, embeds_of, model_of_four, processor_of_four, spectrogram
from .examples import IMAGES, b64, near, save, search


SOUNDS = [spectrogram(seed).tolist() for seed in range(2)]


@pytest.fixture(scope="module")
def processor(tiny_processor):
    return processor_of_four(tiny_processor)


@pytest.fixture(scope="module")
def model():
    return model_of_four(fusion_weights=WEIGHTS)


@pytest.fixture(scope="module")
def endpoint(model, processor, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("four"), model, processor)
    return load_handler(folder)[0].EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def embeds(model, processor):
    return embeds_of(model, processor, image=IMAGES[:2], text=CAPTIONS[:2], record=RECORDS, audio=SOUNDS)


def test_embeddings_of_every_modality(endpoint, embeds):
    images = [b64(image) for image in IMAGES[:2]]
    inputs = {"images": images, "texts": CAPTIONS[:2], "records": RECORDS, "audios": SOUNDS}
    answer = endpoint({"inputs": inputs})
    assert answer == near({f"{name}_embeds": rows.tolist() for name, rows in embeds.items()})
    json.dumps(answer)
    record = {"record_embeds": near(embeds["record"][:1].tolist())}
    for inputs in ({"record": RECORDS[0]}, {"record": [RECORDS[0]]}):
        assert endpoint({"inputs": inputs}) == record
    assert endpoint({"inputs": {"audio": SOUNDS[1]}}) == {"audio_embeds": near(embeds["audio"][1:].tolist())}


def test_many_records_are_encoded_in_batches(endpoint, embeds):
    answer = endpoint({"inputs": {"records": RECORDS * 20}})
    torch.testing.assert_close(torch.tensor(answer["record_embeds"]), embeds["record"].repeat(20, 1))


def test_a_query_of_image_and_record(endpoint, embeds):
    query = {"image": b64(IMAGES[0]), "record": RECORDS[0]}
    answer = endpoint(search(query, [CAPTIONS[0], {"record": RECORDS[1]}, CAPTIONS[1], {"audio": SOUNDS[0]}, query]))
    both = WEIGHTS["image"] * embeds["image"][0] + WEIGHTS["record"] * embeds["record"][0]
    both = both / both.norm()
    gallery = [embeds["text"][0], embeds["record"][1], embeds["text"][1], embeds["audio"][0], both]
    cosines = (torch.stack(gallery) @ both).tolist()
    ranked = sorted(enumerate(cosines), key=lambda hit: -hit[1])
    assert answer == near([{"index": index, "score": score} for index, score in ranked]) and answer[0]["index"] == 4
    by_vectors = endpoint(search([query, CAPTIONS[0]], torch.stack(gallery).tolist(), top_k=1))
    assert by_vectors[0] == near([{"index": 4, "score": 1.0}])


BAD = [
    ({"record": 3}, 400, "inputs.record is a number: send an object of fields and their values."),
    ({"records": [RECORDS[0], None]}, 400, "inputs.records[1] is null: send an object of fields and their values."),
    ({"record": {}}, 400, "inputs.record has no value: send one of sex, age, birth, study, ward or more."),
    ({"record": {"age": None}}, 400, "inputs.record has no value: send one of sex, age, birth, study, ward or more."),
    (
        {"records": [RECORDS[0], {"age": "old"}]},
        400,
        "inputs.records[1]: field 'age': 'old' is no number. Correct it, or leave it empty (None) where it is not "
        "known. If the field holds words, it is a category.",
    ),
    (
        {"record": {"agee": 4}},
        400,
        "inputs.record: field 'agee' with the value 4: the schema has no such field. Did you mean 'age'? Its fields "
        "are: sex, age, birth, study, ward. Leave it out, or rename it.",
    ),
    ({"record": {"sex": "x" * 30_000}}, 413, "inputs.record is 30011 characters long: a record may have 20000."),
    ({"records": RECORDS[:1] * 513}, 413, "513 records: a request may have 512. Send several requests."),
    ({"audios": SOUNDS[:1] * 17}, 413, "17 audios: a request may have 16. Send several requests."),
    (
        {"audio": [[1.0, 2.0]]},
        400,
        "inputs.audio: input_values[0] has the shape (1, 2), not (24, 16): cut or pad it first.",
    ),
    ({"audio": "sound"}, 400, "inputs.audio is a text: send the numbers as a list, of several dimensions nested."),
    ({"audio": [[1.0], [2.0, 3.0]]}, 400, "inputs.audio is no array: send numbers, and lists of equal length."),
    ({"audio": [[float("nan")]]}, 400, "inputs.audio is empty, or holds NaN or infinite numbers."),
    (
        {"video": 3},
        400,
        "Unknown name 'video' in inputs of embeddings: allowed are image, images, text, texts, record, records, "
        "audio, audios.",
    ),
]


@pytest.mark.parametrize(("inputs", "status", "message"), BAD)
def test_what_is_said_of_a_bad_request(endpoint, inputs, status, message):
    assert endpoint({"inputs": inputs}) == {"error": message, "status": status}


def test_what_is_said_of_a_bad_item(endpoint):
    answer = endpoint(search({"record": {"age": "old"}, "text": "a"}, ["a"]))
    assert answer["error"].startswith("inputs.query.record: field 'age': 'old' is no number.")
    answer = endpoint(search({"record": RECORDS[0], "video": 3}, ["a"]))
    wanted = 'send a text, {"text": text}, {"record": ...}, {"audio": ...} or {"image": base64}.'
    assert answer == {"error": f"inputs.query is an object: {wanted}", "status": 400}
    big = [[0.0] * 2001] * 2000
    assert endpoint({"inputs": {"audio": big}})["status"] == 413
